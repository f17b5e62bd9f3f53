"""Lightning: what its callbacks do to the groups of an optimizer, and a run that goes on from its checkpoint."""

import pytest
import torch
from torch import nn

from hf_lowrank import LowRankOptimizer, param_groups


lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
NAME = "galore_i3s_adamw"


class Module(lightning.LightningModule):
    def __init__(self, name=NAME):
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16))

    def training_step(self, batch, index):
        return (self.net(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self):
        groups = param_groups(self, method=self.name, rank=4, update_proj_gap=3)
        return LowRankOptimizer(groups, self.name, lr=1e-2)


class Thaw(lightning.pytorch.callbacks.BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer)
        elif epoch > 1:  # a resumed run starts with it frozen
            self.make_trainable(module.net[0])


def fit(folder, epochs, *, resume=None, callbacks=(), name=NAME, **options):
    module = Module(name)
    gen = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(16, 16, generator=gen))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=resume)
    return trainer, module


@pytest.mark.parametrize(("name", "options"), [
    (NAME, {}),
    (f"{NAME}_8bit", {"gradient_clip_val": 0.5}),
    (NAME, {"precision": "bf16-true", "accumulate_grad_batches": 2}),
])  # fmt: skip
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(name, options, tmp_path):
    _, whole = fit(tmp_path, 3, name=name, **options)
    fit(tmp_path, 2, name=name, **options)[0].save_checkpoint(tmp_path / "last.ckpt")
    _, resumed = fit(tmp_path, 3, resume=tmp_path / "last.ckpt", name=name, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_so_does_one_whose_layers_were_unfrozen_on_the_way(tmp_path):
    """On resume BaseFinetuning puts groups of its own making in the place of the optimizer's."""
    trainer, whole = fit(tmp_path, 3, callbacks=[Thaw()])
    groups = trainer.optimizers[0].param_groups
    assert [group["param_names"] for group in groups if "rank" in group] == [["net.3.weight"], ["net.0.weight"]]
    fit(tmp_path, 2, callbacks=[Thaw()])[0].save_checkpoint(tmp_path / "last.ckpt")
    _, resumed = fit(tmp_path, 3, resume=tmp_path / "last.ckpt", callbacks=[Thaw()])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_float64_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="float64; train it in float32"):
        fit(tmp_path, 1, precision="64-true")
