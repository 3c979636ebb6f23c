"""Presents the results of a run: report.html, its plots as PNG files, and the results table in the terminal."""

import io
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from popi_jax.data import files
from popi_jax.evaluation import plots, stored
from popi_jax.evaluation.plots import Summary
from popi_jax.training import metrics

COLUMNS = (
    "method",
    "accuracy",
    "POPI minus this",
    "context tokens",
    "summary tokens",
    "loss",
    "I(o; z), nats",
    "n",
    "seeds",
)

NOTE = (
    "Brackets hold 95% bootstrap intervals over test prompts or users, averaged over seeds. POPI minus this is in"
    " percentage points and paired by test row. I(o; z) is the population generator's loss minus the loss with this"
    " context. It estimates how much the context tells about the preference."
)

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
    figures = {
        "results": plots.results_figure(summaries) if len(summaries) > 1 else None,
        "personas": plots.personas_figure(summaries),
        "curves": plots.curves_figure(metrics.read_metrics(workdir)),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        png = io.BytesIO()
        figure.savefig(png, dpi=160)
        files.write_bytes(workdir / f"{name}.png", png.getvalue())
    columns, rows = _table(summaries)
    page = _TEMPLATES.get_template("report.html").render(
        results=results,
        environment=stored.environment(workdir),
        tiles=_tiles(summaries),
        columns=columns,
        rows=list(zip(summaries, rows, strict=True)),
        note=NOTE,
        samples=stored.samples(workdir),
        svgs={name: _svg(figure) for name, figure in drawn.items()},
    )
    files.write_text(workdir / "report.html", page)


def print_table(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints the rows of a results.json as a table with one line per method."""
    columns, lines = _table(plots.summarize(rows))
    table = Table(header_style="dim", box=None, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=place == 0)
    for line in lines:
        table.add_row(*line, style="bold" if line[0] == "popi" else None)
    console = console or Console(markup=False, emoji=False)
    if not console.is_terminal:  # A log file has no width of its own.
        console = Console(file=console.file, width=200, markup=False, emoji=False)
    console.print(table)


def _table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Returns the names of the columns that any method fills, and the cells of each method in them."""
    rows = [_cells(s) for s in summaries]
    filled = [any(column) for column in zip(*rows, strict=True)]
    return list(itertools.compress(COLUMNS, filled)), [list(itertools.compress(row, filled)) for row in rows]


def _cells(s: Summary) -> tuple[str, ...]:
    """Returns the cells of COLUMNS, "" where the method has no such figure."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    accuracy = f"{s.accuracy:.1%}" + ("" if s.interval is None else " [{:.1%}, {:.1%}]".format(*s.interval))
    difference = ""
    if s.popi_minus_this is not None:
        mean, low, high = (100 * value for value in s.popi_minus_this)
        difference = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return (
        s.method,
        accuracy,
        difference,
        number(s.context_tokens, ",.1f"),
        number(s.summary_tokens or None, ",.1f"),
        number(s.loss, ".4g"),
        number(s.informativeness, ".3f"),
        number(s.n, ","),
        str(s.seeds),
    )


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


def _svg(figure: Figure) -> str:
    """Returns the figure as an svg element, without the prologue and the metadata, which link to other sites."""
    out = io.StringIO()
    with plots.style():
        figure.savefig(out, format="svg", transparent=True)
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML parsers know both namespaces.
    return text.replace("xlink:href", "href")
