"""LowRankCallback: what the subspaces do, in the Trainer's logs and in files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_lowrank.hf.arguments import name_of, refuse_unsupported, unwrapped
from hf_lowrank.hf.checkpoints import GENERATORS, SAVED, generators_saved_by
from hf_lowrank.hf.clipping import clip_as_told, give_clipping_back, hold_clipping
from hf_lowrank.hf.model_card import TAG
from hf_lowrank.hf.unsloth import take_embedding_learning_rate
from hf_lowrank.hf.weights import check_saved
from hf_lowrank.methods import resolve
from hf_lowrank.observe import folder
from hf_lowrank.observe.describe import described, has_subspaces, headline, summary
from hf_lowrank.observe.progress import FirstRefresh
from hf_lowrank.observe.run import Run
from hf_lowrank.optimizer import LowRankOptimizer


logger = logging.getLogger("hf_lowrank")


class LowRankCallback(TrainerCallback):  # type: ignore[misc]
    """Adds `lowrank/...` to every training log, and writes refreshes and step times to files in the output folder.

    In every log, as means over matrices: overlap: ||U^T V||_F^2 / r of the last basis with the one before (I3S paper,
    eq. 3); overlap_first: with the first one; energy: share of the gradient's squared norm inside the basis at its
    refresh; stable_rank: ||G||_F^2 / ||G||_2^2 there (GaLore paper, section 3.2); and the gauges that the parts of the
    method declare: the value at the last step or, of what is counted, the share of the steps since the last log in
    which it was so. Further refreshes: so far, over all matrices; refresh_ms: time of the refreshes since the last
    log; skipped: steps left out for a gradient that was not finite, over all parameters; state_mib: the optimizer's
    state.

    After a refresh what is known per matrix also by module type, as overlap/q; after a checkpoint update_rank, the
    effective rank of what the weights changed by since the checkpoint before. Where a CUDA device works ahead of the
    host, times are the host's.

    It is attached by itself where the optimizers are registered, and does nothing for any other optimizer. One that is
    given to Trainer by hand lends its arguments to the one that is there already.

    Args:
        first_overlap: compare with the first subspaces; see `first.FirstSubspaces` for what it keeps.
        update_rank: "estimate", "exact" (keeps a copy of the matrices on the CPU) or "off".
    """

    def __init__(self, *, first_overlap: bool = True, update_rank: str = "estimate") -> None:
        if update_rank not in ("estimate", "exact", "off"):
            raise ValueError(f"update_rank must be one of estimate, exact, off, got {update_rank!r}")
        self.first_overlap, self.update_rank = first_overlap, update_rank
        self.optimizer: LowRankOptimizer | None = None
        self.run: Run | None = None  # where this callback is the one that reports
        self._first_refresh: FirstRefresh | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over what unsloth would do by itself."""
        take_embedding_learning_rate(args, kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the optimizer, say and write what it is, in a folder that no other process trains in."""
        if name_of(args) in resolve.names():
            refuse_unsupported(args)  # DeepSpeed may have built an optimizer of its own, without asking for ours
        give_clipping_back(args)
        optimizer = unwrapped(kwargs.get("optimizer"))
        self.optimizer, self.run, self._first_refresh = None, None, None
        if not isinstance(optimizer, LowRankOptimizer):
            if optimizer is not None and name_of(args) in resolve.names():
                logger.warning(
                    "--optim %s and its optim_args have no effect: this trainer was given, or creates, %s by itself. "
                    "Leave optimizers= out, or let its create_optimizer return super().create_optimizer()",
                    name_of(args),
                    type(optimizer).__name__,
                )
            return
        _check_trains(optimizer, kwargs.get("model"))
        first = getattr(optimizer, "_reported_in", None)
        if first is not None and first[0] is state:  # a second callback: the first one reports, before any reporter
            first[1].first_overlap, first[1].update_rank = self.first_overlap, self.update_rank
            return
        optimizer._reported_in = (state, self)
        optimizer.layerwise.forget()  # of a backward pass that an error has ended
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        check_saved(kwargs.get("model"), held, resumed=state.global_step > 0)
        if args.world_size > 1:
            optimizer.agree_on_options()
        self.optimizer = optimizer
        clip_as_told(optimizer, args)
        optimizer.tell(total_steps=state.max_steps)  # for the rules that switch at a share of the run
        saved = (state.stateful_callbacks or {}).get(SAVED, {})
        main, step = state.is_world_process_zero, state.global_step
        if main:
            folder.hold(Path(args.output_dir))
        self.run = Run(optimizer, Path(args.output_dir), step=step, history=state.log_history, saved=saved, main=main)
        model = kwargs.get("model")
        if model is not None and hasattr(model, "add_model_tags"):
            model.add_model_tags([TAG])
        if main:
            logger.info(summary(optimizer))
            self.run.describe(described(optimizer, model), step)
            self._first_refresh = FirstRefresh(optimizer, logger.info)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep Trainer from clipping what is left of the gradients where the optimizer clips the projected ones."""
        if self.run is None:
            return
        groups = self.run.optimizer.param_groups
        if any(group["max_grad_norm"] for group in groups):
            hold_clipping(args)
        if self.update_rank != "off":
            self.run.checkpoints.begin(exact=self.update_rank == "exact")
        self.run.clock.begin_step()
        if self._first_refresh is not None and any(group["layerwise"] for group in groups):
            self._first_refresh.start(updating=False)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give Trainer its argument back: it is part of what is saved."""
        give_clipping_back(args)
        if self._first_refresh is not None:
            self._first_refresh.start(updating=True)
        if self.run is not None:
            self.run.clock.begin_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time of the update."""
        if self.run is not None:
            self.run.clock.end_update()
        self._end_first_refresh()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the lines of this step; measure what the next checkpoint is to hold."""
        if self.run is None:
            return
        self.run.end_step(state.global_step, logging=control.should_log, first_overlap=self.first_overlap)
        if control.should_save:
            self._before_saving(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put what a resumed run needs into the state: Trainer may save the best model now."""
        self._keep(args, state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As at the end of a step, where Trainer saves by epochs."""
        if control.should_save:
            self._before_saving(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As before a save, where that was not announced: Trainer saves the best model right after an evaluation."""
        self._before_saving(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks of the layerwise mode off the model, and let others have the output folder."""
        self._end_first_refresh()
        if self.run is not None:
            self.run.optimizer.remove_hooks()
            folder.let_go(self.run.folder)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the metrics to a training log, for the reporters and for the log history."""
        if self.run is None or logs is None or "loss" not in logs:
            return
        found, pending = self.run.log()
        logs.update({**found, **pending})
        if state.log_history:  # what is pending has its own row there, at the step of the checkpoint
            state.log_history[-1].update(found)
        self._keep(args, state)
        refreshed = any(key.count("/") > 1 for key in found)
        if refreshed and state.is_world_process_zero and has_subspaces(self.run.optimizer):
            line = headline(found, self.run.since_log.gauges.declared)
            logger.info("step %d: %s", state.global_step, line)

    def _before_saving(self, args: Any, state: Any) -> None:
        """Measure the rank of the update, on all processes, and put what a resumed run needs into the state."""
        if self.run is None:
            return
        found = self.run.checkpoints.measure(state.global_step)
        if found and state.is_world_process_zero:
            state.log_history.append({**found, "epoch": state.epoch, "step": state.global_step})
        self._keep(args, state)

    def _keep(self, args: Any, state: Any) -> None:
        """Put what a resumed run needs into the state."""
        if self.run is not None:
            state.stateful_callbacks[SAVED] = {**self.run.kept(), GENERATORS: generators_saved_by(args)}

    def _end_first_refresh(self) -> None:
        if self._first_refresh is not None:
            self._first_refresh.stop()
            self._first_refresh = None


def _check_trains(optimizer: LowRankOptimizer, model: Any) -> None:
    """Refuse an optimizer that holds no parameter of the model, which would be trained without moving.

    Raises:
        ValueError: if they have none in common.
    """
    if model is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            "the optimizer holds no parameter of the model that is trained: it was made for another one, as where "
            "model_init makes a new model. Name it in TrainingArguments(optim=...), which makes it for that model"
        )
