"""Writes the results table: in the terminal, and as results.md, results.tex and results.csv."""

import csv
import io
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from popi_jax.data import files
from popi_jax.evaluation import plots, stored
from popi_jax.evaluation.plots import Summary

COLUMNS = (
    "method",
    "accuracy",
    "paper's accuracy",
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

_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
} | {sign: f"\\{sign}" for sign in "{}$&#%_"}


def cells(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Returns the names of the columns that any method fills, and the cells of each method in them."""
    rows = [_cells(s) for s in summaries]
    filled = [any(column) for column in zip(*rows, strict=True)]
    return list(itertools.compress(COLUMNS, filled)), [list(itertools.compress(row, filled)) for row in rows]


def signals_cells(by_count: Mapping[int, Sequence[Summary]]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns, one for each number of signals, and each method's cells: accuracy with its interval."""
    found = {(count, s.method): _accuracy(s) for count, summaries in by_count.items() for s in summaries}
    methods = dict.fromkeys(s.method for summaries in by_count.values() for s in summaries)
    columns = ["method", *(f"{count:,} signal{'s' if count > 1 else ''}" for count in by_count)]
    return columns, [[method, *(found.get((count, method), "") for count in by_count)] for method in methods]


def _accuracy(s: Summary) -> str:
    return f"{s.accuracy:.1%}" + ("" if s.interval is None else " [{:.1%}, {:.1%}]".format(*s.interval))


def _cells(s: Summary) -> tuple[str, ...]:
    """Returns the cells of COLUMNS, "" where the method has no such figure."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    difference = ""
    if s.popi_minus_this is not None:
        mean, low, high = (100 * value for value in s.popi_minus_this)
        difference = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return (
        s.method,
        _accuracy(s),
        "" if s.published is None else f"{s.published:.2f}%",
        difference,
        number(s.context_tokens, ",.1f"),
        number(s.summary_tokens or None, ",.1f"),
        number(s.loss, ".4g"),
        number(s.informativeness, ".3f"),
        number(s.n, ","),
        str(s.seeds),
    )


def published_note(summaries: Sequence[Summary]) -> str:
    """Returns what to say of the paper's accuracies; "" if no method has one."""
    sources = [f"{s.method}: {s.published_source}" for s in summaries if s.published is not None]
    if not sources:
        return ""
    return (
        f"The paper's accuracy is what the paper itself reports ({'; '.join(sources)}), with its own data, weights and"
        " hardware. It was not measured here."
    )


def note(summaries: Sequence[Summary]) -> str:
    """Returns the note under the table."""
    return f"{NOTE} {published_note(summaries)}".strip()


def show(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the tables of a results.json, with one line per method."""
    summaries = plots.summarize(results["rows"])
    console = console or Console(markup=False, emoji=False)
    if not console.is_terminal:  # A log file has no width of its own.
        console = Console(file=console.file, width=200, markup=False, emoji=False)
    for columns, lines in _tables(results, summaries):
        table = Table(header_style="dim", box=None, pad_edge=False)
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left", no_wrap=place == 0)
        for line in lines:
            table.add_row(*line, style="bold" if line[0] == "popi" else None)
        console.print(table)
    if said := published_note(summaries):
        console.print(said, highlight=False)


def _tables(results: Mapping[str, Any], summaries: Sequence[Summary]) -> list[tuple[list[str], list[list[str]]]]:
    """Returns columns and lines of each table: the methods, and their accuracy by number of signals if it is known."""
    by_count = plots.by_signals(results)
    return [cells(summaries), *([signals_cells(by_count)] if by_count else [])]


def write(folder: pathlib.Path) -> None:
    """Writes results.md, results.tex and results.csv from the results.json in `folder`.

    Raises:
        UserError: results.json is damaged.
    """
    results = stored.results(folder)
    assert results is not None, f"{folder} has no results.json"
    for name, form in (("results.md", markdown), ("results.tex", latex)):
        files.write_text(folder / name, form(results))
    files.write_text(folder / "results.csv", separated(results["rows"]))


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the tables of a results.json in GitHub's Markdown, with a title and the note."""
    summaries = plots.summarize(results["rows"])
    parts = [_markdown(_title(results))]
    for columns, lines in _tables(results, summaries):
        rows = [columns, ["---", *["---:"] * (len(columns) - 1)], *([_markdown(line[0]), *line[1:]] for line in lines)]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join([*parts, _markdown(note(summaries))]) + "\n"


def latex(results: Mapping[str, Any]) -> str:
    """Returns the tables of a results.json as tabulars with booktabs rules, with a title and the note."""
    summaries = plots.summarize(results["rows"])
    parts = ["% Needs \\usepackage{booktabs}.\n" + _latex(_title(results))]
    for columns, lines in _tables(results, summaries):
        # A hyphen before a digit is a minus sign.
        rows = [[_latex(line[0]), *(re.sub(r"-(?=\d)", "$-$", _latex(cell)) for cell in line[1:])] for line in lines]
        header, *body = (f"    {' & '.join(row)} \\\\" for row in [[_latex(column) for column in columns], *rows])
        start = rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}"
        rules = [rf"    \{name}rule" for name in ("top", "mid", "bottom")]
        parts.append("\n".join([start, rules[0], header, rules[1], *body, rules[2], r"\end{tabular}"]))
    return "\n\n".join([*parts, rf"{{\footnotesize {_latex(note(summaries))}\par}}"]) + "\n"


def separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of a results.json as CSV (RFC 4180), in all digits. A field without a value is empty.

    A field with an interval becomes two, NAME_low and NAME_high. Other fields with several values are left out.
    """
    lines = [_flat(files.finite(row)) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for line in lines for name in line)))
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list) and len(value) == 2 and not any(isinstance(end, list | dict) for end in value):
            flat |= {f"{name}_low": value[0], f"{name}_high": value[1]}
        elif not isinstance(value, list | dict):
            flat[name] = value
    return flat


def _title(results: Mapping[str, Any]) -> str:
    variant = f" {results['variant']}" if "variant" in results else ""
    return f"Results of {results['config']} on {results['dataset']}{variant}, {results['split']} split."


def _markdown(text: str) -> str:
    """Escapes what Markdown and GitHub would read as markup. Line breaks become spaces."""
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", " ".join(text.split()))


def _latex(text: str) -> str:
    """Escapes what LaTeX would read as commands. Line breaks become spaces."""
    escaped = "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))
    return re.sub(r"^(?=[\[*])", "{}", escaped)  # After a line's end, these would be its arguments.
