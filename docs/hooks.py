"""A page for every method, written from its row, the docstrings of its parts and their option fields.

mkdocs calls `on_config` and `on_files`; `pages` needs no mkdocs.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

import hf_lowrank
from hf_lowrank import METHODS
from hf_lowrank.methods import papers, registry, resolve, tables


FOLDER = "methods"
WIDE = (1024, 4096)
ADAMW = 2 * 4 * WIDE[0] * WIDE[1] / 2**20
RANK = 256

SYMBOLS = {
    **{name: chr(code) for name, code in {"alpha": 0x3B1, "sigma": 0x3C3, "theta": 0x3B8, "phi": 0x3C6}.items()},
    **{name: chr(code) for name, code in {"lambda": 0x3BB, "rho": 0x3C1, "eta": 0x3B7, "Omega": 0x3A9}.items()},
    "b1": "β₁",
    "b2": "β₂",
}


def on_config(config: Any) -> Any:
    """Put the pages into the navigation."""
    for entry in config["nav"]:
        if "Methods" in entry:
            entry["Methods"] = navigation()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to the files of the site."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def navigation() -> list[Any]:
    """Return the pages as mkdocs lists them: rows that repeat an earlier one with other moments apart."""
    first: dict[Any, str] = {}
    for name, row in METHODS.items():
        first.setdefault((row.subspace, row.reconstruction, row.paper, repr(row.defaults)), name)
    main = [name for name in METHODS if name in first.values()]
    other = [name for name in METHODS if name not in main]
    return [
        f"{FOLDER}/index.md",
        {"Options": f"{FOLDER}/options.md"},
        *(f"{FOLDER}/{name}.md" for name in main),
        {"With other moments": [f"{FOLDER}/{name}.md" for name in other]},
    ]


def pages() -> dict[str, str]:
    """Return the text of every generated page by its path."""
    made = {f"{FOLDER}/{name}.md": page(name) for name in METHODS}
    return {f"{FOLDER}/index.md": index(), f"{FOLDER}/options.md": options(), "references.md": references(), **made}


def index() -> str:
    """Return the page with the table of all methods."""
    linked = re.sub(r"^\| `(\w+)`", r"| [`\1`](\1.md)", tables.table(), flags=re.M)
    return f"""---
hide: [toc]
---

# Methods

A method is a subspace (where the moments live), moments (which running statistics) and a reconstruction (how the step
of the whole matrix follows). Each row below is a choice for `--optim`, and exists also with `_8bit` (moments in 8-bit
blocks), `_layerwise` (gradients freed during backward) and `_8bit_layerwise`.

