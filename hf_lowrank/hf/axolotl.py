"""The optimizers in axolotl: `plugins: [hf_lowrank.hf.axolotl.LowRankPlugin]`, then `optimizer: galore_i3s_adamw`."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found,import-untyped,unused-ignore]

from hf_lowrank.hf.register import register
from hf_lowrank.methods import resolve


class LowRankPlugin(BasePlugin):  # type: ignore[misc,unused-ignore]
    """Registers the names before axolotl builds its training arguments.

    axolotl hands a name of `optimizer:` that it does not know to transformers, with `optim_args:` and
    `optim_target_modules:`, and its trainers build what transformers names: so nothing else is needed. The hook
    `create_optimizer` is left alone: no trainer calls it in axolotl 0.19 and 0.21.
    """

    def register(self, cfg: Any) -> None:
        """Make every method a valid optimizer; axolotl calls this while it reads its configuration.

        Raises:
            ValueError: for one of our optimizers with a setting by which axolotl splits the parameters, which it would
                drop for an optimizer that brings its own groups.
        """
        register()
        if cfg.get("optimizer") in resolve.names():
            dropped = [key for key in _SPLITTING if cfg.get(key)]
            if dropped:
                raise ValueError(
                    f"{', '.join(dropped)}: axolotl does not apply it to {cfg['optimizer']}, which brings its own "
                    "groups; another rate for embeddings and head is embedding_lr below optim_args"
                )


_SPLITTING = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio")
