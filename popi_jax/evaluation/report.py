"""What a run found, for people: report.html, the same plots as PNG, and the results table on the terminal.

The page needs nothing but itself: no script, no font, no link to elsewhere.
"""

import html
import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from popi_jax.errors import UserError
from popi_jax.evaluation import plots
from popi_jax.evaluation.plots import Summary
from popi_jax.modes import runfiles
from popi_jax.training import metrics

_CSS = pathlib.Path(__file__).parents[1] / "assets" / "report.css"
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
    "Brackets: 95% bootstrap intervals over test prompts or users, averaged over seeds. POPI minus this: percentage"
    " points, paired by test row. I(o; z): the population generator's loss minus the loss with this context, an"
    " estimate of what it tells of the preference."
)


def write(workdir: pathlib.Path) -> None:
    """Writes report.html and its plots from the results.json, samples.jsonl and metrics.jsonl that `workdir` holds.

    What is not there is left out. Raises UserError for a file that is not JSON.
    """
    results = _read_json(workdir / "results.json")
    environment = _read_json(workdir / "environment.json")
    summaries = plots.summarize(results["rows"]) if results else []
    samples = runfiles.read_jsonl(workdir / "samples.jsonl")
    figures = {
        "results": plots.results_figure(summaries) if len(summaries) > 1 else None,
        "personas": plots.personas_figure(summaries),
        "curves": plots.curves_figure(metrics.read_metrics(workdir)),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        figure.savefig(workdir / f"{name}.png", dpi=160)
    svgs = {name: _svg(figure) for name, figure in drawn.items()}
    page = _page(results or {}, environment or {}, summaries, samples, svgs)
    (workdir / "report.html").write_text(page, encoding="utf-8")


def print_table(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Prints the rows of a results.json as a table, one line per method."""
    summaries = plots.summarize(rows)
    shown = [place for place, name in enumerate(COLUMNS) if any(_cells(s)[place] for s in summaries)]
    table = Table(header_style="dim", box=None, pad_edge=False)
    for place in shown:
        table.add_column(COLUMNS[place], justify="right" if place else "left", no_wrap=place == 0)
    for s in summaries:
        table.add_row(*(_cells(s)[place] for place in shown), style="bold" if s.method == "popi" else None)
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=200)  # A log file has no width to keep to.
    console.print(table)


def _cells(s: Summary) -> tuple[str, ...]:
    """The cells of COLUMNS; "" where the method has no such figure."""

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


def _page(
    results: Mapping[str, Any],
    environment: Mapping[str, Any],
    summaries: Sequence[Summary],
    samples: Sequence[Mapping[str, Any]],
    svgs: Mapping[str, str],
) -> str:
    name = _text(results["config"]) if results else "run"
    dataset = f"{_text(results['dataset'])}, {_text(results['split'])} split" if results else "no results yet"
    parts = [f"<header><h1>{name}</h1><p>POPI on {dataset}</p></header>", _tiles(summaries)]
    if summaries:
        parts.append("<h2>Results</h2>")
        parts += [_card(svgs["results"])] if "results" in svgs else []
        parts.append(f'<div class="card">{_table(summaries)}</div>')
        parts.append(f'<p class="note">{_text(NOTE)}</p>')
    if "personas" in svgs:
        parts += ["<h2>Accuracy per persona</h2>", _card(svgs["personas"])]
    if "curves" in svgs:
        parts += ["<h2>Training</h2>", _card(svgs["curves"])]
    if samples:
        parts += ["<h2>Samples</h2>", *map(_sample, samples)]
    parts.append(_footer(environment))
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: POPI</title>\n<style>\n{_CSS.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def _tiles(summaries: Sequence[Summary]) -> str:
    """The few figures that a reader wants first."""
    by_method = {s.method: s for s in summaries}
    popi = by_method.get("popi") or (summaries[0] if len(summaries) == 1 else None)
    if popi is None:
        return ""
    interval = "" if popi.interval is None else ", 95% interval {:.1%} to {:.1%}".format(*popi.interval)
    tiles = [("hero", f"{popi.accuracy:.1%}", f"{popi.label} test accuracy{interval}")]
    zero_shot = by_method.get("zero_shot_summary")
    if zero_shot is not None and zero_shot is not popi:
        gain = 100 * (popi.accuracy - zero_shot.accuracy)
        tiles.append(("", f"{gain:+.1f}", "points against the summary of the untrained model"))
    if popi.context_tokens is not None:
        tiles.append(("", f"{popi.context_tokens:,.0f}", "tokens of context per prompt"))
        if popi.raw_signal_tokens and 0 < popi.context_tokens < popi.raw_signal_tokens:
            ratio = popi.raw_signal_tokens / popi.context_tokens
            tiles.append(("", f"{ratio:,.1f}×", f"shorter than the raw signals ({popi.raw_signal_tokens:,.0f} tokens)"))
    cells = "".join(f'<div class="tile {kind}"><b>{value}</b><span>{what}</span></div>' for kind, value, what in tiles)
    return f'<div class="tiles">{cells}</div>'


def _table(summaries: Sequence[Summary]) -> str:
    rows = [_cells(s) for s in summaries]
    shown = [place for place in range(len(COLUMNS)) if any(row[place] for row in rows)]
    head = "".join(f"<th>{_text(COLUMNS[place])}</th>" for place in shown)
    lines = []
    for s, row in zip(summaries, rows, strict=True):
        cells = [s.label, *(row[place] for place in shown if place > 0)]
        # The interval, smaller than the figure that it belongs to.
        cells = [re.sub(r" (\[.*\])$", r"<small>\1</small>", _text(cell)) for cell in cells]
        kind = ' class="hero"' if s.method == "popi" else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _sample(sample: Mapping[str, Any]) -> str:
    """One line of samples.jsonl: what was inferred of a user, and the responses. Empty fields are left out."""
    persona = f'<p class="persona">True persona: {_text(sample["persona"])}</p>' if sample.get("persona") else ""
    inferred = ""
    if sample.get("summary"):
        inferred = f'<div class="summary"><span class="label">Inferred summary</span>{_text(sample["summary"])}</div>'
    answers = []
    for title, key, logp in (
        ("Generated response", "response", None),
        ("Preferred by the user", "chosen", "logp_chosen"),
        ("Not preferred", "rejected", "logp_rejected"),
    ):
        if sample.get(key):
            cost = (
                f"<small>log-probability {sample[logp]:,.1f}</small>" if logp and sample.get(logp) is not None else ""
            )
            text = f'<div class="text">{_text(sample[key])}</div>'
            answers.append(f'<div><span class="label">{title}</span>{text}{cost}</div>')
    prompt = signals = ""
    if sample.get("prompt"):
        text = f'<div class="text">{_text(sample["prompt"])}</div>'
        prompt = f'<div class="prompt"><span class="label">Prompt</span>{text}</div>'
    if sample.get("signals"):
        tokens = f" ({sample['signal_tokens']:,} tokens)" if "signal_tokens" in sample else ""
        signals = (
            f"<details><summary>The user's signals{tokens}</summary>"
            f'<div class="text">{_text(sample["signals"])}</div></details>'
        )
    return (
        f'<article class="sample"><h3>User {_text(sample["user"])}</h3>{persona}{inferred}'
        f'{prompt}<div class="answers">{"".join(answers)}</div>{signals}</article>'
    )


def _footer(environment: Mapping[str, Any]) -> str:
    if not environment:
        return ""
    devices, packages = environment["devices"], environment["packages"]
    commit = f", commit {environment['git'][:12]}" if environment["git"] else ""
    line = (
        f"popi_jax {environment['popi_jax']}{commit}; JAX {packages['jax']}, Flax {packages['flax']};"
        f" {devices['count']} x {devices['kind']}; {environment['started']}"
    )
    return f"<footer>{_text(line)}</footer>"


def _card(svg: str) -> str:
    return f'<div class="card">{svg}</div>'


def _svg(figure: Figure) -> str:
    """The figure as an svg element: without the prologue and the metadata, which name other places."""
    out = io.StringIO()
    with plots.style():
        figure.savefig(out, format="svg", transparent=True)
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # An HTML parser knows both.
    return text.replace("xlink:href", "href")


def _text(value: object) -> str:
    return html.escape(str(value))


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove the file and run again") from error