m is a matrix's short side, n its long one, r the rank. State is counted in numbers of 32 bits, AdamW's would be 2mn;
counters, what is kept for the log, and the scales of quantised formats come on top. Four formulas
are those of a weight with at least as many outputs as inputs: `full_normuon` and `full_adam_mini` keep a number for
every output, `muon_4bit` for every input, and Adam-mini in a subspace, of a weight with fewer outputs, r in the place
of n. An index of `grass_adamw` is counted as one number, and has 64 bits. Embeddings, norms, biases and the
output head take the same moments' rule with no subspace: AdamW for `..._adamw`; rates and rules of their own are
[options](../trainer.md#embeddings-head-and-vectors). transformers' own `galore_adamw` and
`apollo_adamw` are left as they are. [Choosing a method](../choosing.md) says what to take, [Options](options.md) what
can be set.

{linked}

## What that is in MiB

Optimizer state of one {WIDE[0]} x {WIDE[1]} matrix at rank {RANK} (or the method's own, where it has one), moments in
fp32 and in 8-bit. AdamW in fp32 takes {ADAMW:.0f} MiB.

{_sizes(METHODS)}
"""


def options() -> str:
    """Return the page with the options of all methods, by the part that has them."""
    return f"""# Options

`--optim_args key=value,key=value`, or keyword arguments in Python. An option belongs to a part, so that a method has
the options of its three parts and the common ones; each [method's page](index.md) lists just these. Where defaults
differ, the methods are named. An unknown option is an error that names the nearest one, a bad value one that says what
is valid.

`learning_rate`, `weight_decay` (on the parameters where Trainer puts it), `adam_beta1`, `adam_beta2`, `adam_epsilon`,
`max_grad_norm` and the schedule are Trainer's own arguments and reach every group. `optim_target_modules` chooses the
matrices (a regular expression, or names separated by commas); by default every linear layer, Conv1D and stacked expert
weight of the model's body whose short side is above the rank.

{tables.options_tables().replace("### ", "## ")}
"""


def references() -> str:
    """Return the page with the papers, and the methods that follow each of them."""
    followed: dict[str, list[str]] = {number: [] for number in papers.TITLES}
    for name, row in METHODS.items():
        made = resolve.parts(name, {})
        for number in papers.of(row.paper, made.subspace, made.moments, made.reconstruction):
            followed.setdefault(number, []).append(f"[`{name}`]({FOLDER}/{name}.md)")
    lines = ["| arXiv | title | methods |", "|---|---|---|"]
    for number, names in sorted(followed.items()):
        lines.append(f"| [{number}]({papers.url(number)}) | {papers.title(number)} | {', '.join(names)} |")
    table = "\n".join(lines)
    return f"""# References

{table}

A method's page says what its parts take from a paper, to the equation, and where they differ from the authors' code.
The model card that a run writes has the entries to cite; `CITATION.cff` says how to cite this package.
"""


def page(name: str) -> str:
    """Return the page of one method."""
    row = METHODS[name]
    made = resolve.parts(name, {})
    summary = row.summary[0].upper() + row.summary[1:]
    state = tables.state(resolve.Config.of(name, {}))
    described = "\n\n".join(_part(kind, getattr(made, kind)) for kind in registry.KINDS)
    paper = "" if row.paper in ("", "-") else f"Paper: {papers.linked(row.paper)}. "
    return f"""# {name}

{summary}. {paper}State per m x n matrix at rank r (m <= n): `{state}`.

{_use(name)}

What happens at a step is the same for all methods (see [Adding a method](../adding.md#the-step)): R = PᵀG, the moments
turn R into a direction N, the reconstruction turns N into the step U. G is the gradient seen short side first, P the
basis. This method fills in three parts.

{described}

## State

{_sizes([name])}

For one {WIDE[0]} x {WIDE[1]} matrix; AdamW in fp32 takes {ADAMW:.0f} MiB. Parameters that have no subspace keep full
moments, unless they have [another rule](../trainer.md#embeddings-head-and-vectors).

## Options

{_options(name)}

## In the log

{_gauges(name)}

## What it cannot do

{_limits(name)}
"""


def _use(name: str) -> str:
    """Return how it is started, and the same in plain PyTorch."""
    own = METHODS[name].defaults.get("rank")
    chosen = {"subspace": "i3s", "moments": "adafactor", "reconstruction": "fira"} if METHODS[name].free else {}
    given: dict[str, Any] = {"rank": 8 if own is None else own, **chosen}
    if "total_steps" in resolve.complete(name, {}):
        given["total_steps"] = 1000
    options = ", ".join(f"{key}={value!r}" for key, value in given.items()).replace("'", '"')
    assignments = {"rank": 128 if own is None else own, **chosen}
    flags = " --optim_args " + ",".join(f"{key}={value}" for key, value in assignments.items())
    return f"""``` {{.sh .no-run}}
python -m hf_lowrank run_clm.py --optim {name}{flags} ...
```

```python
import torch
import hf_lowrank

model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 64))
groups = hf_lowrank.param_groups(model, {options})
optimizer = hf_lowrank.LowRankOptimizer(groups, "{name}", lr=1e-3)
model(torch.randn(8, 64)).square().mean().backward()
optimizer.step()
```"""


def _part(kind: str, part: Any) -> str:
    """Return the section on one part: its docstring, the first paragraph of which is the equation."""
    names = [name for name, cls in type(part).registry.items() if cls is type(part)] or [type(part).__name__]
    text = inspect.cleandoc(type(part).__doc__ or "")
    equation, *rest = re.split(r"\n\s*\n", text)
    body = "\n\n".join(_paragraph(paragraph) for paragraph in rest)
    shown = _pretty(" ".join(equation.replace("`", "").split()).replace("; ", ";\n"))
    return f"## {kind.capitalize()}: {names[0]}\n\n``` {{.text .equation}}\n{shown}\n```\n\n{body}"


def _paragraph(text: str) -> str:
    """Turn a paragraph of a docstring into Markdown."""
    heads = ("References:", "Differs from the authors' code:", "State:")
    items = [" ".join(item.split()) for item in re.split(r"(?:^|\n)\* ", text)]
    text = "\n".join([items[0], *(f"* {item}" for item in items[1:])]).strip()
    for head in heads:
        text = re.sub(rf"^{head}", f"**{head}**", text)
    outside = re.split(r"(`[^`]*`)", text)
    return papers.linked("".join(piece if piece.startswith("`") else _pretty(piece) for piece in outside))


def _pretty(text: str) -> str:
    """Write Greek letters and signs as such."""
    for word, symbol in SYMBOLS.items():
        text = re.sub(rf"(?<![A-Za-z_]){word}(?![A-Za-z0-9])", symbol, text)
    for signs, symbol in {"||": "‖", "<-": "←", "^T": "ᵀ", "^2": "²", "^-1": "⁻¹"}.items():
        text = text.replace(signs, symbol)
    return text


def _options(name: str) -> str:
    """Return the options as a table for each of the parts that have some."""
    shown = (f"**{group.title}**\n\n{tables.options_table(group)}" for group in tables.option_groups([name]))
    return "\n\n".join(shown) + "\n\nLearning rate, betas, epsilon and weight decay are Trainer's own arguments."


def _gauges(name: str) -> str:
    """Return what the method's parts add to the log, as they declare it."""
    gauges = resolve.Config.of(name, {}).gauges
    lines = [f"* `lowrank/{key}`: {gauge.help}" for key, gauge in gauges.items()]
    return "\n".join(lines) or "What [every method](../trainer.md#what-you-see) has."


def _limits(name: str) -> str:
    """Return what is refused, asked of the parts themselves."""
    row, made = METHODS[name], resolve.parts(name, {})
    found = []
    if row.limits.startswith("several"):
        found.append(f"{row.limits[0].upper()}{row.limits[1:]}: see [Resume and scale-out](../scale.md#fsdp2).")
    if made.needs_gradient:
        found.append(
            "It looks at the whole gradient when it writes the weight. With `_layerwise` and accumulation or clipping "
            "gradients therefore wait in [host memory](../scale.md#layerwise); under DDP `_layerwise` and "
            "`reduce_projected` are refused."
        )
    if missing := made.subspace.without:
        found.append(f"Options without a meaning here, and refused: {', '.join(f'`{key}`' for key in missing)}.")
    if refused := [how for how in registry.TRANSPORTS if how not in made.moments.transports]:
        found.append(f"`on_refresh` cannot be {', '.join(f'`{how}`' for how in refused)} with these moments.")
    if not _accepts(name, proj_type="full"):
        found.append("`proj_type=full` is refused.")
    found.append("FSDP1 and DeepSpeed ZeRO are refused, as for every method.")
    return "\n".join(f"* {line}" for line in found)


def _accepts(name: str, **options: Any) -> bool:
    try:
        resolve.complete(name, options)
    except ValueError:
        return False
    return True


def _sizes(names: Any) -> str:
    """Return the bytes that the parts declare for one matrix, as a table."""
    lines = ["| method | rank | fp32 MiB | 8-bit MiB |", "|---|---:|---:|---:|"]
    for name in names:
        rank = METHODS[name].defaults.get("rank", RANK)
        weight = torch.nn.Parameter(torch.empty(WIDE[1], WIDE[0], device="meta"))
        made = [hf_lowrank.LowRankOptimizer([{"params": [weight], "rank": rank}], name + end) for end in ("", "_8bit")]
        sizes = " | ".join(f"{optimizer.declared_bytes() / 2**20:.2f}" for optimizer in made)
        lines.append(f"| `{name}` | {rank} | {sizes} |")
    return "\n".join(lines)
