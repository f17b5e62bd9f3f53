"""The HTML page: no script, nothing loaded from anywhere; light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import median

from hf_lowrank import __version__
from hf_lowrank.observe.report import curves
from hf_lowrank.observe.report.figures import Figure
from hf_lowrank.observe.report.runs import Run


NOTHING = "–"
"""In the table: not known."""

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1b1f; --soft: #5b5f66; --line: #d9dce1; --note: #fff6e5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171b; --ink: #e8e9ec; --soft: #a5abb5; --line: #363a42; --note: #33291a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: var(--page); color: var(--ink);
       font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.05rem; margin: 0 0 .25rem; }
p, figcaption, footer { color: var(--soft); } figcaption, footer, td, th { font-size: .875rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; min-width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; } td:first-child { font-weight: 600; }
.problems { background: var(--note); border-radius: .5rem; padding: .6rem 1rem .6rem 2rem; overflow-wrap: anywhere; }
.figures { columns: 23rem; column-gap: 1.5rem; margin: 1.5rem 0; }
figure { margin: 0 0 1.5rem; padding: 1rem; border: 1px solid var(--line); border-radius: .5rem; break-inside: avoid; }
@media (max-width: 40rem) { body { padding: .5rem; } figure { padding: .5rem; } }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
"""


def render(runs: Sequence[Run], figures: Sequence[Figure], problems: Sequence[str]) -> str:
    """Return the page."""
    title = f"Runs: {', '.join(run.name for run in runs)}"
    parts = [f"<h1>{escape(title)}</h1>", _table(runs)]
    if problems:
        parts.append(f'<ul class="problems">{"".join(f"<li>{escape(text)}</li>" for text in problems)}</ul>')
    if not figures:
        parts.append("<p>There is nothing to draw yet.</p>")
    parts.append(f'<main class="figures">{"".join(map(_figure, figures))}</main>')
    parts.append(f"<footer>hf_lowrank {__version__}. Every figure is also a PNG file beside this page.</footer>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _table(runs: Sequence[Run]) -> str:
    rows = summary_rows(runs)
    head = "".join(f"<th>{escape(key)}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(figure: Figure) -> str:
    svg = figure.svg.replace("<svg ", f'<svg role="img" aria-label="{escape(figure.title, quote=True)}" ', 1)
    return (
        f'<figure id="{figure.name}"><h2>{escape(figure.title)}</h2>{svg}'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def summary_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the numbers of the page's table, one row per run, without columns that no run fills."""
    metrics = dict.fromkeys(name for run in runs for name in run.metrics())
    rows = [_row(run, list(metrics)) for run in runs]
    optional = ["perplexity", *map(curves.named, metrics)]
    empty = [key for key in optional if all(row[key] == NOTHING for row in rows)]
    return [{key: value for key, value in row.items() if key not in empty} for row in rows]


def _row(run: Run, metrics: Sequence[str]) -> dict[str, str]:
    """Return one run's numbers."""
    training, validation = run.curve("loss"), run.curve("eval_loss")
    best = min((y for _, y in validation), default=None)
    state = run.curve("lowrank/state_mib")
    times = [float(s["ms"]) for s in run.steps]
    measured, sessions = run.measured(), [y for _, y in run.curve("train_runtime")]
    seconds = max(y for _, y in measured) if measured else sum(sessions) if sessions else None
    found = run.metrics()
    return {
        "run": run.name,
        "optimizer": run.optimizer,
        "rank": NOTHING if run.rank is None else f"{run.rank:g}",
        "steps": f"{run.last_step:.0f}",
        "training loss": _number(training[-1][1] if training else None),
        "best validation loss": _number(best),
        "perplexity": _number(None if best is None or not run.language_model else curves.perplexity(best)),
        **{curves.named(name): _number(found[name][-1][1] if name in found else None) for name in metrics},
        "state, MiB": _number(state[-1][1] if state else None),
        "ms per step": f"{median(times):.3g}" if times else NOTHING,
        "seconds": _number(seconds),
    }


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.4g}"
