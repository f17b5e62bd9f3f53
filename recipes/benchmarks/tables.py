"""What the benchmarks print: sections with a table each, targets, and the setting they were measured in."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


PACKAGES = (
    "torch",
    "hf_lowrank",
    "transformers",
    "galore-torch",
    "fira",
    "apollo-torch",
    "q-galore-torch",
    "pytorch-optimizer",
    "bitsandbytes",
)


@dataclass(frozen=True)
class Target:
    """One thing that should hold, beside what was measured.

    Attributes:
        what: the quantity.
        limit: the largest value (with `least`: the smallest) that meets the target, or None for one that is printed.
        measured: the value, or None where it could not be measured.
        spread: how sure one can be of it, or why it is missing.
        least: whether the limit is from below.
    """

    what: str
    limit: float | None
    measured: float | None
    spread: str = ""
    least: bool = False

    @property
    def verdict(self) -> str:
        """Whether it is met."""
        if self.measured is None:
            return "not measured"
        if self.limit is None:
            return "printed"
        return "met" if (self.measured >= self.limit if self.least else self.measured <= self.limit) else "NOT MET"


@dataclass
class Section:
    """One table: rows of equal keys, remarks under it, and the targets that it answers."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the section as Markdown."""
        parts = [f"## {self.title}", table(self.rows) if self.rows else "", "\n".join(f"- {x}" for x in self.remarks)]
        return "\n\n".join(part for part in parts if part)


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_shown(row.get(key)) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def targets_table(sections: list[Section]) -> str:
    """Return all targets: what, target, measured, met or not."""
    rows = []
    for target in (target for section in sections for target in section.targets):
        sign = "at least" if target.least else "at most"
        wanted = "-" if target.limit is None else f"{sign} {target.limit:g}"
        shown = {"what": target.what, "target": wanted, "measured": target.measured, "spread": target.spread}
        rows.append({**shown, "": target.verdict})
    return "## Targets\n\n" + (table(rows) if rows else "none in these sections")


def setting(device: str, threads: int) -> dict[str, Any]:
    """Return versions, threads and device."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": f"{device}: {name}",
        "threads": threads,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def as_json(sections: list[Section], where: dict[str, Any], command: str) -> dict[str, Any]:
    """Return everything, ready for JSON."""
    targets = [{**asdict(t), "verdict": t.verdict} for section in sections for t in section.targets]
    tables = [{"title": s.title, "rows": s.rows, "remarks": s.remarks} for s in sections]
    return {"command": command, "setting": where, "targets": targets, "sections": tables}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
