import torch


torch.set_num_threads(1)  # the matrices are small: threads only cost time, and one thread adds in one order
