"""What a checkpoint must be, and what is said when it is not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.engine.sharding import adopt, allocate, whole_if_needed
from hf_lowrank.engine.work import Declared
from hf_lowrank.methods.resolve import Config
from hf_lowrank.state import view
from hf_lowrank.state.former import from_even_levels, from_former_names, from_one_line


FORMAT_VERSION = 3
"""Version of the layout of `optimizer.state_dict()`; stored in every group. In 1 blocks of codes crossed columns; up
to 2 the levels of 4-bit moments were evenly spaced."""

AFRESH = "start from the checkpoint's weights alone, without resuming"
"""What can always be done."""

RUN_OPTIONS = ("layerwise", "in_hook", "max_grad_norm", "stagger", "reduce_projected")
"""How a run is run, not what it computes: the caller's value holds, not the checkpoint's. So do the options that are a
fact of the model or the run."""

STRUCTURE = (
    *("method", "rank", "proj_type", "subspace", "moments", "reconstruction"),
    *("state_format", "basis_format", "dense_state_format"),
)
"""Options that no run may change. Those of a checkpoint must be those of the run, but for the side that is projected:
that is the checkpoint's, as any other option is."""


def check_checkpoint(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a checkpoint of another optimizer, method or structure, and what is none."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"load_state_dict takes the dict that state_dict() returns, not {type(state_dict).__name__}")
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError(f"this is no optimizer checkpoint: it holds {', '.join(map(str, state_dict)) or 'nothing'}")
    saved_groups = state_dict["param_groups"]
    if any("params" not in group for group in saved_groups):
        raise ValueError("this is no optimizer checkpoint: a group of it says not which parameters it has")
    if any("format" not in group or "method" not in group for group in saved_groups):
        keys = sorted({k for s in state_dict.get("state", {}).values() for k in s})
        raise ValueError(
            "this checkpoint was written by another optimizer, not by hf_lowrank (its state holds: "
            f"{', '.join(map(str, keys)) or 'nothing'}). Resume with the optimizer that wrote it, or start from "
            "its weights alone."
        )
    if any(group["format"] > FORMAT_VERSION for group in saved_groups):
        raise ValueError("this checkpoint was written by a newer hf_lowrank; upgrade to read it")
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in groups]:
        raise ValueError(
            "the checkpoint's parameter groups hold "
            f"{[len(g['params']) for g in saved_groups]} parameters, this optimizer's "
            f"{[len(g['params']) for g in groups]}: another model, rank or set of target modules, or other kinds of "
            f"parameters with a rate or rule of their own. Give it what was trained, or {AFRESH}"
        )
    for saved, now in zip(saved_groups, groups, strict=True):
        names = saved.get("param_names"), now.get("param_names")
        if all(names) and names[0] != names[1]:
            raise ValueError(
                "the checkpoint's parameters have other names, or another order, than this optimizer's: give it the "
                f"model that was trained, or {AFRESH}"
            )
        for key in STRUCTURE:
            if key != "proj_type" and saved.get(key) != now.get(key):
                raise ValueError(
                    f"the checkpoint has {key}={saved.get(key)}, this optimizer {key}={now.get(key)}: give it "
                    f"{saved.get(key)}, or {AFRESH}"
                )


def merge_options(saved: Mapping[str, Any], now: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return a saved group as it is to be loaded: its own options, those that it lacks, and how this run is run."""
    return {**now, **saved, **{key: now[key] for key in ("format", *RUN_OPTIONS, *config.facts) if key in now}}


def warn_changed(groups: Iterable[tuple[Mapping[str, Any], Mapping[str, Any], Config]]) -> None:
    """Warn about options that differ from the checkpoint's, once where groups differ alike.

    Args:
        groups: what each group holds now, what was given, and its resolved options.
    """
    changes = {f"{change}": change for group in groups for change in _changed(*group)}  # values may be anything
    for key, now, kept in changes.values():
        warn_kept(key, now, kept)


def _changed(loaded: Mapping[str, Any], given: Mapping[str, Any], config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yield options that differ, with both values; what a schedule edits and how the run is run aside."""
    if "max_momentum" in loaded and "betas" in given:  # OneCycleLR has its momentum there
        given = {**given, "betas": (loaded["betas"][0], given["betas"][1])}
    for key in sorted(set(loaded) & set(given) - {"lr", "param_names", "params", *RUN_OPTIONS, *config.facts}):
        if (kept := _plain(loaded[key])) != (now := _plain(given[key])):
            own = key == "initial_lr" and "max_lr" not in given  # of a schedule that begins elsewhere
            yield "lr" if own else key, now, kept


def warn_kept(key: str, given: Any, kept: Any) -> None:
    """Warn that an option keeps its value from a checkpoint, though another one was given."""
    warnings.warn(f"{key}={given} was given, the checkpoint has {kept}: the checkpoint's value is used", stacklevel=4)


def _plain(value: Any) -> Any:
    """Return a value as it is compared: betas may be a list."""
    return tuple(value) if isinstance(value, list) else value


def load_states(
    saved_states: Mapping[Any, Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]], known: Sequence[Declared]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield every parameter with its saved state, checked against the declared one."""
    if not saved_states:  # before the first step
        return
    saved_ids = [(i, group["format"]) for group in saved_groups for i in group["params"]]
    for (saved_id, version), (name, p, _, plan) in zip(saved_ids, known, strict=True):
        saved = {key: whole_if_needed(value, p) for key, value in saved_states.get(saved_id, {}).items()}
        saved = from_former_names(saved, plan.whole)
        if version < 2:
            saved = from_one_line(saved, plan.whole, plan.encodings)
        if version < 3:
            pieces = any(isinstance(value, DTensor) for value in saved.values())
            saved = from_even_levels(saved, plan.buffers if pieces else plan.whole, plan.encodings)
        trained = not (saved and saved.keys() <= plan.lasting.keys())
        fresh = allocate(p, plan, trained=trained)
        for key, buffer in plan.lasting.items():  # an older checkpoint may lack what is kept for the log alone
            if (buffer.slot.lifetime == "gauge" or key in ("earlier", "dropped_at")) and saved:
                saved.setdefault(key, fresh[key])
        if difference := view.mismatch(fresh, saved):
            what = name or f"parameter {saved_id}"
            raise ValueError(f"the checkpoint's state of {what} does not fit: {difference}")
        loaded = {key: adopt(saved[key], fresh[key]) for key in fresh}
        checked = {key: loaded[key] for key in loaded if key not in plan.lasting}
        check_finite(name or f"parameter {saved_id}", checked)  # what is kept for the log alone does no harm
        yield p, loaded


def check_finite(name: str, state: Mapping[str, Tensor]) -> None:
    """Refuse the state of one parameter if it holds NaN or infinity; of a sharded tensor, this process's part.

    Raises:
        ValueError: naming the parameter and the tensor.
    """
    for key, value in state.items():
        local = value.to_local() if isinstance(value, DTensor) else value
        if local.is_floating_point() and local.element_size() > 1 and not local.isfinite().all():
            raise ValueError(
                f"the checkpoint's {key} of {name} holds NaN or infinity: the file is damaged, or the run had "
                "diverged. Resume from an earlier checkpoint"
            )
