"""Presents the results of a run as report.html, with its plots also as PNG files."""

import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from matplotlib.figure import Figure

from popi_jax.data import files
from popi_jax.evaluation import evaluate, plots, stored, summaries_table, tables
from popi_jax.evaluation.plots import Summary
from popi_jax.training import metrics

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("popi_jax", "assets"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


def write(workdir: pathlib.Path) -> None:
    """Writes report.html and its plots from results.json, samples.jsonl, metrics.jsonl and environment.json.

    All files are in `workdir`. The page leaves out the parts whose file is missing.

    Raises:
        UserError: a file is damaged.
    """
    results = stored.results(workdir)
    summaries = plots.summarize(results["rows"]) if results else []
    by_count = plots.by_signals(results or {})
    figures = {
        "results": plots.results_figure(summaries) if len(summaries) > 1 else None,
        "signals": plots.signals_figure(by_count),
        "personas": plots.personas_figure(summaries),
        "curves": plots.curves_figure(metrics.read_metrics(workdir)),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        png = io.BytesIO()
        figure.savefig(png, dpi=160)
        files.write_bytes(workdir / f"{name}.png", png.getvalue())
    page = _TEMPLATES.get_template("report.html").render(
        results=results,
        environment=stored.environment(workdir),
        tiles=_tiles(summaries),
        table=tables.cells(summaries) if summaries else None,
        by_signals=tables.signals_cells(by_count),
        labels=plots.METHODS,
        note=tables.note(summaries),
        written=summaries_table.cells(results["rows"]) if results else None,
        written_note=summaries_table.NOTE,
        samples=stored.samples(workdir),
        users=_users(workdir),
        svgs={name: _svg(figure) for name, figure in drawn.items()},
    )
    files.write_text(workdir / "report.html", page)


def _tiles(summaries: Sequence[Summary]) -> list[tuple[str, str]]:
    """Returns the headline figures, most important first, each with its caption."""
    by_method = {s.method: s for s in summaries}
    popi = by_method.get("popi") or (summaries[0] if len(summaries) == 1 else None)
    if popi is None:
        return []
    interval = "" if popi.interval is None else ", 95% interval {:.1%} to {:.1%}".format(*popi.interval)
    tiles = [(f"{popi.accuracy:.1%}", f"{popi.label} test accuracy{interval}")]
    zero_shot = by_method.get("zero_shot_summary")
    if zero_shot is not None and zero_shot is not popi:
        gain = 100 * (popi.accuracy - zero_shot.accuracy)
        tiles.append((f"{gain:+.1f}", "percentage points relative to the untrained model's summaries"))
    if popi.context_tokens is not None:
        tiles.append((f"{popi.context_tokens:,.0f}", "context tokens per prompt"))
        if popi.raw_signal_tokens and 0 < popi.context_tokens < popi.raw_signal_tokens:
            ratio = popi.raw_signal_tokens / popi.context_tokens
            tiles.append((f"{ratio:,.1f}×", f"shorter than the raw signals ({popi.raw_signal_tokens:,.0f} tokens)"))
    return tiles


def _users(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns what the page shows of each test user: the queries that are ranked as they did, and the mean h."""
    path = workdir / "eval_records.jsonl"
    by_user: dict[str, list[evaluate.Record]] = {}
    for record in evaluate.read_records(path) if path.exists() else []:
        by_user.setdefault(record.user, []).append(record)
    return [
        {
            "user": user,
            "persona": own[0].persona,
            "context": own[0].context or "",
            "right": sum(record.h > 0 for record in own),
            "scored": len(own),
            "h": sum(record.h for record in own) / len(own),
        }
        for user, own in by_user.items()
    ]


def _svg(figure: Figure) -> str:
    """Returns the figure as an svg element, without the prologue and the metadata, which link to other sites."""
    out = io.StringIO()
    with plots.style():
        figure.savefig(out, format="svg", transparent=True)
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML parsers know both namespaces.
    return text.replace("xlink:href", "href")
