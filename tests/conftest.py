import gc
import os

import torch


torch.set_num_threads(1)  # the matrices are small: threads only cost time, and one thread adds in one order
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its own functions look at it too

from hf_lowrank.tensors import products  # noqa: E402


products.has_bf16_product = lambda: False  # in this process numbers are those of every CPU; test_products has both


def pytest_collection_finish() -> None:
    """Keep what is imported and collected out of the garbage collections, of which every training begins with one."""
    gc.collect()
    gc.freeze()
