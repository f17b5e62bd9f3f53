"""What an optimizer does where other processes train the same weights: share the work, or the state, and agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from hf_lowrank.engine.agreement import options_of, same_settings, same_steps, same_weights
from hf_lowrank.engine.ahead import Ahead
from hf_lowrank.engine.ownership import Owners, check_shardable
from hf_lowrank.engine.work import Declared, Work, prepare
from hf_lowrank.state.slots import Stored


class Replicas(Optimizer):
    """An optimizer on several processes that train the same weights.

    Attributes:
        share_refreshes: whether every refresh is computed on one process and sent to the others.
        owners: whose state a parameter is, where state is sharded; None where every process keeps all.
    """

    share_refreshes: bool = False
    owners: Owners | None = None
    _ahead: Ahead  # the refreshes that go on beside the steps
    _compared = False  # whether the processes have been found to hold the same weights
    _whole: dict[Tensor, Stored] | None = None  # the state that was gathered here since the last step

    def _share(self, *, refreshes: bool, state: bool) -> None:
        """Say what is shared.

        Raises:
            ValueError: where there are no processes to share with.
        """
        if (refreshes or state) and not (dist.is_available() and dist.is_initialized()):
            name = "shard_state" if state else "share_refreshes"
            raise ValueError(f"{name} needs torch.distributed to be initialized")
        self.share_refreshes = refreshes and not state  # an owner refreshes what it steps
        self.owners = Owners() if state else None

    def __getstate__(self) -> dict[str, Any]:
        self._ahead.settle()
        return {**super().__getstate__(), "share_refreshes": self.share_refreshes, "owners": self.owners}

    @property
    def shard_state(self) -> bool:
        """Whether every process keeps the state of the parameters that it owns, and no other."""
        return self.owners is not None

    def declared(self) -> Iterator[Declared]:
        """Return what is known of every parameter, in group order."""
        raise NotImplementedError

    def kept(self) -> Iterator[Declared]:
        """Return what is known of the parameters whose state this process keeps: all, unless state is sharded."""
        known = list(self.declared())
        owner = {} if self.owners is None else self.owners.of(known)
        return (one for one in known if not owner or owner[one.weight] == dist.get_rank())

    def declared_bytes(self) -> int:
        """Return the bytes that this process's state takes, known before the first step."""
        return sum(one.nbytes for one in self.kept())

    # ---- the step ---------------------------------------------------------------------------------------------------

    def _prepared(self, p: Tensor | None = None) -> Work:
        """Return the steps of all parameters, having created the state that is missing."""
        raise NotImplementedError

    def _owned(self) -> Owners | None:
        """Return the owners, of every parameter."""
        if self.owners is not None:
            check_shardable(self.param_groups)
            self.owners.take(list(self.declared()))
        return self.owners

    def agree_on_options(self) -> None:
        """Refuse options that differ between processes. All of them call this; Trainer does before it trains.

        Raises:
            ValueError: on all processes, naming the first option that differs.
        """
        shared = [("share_refreshes", self.share_refreshes), ("shard_state", self.shard_state)]
        device = next(p.device for group in self.param_groups for p in group["params"])
        same_settings([*options_of(self.param_groups), *shared], device)

    def _agree(self, work: Work) -> None:
        """Refuse, on all processes, to go on where they would not do the same."""
        if (self.share_refreshes or self.shard_state) and not self._compared:
            self.agree_on_options()
            same_weights(list(self.declared()))
            self._compared = True
        same_steps(work, share=self.share_refreshes)

    def _agree_again(self, work: Work) -> None:
        """Do so after the step, before the subspaces that move then: one process may have skipped it."""
        if self.share_refreshes and any(u.config.low_rank and u.config.parts.subspace.late for u in work.units):
            same_steps(work, share=True)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Have GradScaler announce itself where it must be refused: it looks at gradients, one process for itself."""
        return any(group["layerwise"] or group.get("reduce_projected") for group in self.param_groups)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the whole state to one process, on the CPU, where `state_dict` has it until the next step.

        All processes call this; Trainer does before it saves. Without `shard_state` there is nothing to do.

        Args:
            to: the process.

        Raises:
            ValueError: if there is no such process.
        """
        if self.owners is None:
            return
        if not 0 <= to < dist.get_world_size():
            raise ValueError(f"to must be a process from 0 to {dist.get_world_size() - 1}, got {to}")
        self._prepared()
        self._ahead.settle()
        whole = self.owners.gathered(list(self.declared()), self.state, to)
        if whole is not None:
            self._whole = whole

    def _begin_added(self) -> None:
        """Create the state of parameters that were added since the last step."""
        added = {p for group in self.param_groups for p in group["params"] if not self.state.get(p)}
        if added and self.owners is None and any(self.state.values()):
            with torch.inference_mode(False):
                for one in self.declared():
                    if one.weight in added:
                        prepare(self.state, one.weight, one.plan)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return groups and state as plain data; where state is sharded the same as an unsharded run does.

        Parameters that were added since the last step have the state with which they begin.

        Raises:
            RuntimeError: where the state has not been gathered on this process since the last step.
        """
        self._ahead.settle()
        self._begin_added()
        packed = super().state_dict()
        if self.owners is None or not self.owners.begun:
            return packed
        if self._whole is None and dist.get_world_size() == 1:
            return packed
        if self._whole is None:
            raise RuntimeError(
                "this process holds only a part of the state (shard_state): call "
                "optimizer.consolidate_state_dict(to=0) on all processes, and then state_dict() on process 0 alone "
                "(Trainer does after hf_lowrank.register()); where every process asks for it, as in accelerate's "
                "save_state, gather it for every process first: to=0, to=1, ..."
            )
        return {**packed, "state": dict(enumerate(self._whole.values()))}
