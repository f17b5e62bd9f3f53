"""The table of methods: one row per name. Reading it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_lowrank.methods.parts import Moments, Reconstruction, Subspace


@dataclass(frozen=True)
class Method:
    """One row of the table. A part is the name of a registered one or an instance of a class of your own.

    Attributes:
        subspace, moments, reconstruction: the parts.
        summary: what it is, in one line.
        paper: where it comes from.
        state: elements of state per m x n matrix (m <= n) at rank r.
        defaults: options whose default differs from the common one.
        limits: what it cannot do, in one line.
        free: whether the parts may be chosen by options (the row `lowrank`).
    """

    subspace: str | Subspace
    moments: str | Moments
    reconstruction: str | Reconstruction
    summary: str
    paper: str
    state: str = "mr + 2nr"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: str = ""
    free: bool = False


_GALORE = "arXiv 2403.03507"
_I3S = "arXiv 2502.05790"
_FIRA = "arXiv 2410.01623"
_GOLORE = "arXiv 2410.11289"
_APOLLO = "arXiv 2412.05270"
_UPDATES_IN_HOOK = "layerwise: no accumulation, no max_grad_norm"
_ALONG_GRADIENT: dict[str, Any] = {"scale": 1.0}

METHODS: dict[str, Method] = {
    "galore_dominant_adamw": Method(
        "dominant", "adam", "project", "GaLore: Adam in the leading singular vectors of the gradient", _GALORE
    ),
    "galore_i3s_adamw": Method(
        "i3s", "adam", "project", "GaLore-I3S (SARA): singular vectors sampled with weight sigma", _I3S
    ),
    "galore_hybrid_adamw": Method(
        "hybrid", "adam", "project", "the first r0 singular vectors, the others uniform; M rotated at a refresh", _I3S
    ),
    "galore_uniform_adamw": Method(
        "uniform",
        "adam",
        "project",
        "singular vectors sampled uniformly",
        f"{_I3S}, section 4.5",
        limits="several processes equal one to 2e-2 only",
    ),
    "galore_random_adamw": Method(
        "random", "adam", "project", "uniformly random subspace, blind to the gradient", _GOLORE
    ),
    "fira_adamw": Method(
        "dominant",
        "adam",
        "fira",
        "Fira: GaLore plus the scaled, limited residual",
        _FIRA,
        "mr + 2nr + 2",
        limits=_UPDATES_IN_HOOK,
    ),
    "fira_i3s_adamw": Method(
        "i3s",
        "adam",
        "fira",
        "Fira in an I3S subspace",
        f"{_I3S}; {_FIRA}",
        "mr + 2nr + 2",
        limits=_UPDATES_IN_HOOK,
    ),
    "subtrack_adamw": Method(
        "grassmann",
        "adam",
        "project",
        "SubTrack: the basis follows the gradient by rank-1 Grassmann steps",
        "SubTrack (workshop); arXiv 2502.01586",
        "mr + 2nr (+ mn with accumulate)",
    ),
    "subtrack_pp_adamw": Method(
        "grassmann",
        "adam",
        "fira",
        "SubTrack++: the same with moments carried along and recovery scaling",
        "arXiv 2502.01586",
        "mr + 2nr + 2 (+ mn with accumulate)",
        {"on_refresh": "rotate_variance", "fira_form": "paper"},
        _UPDATES_IN_HOOK,
    ),
    "golore_adamw": Method(
        "golore", "adam", "project", "GoLore: dominant, then random for the last 20 % of the run", _GOLORE
    ),
    "golore_msgd": Method(
        "golore", "momentum", "project", "GoLore with momentum SGD", _GOLORE, "mr + nr", _ALONG_GRADIENT
    ),
    "galore_i3s_msgd": Method(
        "i3s", "momentum", "project", "low-rank momentum SGD in an I3S subspace", _I3S, "mr + nr", _ALONG_GRADIENT
    ),
    "galore_hybrid_msgd": Method(
        "hybrid",
        "momentum",
        "project",
        "low-rank momentum SGD as analysed in the I3S paper (Algorithm 4)",
        _I3S,
        "mr + nr",
        _ALONG_GRADIENT,
    ),
    "natural_galore_adamw": Method(
        "dominant",
        "natural_adam",
        "project",
        "Natural GaLore: natural gradient on a window of s projected gradients, then Adam",
        "arXiv 2410.16029",
        "mr + 2nr + snr",
    ),
    "q_galore_adamw": Method(
        "lazy",
        "adam",
        "project",
        "Q-GaLore: packed 4-bit basis, refreshed the less often the less it changes",
        "arXiv 2407.08296",
        "mr/8 + 2nr; with _8bit mr/8 + nr/2",
        {"basis_format": "4bit"},
    ),
    "ldadam": Method(
        "block_power",
        "adam",
        "error_feedback",
        "LDAdam: a power step at every step, both moments carried along, error feedback",
        "arXiv 2410.16103",
        "mr + 2nr + mn (mr + 2nr with error_feedback=off)",
        {**_ALONG_GRADIENT, "update_proj_gap": 1},
        _UPDATES_IN_HOOK,
    ),
    "flora_adafactor": Method(
        "sketch",
        "sketched_momentum",
        "flora",
        "FLora: Adafactor whose first moment is a Gaussian sketch",
        "arXiv 2402.03293",
        "nr + m + n",
        {**_ALONG_GRADIENT, "on_refresh": "rotate", "update_proj_gap": 1000},
        _UPDATES_IN_HOOK,
    ),
    "grass_adamw": Method(
        "rows", "adam", "project", "Grass: rows of the gradient, sampled by norm", "arXiv 2406.17660", "2r + 2nr"
    ),
    "online_subspace_adamw": Method(
        "online",
        "adam",
        "project",
        "Online Subspace Descent: the basis has an AdamW of its own",
        "arXiv 2408.12857",
        "3mr + 2nr",
        limits=_UPDATES_IN_HOOK,
    ),
    "apollo_random_adamw": Method(
        "sketch",
        "adam",
        "scaled_gradient",
        "APOLLO: the gradient, its columns scaled as Adam scales their random sketch",
        _APOLLO,
        "2nr + 1",
        _ALONG_GRADIENT,
        _UPDATES_IN_HOOK,
    ),
    "apollo_dominant_adamw": Method(
        "dominant",
        "adam",
        "scaled_gradient",
        "APOLLO with the leading singular vectors",
        _APOLLO,
        "mr + 2nr + 1",
        _ALONG_GRADIENT,
        _UPDATES_IN_HOOK,
    ),
    "apollo_mini_adamw": Method(
        "sketch",
        "adam",
        "scaled_gradient",
        "APOLLO-Mini: rank 1, one factor per matrix",
        _APOLLO,
        "2n + 1",
        {"rank": 1, "scale": 128.0, "scaling": "tensor"},
        _UPDATES_IN_HOOK,
    ),
    "gwt_adamw": Method(
        "haar",
        "adam",
        "details",
        "GWT: Adam on the Haar approximation, details scaled alike; rank 2^-level of the last axis",
        "arXiv 2501.07237",
        "2mn/2^level + 1",
        {"rank": 0.25, "proj_type": "right"},
        f"{_UPDATES_IN_HOOK}; no bound on its first steps: warm up",
    ),
    "foam_adamw": Method(
        "fold",
        "folded_adam",
        "unfold",
        "FOAM: moments of means over 2^level entries; rank 2^-level of the last axis",
        "arXiv 2512.07112",
        "2mn/2^level",
        {"rank": 0.25, "proj_type": "right"},
        _UPDATES_IN_HOOK,
    ),
    "lowrank": Method(
        "dominant", "adam", "project", "any parts by name: subspace=, moments=, reconstruction=", "-", free=True
    ),
}

_OTHER_MOMENTS = {
    "adafactor": ("adafactor", "Adafactor with first moment", "mr + nr + r + n"),
    "adam_mini": ("adam_mini", "Adam-mini", "mr + nr + n (or r, or n/head)"),
    "came": ("came", "CAME", "mr + nr + 2(r + n)"),
}
for _family in ("galore_dominant", "galore_i3s", "galore_hybrid", "fira", "fira_i3s"):
    _row = METHODS[f"{_family}_adamw"]
    for _ending, (_moments, _name, _state) in _OTHER_MOMENTS.items():
        METHODS[f"{_family}_{_ending}"] = replace(
            _row,
            moments=_moments,
            summary=f"the subspace and step of `{_family}_adamw` with {_name}",
            state=_state + (" + 2" if _row.reconstruction == "fira" else ""),
        )
