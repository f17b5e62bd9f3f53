"""The table of methods: one row per name. Reading it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_lowrank.methods.registry import Part


@dataclass(frozen=True)
class Method:
    """One row of the table. A part is the name of a registered one or an instance of a class of your own.

    Attributes:
        subspace, moments, reconstruction: the parts.
        summary: what it is, in one line.
        paper: where it comes from; "-" for nowhere.
        defaults: options whose default differs from the common one.
        limits: what else it cannot do, in one line, beside what follows from its parts.
        free: whether the parts may be chosen by options (the row `lowrank`).
    """

    subspace: str | Part
    moments: str | Part
    reconstruction: str | Part
    summary: str
    paper: str = "-"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: str = ""
    free: bool = False


_GALORE = "arXiv 2403.03507"
_I3S = "arXiv 2502.05790"
_FIRA = "arXiv 2410.01623"
_GOLORE = "arXiv 2410.11289"
_APOLLO = "arXiv 2412.05270"
_SUMO = "arXiv 2505.24749"
_UNSCALED: dict[str, Any] = {"scale": 1.0}
_NO_BOUND = "no bound on its first steps: warm up"

_ALICE = "arXiv 2502.07752"
_SINKGD = "arXiv 2502.06742"
_WALK = "arXiv 2510.01878"
_SUBTRACK: dict[str, Any] = {"on_refresh": "rotate_variance"}
_ADALOMO = "arXiv 2310.10195"
_NORMUON = "arXiv 2510.05491"
_WHOLE: dict[str, Any] = {"rank": 1, "scale": 1.0, "proj_type": "right"}
_MUON: dict[str, Any] = {**_WHOLE, "orthogonalize": "newton_schulz", "nesterov": True}

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
    "fira_adamw": Method("dominant", "adam", "fira", "Fira: GaLore plus the scaled, limited residual", _FIRA),
    "fira_i3s_adamw": Method("i3s", "adam", "fira", "Fira in an I3S subspace", f"{_I3S}; {_FIRA}"),
    "subtrack_adamw": Method(
        "grassmann",
        "adam",
        "project",
        "SubTrack: the basis follows the gradient by rank-1 Grassmann steps",
        "SubTrack (workshop); arXiv 2502.01586",
    ),
    "subtrack_pp_adamw": Method(
        "grassmann",
        "adam",
        "fira",
        "SubTrack++: the same with moments carried along and recovery scaling",
        "arXiv 2502.01586",
        _SUBTRACK,
    ),
    "golore_adamw": Method(
        "golore", "adam", "project", "GoLore: dominant, then random for the last 20 % of the run", _GOLORE, _UNSCALED
    ),
    "golore_msgd": Method(
        "golore",
        "momentum",
        "project",
        "GoLore with momentum SGD",
        _GOLORE,
        {**_UNSCALED, "first_momentum": "gradient"},
    ),
    "galore_i3s_msgd": Method(
        "i3s",
        "momentum",
        "project",
        "low-rank momentum SGD in an I3S subspace, momentum carried along",
        _I3S,
        {**_UNSCALED, "on_refresh": "rotate"},
    ),
    "galore_hybrid_msgd": Method(
        "hybrid",
        "momentum",
        "project",
        "low-rank momentum SGD as analysed in the I3S paper (Algorithm 4)",
        _I3S,
        _UNSCALED,
    ),
    "sumo": Method(
        "dominant",
        "muon",
        "residual",
        "SUMO: orthogonalised momentum in the leading singular vectors, carried along; outside the gradient as it is",
        _SUMO,
        {**_UNSCALED, "on_refresh": "rotate"},
    ),
    "galore_dominant_muon": Method(
        "dominant", "muon", "project", "SUMO's orthogonalised momentum in GaLore's subspace", _SUMO, _UNSCALED
    ),
    "galore_i3s_muon": Method(
        "i3s", "muon", "project", "SUMO's orthogonalised momentum in an I3S subspace", _SUMO, _UNSCALED
    ),
    "fira_muon": Method(
        "dominant",
        "muon",
        "fira",
        "SUMO's orthogonalised momentum with Fira's residual",
        f"{_SUMO}; {_FIRA}",
        _UNSCALED,
    ),
    "natural_galore_adamw": Method(
        "dominant",
        "natural_adam",
        "project",
        "Natural GaLore: natural gradient on a window of s projected gradients, then Adam",
        "arXiv 2410.16029",
    ),
    "q_galore_adamw": Method(
        "lazy",
        "adam",
        "project",
        "Q-GaLore: packed 4-bit basis, refreshed the less often the less it changes",
        "arXiv 2407.08296",
        {"basis_format": "4bit"},
    ),
    "ldadam": Method(
        "block_power",
        "adam",
        "error_feedback",
        "LDAdam: a power step at every step, moments carried along, error feedback; its authors' betas are (0.908, "
        "0.99), their rank is 16",
        "arXiv 2410.16103",
        {**_UNSCALED, "update_proj_gap": 1, "proj_type": "paper"},
    ),
    "flora_adafactor": Method(
        "momentum_sketch",
        "sketched_momentum",
        "flora",
        "FLora: Adafactor whose first moment is a Gaussian sketch",
        "arXiv 2402.03293",
        {**_UNSCALED, "on_refresh": "rotate", "update_proj_gap": 1000},
    ),
    "grass_adamw": Method(
        "rows", "adam", "project", "Grass: rows of the gradient, sampled by norm", "arXiv 2406.17660"
    ),
    "online_subspace_adamw": Method(
        "online", "adam", "project", "Online Subspace Descent: the basis has an AdamW of its own", "arXiv 2408.12857"
    ),
    "apollo_random_adamw": Method(
        "sketch",
        "adam",
        "scaled_gradient",
        "APOLLO: the gradient, its columns scaled as Adam scales their random sketch",
        _APOLLO,
        _UNSCALED,
    ),
    "apollo_dominant_adamw": Method(
        "dominant", "adam", "scaled_gradient", "APOLLO with the leading singular vectors", _APOLLO, _UNSCALED
    ),
    "apollo_mini_adamw": Method(
        "sketch",
        "adam",
        "scaled_gradient",
        "APOLLO-Mini: rank 1, one factor per matrix",
        _APOLLO,
        {"rank": 1, "scale": 128.0, "scaling": "tensor"},
    ),
    "gwt_adamw": Method(
        "haar",
        "adam",
        "details",
        "GWT: Adam on the Haar approximation, details scaled alike; rank 2^-level of the last axis",
        "arXiv 2501.07237",
        {"rank": 0.25, "proj_type": "right"},
        limits=_NO_BOUND,
    ),
    "foam_adamw": Method(
        "fold",
        "folded_adam",
        "unfold",
        "FOAM: moments of means over 2^level entries; rank 2^-level of the last axis",
        "arXiv 2512.07112",
        {"rank": 0.25, "proj_type": "right"},
    ),
    "full_adamw": Method("whole", "adam", "project", "AdamW: the baseline", "arXiv 1711.05101", _WHOLE),
    "full_adafactor": Method(
        "whole", "adafactor", "project", "Adafactor with first moment", "arXiv 1804.04235", _WHOLE
    ),
    "full_came": Method("whole", "came", "project", "CAME", "arXiv 2307.02047", _WHOLE, limits=_NO_BOUND),
    "full_adam_mini": Method("whole", "adam_mini", "project", "Adam-mini", "arXiv 2406.16793", _WHOLE),
    "full_msgd": Method("whole", "momentum", "project", "SGD with momentum", "-", _WHOLE),
    "full_sgd": Method("whole", "sgd", "project", "SGD; LOMO where it is layerwise", "arXiv 2306.09782", _WHOLE),
    "full_adalomo": Method(
        "whole", "adalomo", "project", "AdaLomo: Adafactor without momentum, in units of the weight", _ADALOMO, _WHOLE
    ),
    "full_sm3": Method(
        "whole", "sm3", "project", "SM3: the largest of every row and column", "arXiv 1901.11150", _WHOLE
    ),
    "full_muon": Method("whole", "muon", "project", "Muon: orthogonalised momentum", "arXiv 2502.16982", _MUON),
    "full_normuon": Method("whole", "normuon", "project", "NorMuon: Muon with neurons of one size", _NORMUON, _MUON),
    "muon_4bit": Method(
        "whole",
        "muon",
        "project",
        "Muon with its momentum in four bits, rows in units of their size: a fifteenth of AdamW's state",
        "arXiv 2502.16982",
        {**_MUON, "state_format": "4bit", "row_scales": True},
    ),
    "rmnp": Method(
        "whole",
        "rmnp",
        "project",
        "RMNP: momentum with outputs of one size, Muon's step without its products",
        "arXiv 2603.20527",
        {**_WHOLE, "nesterov": True},
    ),
    "racs": Method(
        "whole", "racs", "project", "RACS: rows and columns scaled by a fixed point", _ALICE, {**_WHOLE, "scale": 0.05}
    ),
    "scale_sgd": Method(
        "whole",
        "sgd",
        "unit_columns",
        "SCALE: outputs of unit RMS; momentum for the head alone",
        "arXiv 2506.16659",
        {**_WHOLE, "embedding_rule": "column_norm", "head_rule": "momentum_column_norm"},
    ),
    "sinkgd": Method("whole", "sinkhorn", "project", "SinkGD: rows and columns of unit RMS", _SINKGD, _WHOLE),
    "swan": Method(
        "whole",
        "whitened",
        "project",
        "SWAN: outputs standardised, then whitened",
        "arXiv 2412.13148",
        {**_WHOLE, "orthogonalize": "polar_express"},
    ),
    "alice_adamw": Method(
        "alice",
        "adam",
        "compensation",
        "Alice-0: leading vectors and random others; the residual in units of what it usually is",
        _ALICE,
        {"scale": 0.3},
    ),
    "alice_muon": Method(
        "alice",
        "muon",
        "compensation",
        "SUMO's orthogonalised momentum in Alice's subspace, with its residual",
        f"{_ALICE}; {_SUMO}",
        _UNSCALED,
    ),
    "frugal_adamw": Method(
        "dominant",
        "adam",
        "frugal",
        "FRUGAL: Adam inside, the sign of the residual outside, moments cleared at a refresh",
        "arXiv 2411.07837",
        {**_UNSCALED, "on_refresh": "reset"},
    ),
    "grasswalk_adamw": Method(
        "grass_walk", "adam", "fira", "GrassWalk: a random walk of the basis, SubTrack++'s rest", _WALK, _SUBTRACK
    ),
    "grassjump_adamw": Method(
        "random", "adam", "fira", "GrassJump: a random basis at every refresh, SubTrack++'s rest", _WALK, _SUBTRACK
    ),
    "lowrank": Method(
        "dominant", "adam", "project", "any parts by name: subspace=, moments=, reconstruction=", "-", free=True
    ),
}


def _with_other_moments(family: str) -> dict[str, Method]:
    """Return the rows of a family's subspace and step with other moments than Adam's."""
    row = METHODS[f"{family}_adamw"]
    titles = {"adafactor": "Adafactor with first moment", "adam_mini": "Adam-mini", "came": "CAME"}
    summary = f"the subspace and step of `{family}_adamw` with"
    return {
        f"{family}_{moments}": replace(
            row, moments=moments, summary=f"{summary} {title}", limits=_NO_BOUND if moments == "came" else row.limits
        )
        for moments, title in titles.items()
    }


for _family in ("galore_dominant", "galore_i3s", "galore_hybrid", "fira", "fira_i3s"):
    METHODS |= _with_other_moments(_family)
