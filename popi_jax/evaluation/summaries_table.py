"""The report's table of what the methods' summaries are like, from the field `summaries` of a results.json's rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from popi_jax.evaluation import faithfulness, naming, plots, summaries

NOTE = (
    "Of the test users' summaries, averaged over seeds. Words per summary: the mean, and the 5% and 95% quantiles in"
    " parentheses. Own pairs predicted: the share of the preference pairs among a user's signals that the generator"
    f" gets right from the summary alone, for the first {faithfulness.USERS} users who have pairs, with its 95%"
    " interval over users. Names the user's persona: how often the summary makes the user's own persona likelier, to"
    " the untrained model, by a larger factor than the persona of another test user, for the first"
    f" {naming.USERS} users; 50% for summaries that say nothing of the user. Copied run: the longest run of words that"
    " also stands in the user's signals; the mean, and the most in any summary. Copied number: any number of the"
    " user's signals. Copied name: a capitalised word within a sentence that stands in the user's signals and not in"
    " the instruction. Words in common: of the words in either of two summaries of a user, the share that is in both."
    " Equal decisions: the share of test triples on which all summaries of the user decide alike."
)


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]] | None:
    """Returns the columns, one for each method that writes summaries, and the lines; None without such a method.

    A line without any figure is left out, for example the comparison of a user's summaries if each user has one.
    """
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("summaries"):
            by_method.setdefault(row["method"], []).append(row["summaries"])
    methods = sorted(by_method, key=lambda method: [*plots.METHODS, method].index(method))
    columns = [_column(by_method[method]) for method in methods]
    if not columns:
        return None
    lines = [[label, *(column[label] for column in columns)] for label in columns[0]]
    return ["", *(plots.METHODS.get(method, method) for method in methods)], [line for line in lines if any(line[1:])]


def _column(seeds: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns a method's cells by their label, "" where a seed lacks the figure."""

    def cell(form: str, *paths: str) -> str:
        means = [_mean([_at(seed, path) for seed in seeds]) for path in paths]
        return "" if None in means else form.format(*means)

    faithful = cell("{:.1%}", "faithfulness.accuracy")
    faithful += cell(" [{:.1%}, {:.1%}]", "faithfulness.accuracy_ci95.0", "faithfulness.accuracy_ci95.1")
    named = cell("{:.1%}", "naming.share") + cell(" [{:.1%}, {:.1%}]", "naming.share_ci95.0", "naming.share_ci95.1")
    lengths = [f"summary_length.{name}" for name in ("mean", "q05", "q95")]
    return {
        "Words per summary": cell("{:,.1f} ({:,.0f} to {:,.0f})", *lengths),
        "Different summaries": cell(
            "{:,.0f} of {:,.0f}", "summaries_distinct.distinct", "summaries_distinct.summaries"
        ),
        "Different summaries per user": cell("{:.2f}", "summaries_distinct.per_user"),
        "Own pairs predicted": faithful,
        "Names the user's persona": named,
        "Copied run, words": cell("{:,.1f}, at most {:,.0f}", "leakage.run_mean", "leakage.run_max"),
        f"With a copied run of {summaries.LONG_RUN} words": cell("{:.1%}", "leakage.long_run_share"),
        "With a copied number": cell("{:.1%}", "leakage.number_share"),
        "With a copied name": cell("{:.1%}", "leakage.name_share"),
        "Words in common": cell("{:.1%}", "stability.jaccard"),
        "Equal decisions": cell("{:.1%}", "stability.agreement"),
    }


def _at(tree: Any, path: str) -> float | None:
    """Returns the entry at a path of keys and indices, None if it is not there."""
    for key in path.split("."):
        if tree is None:
            return None
        tree = tree[int(key)] if isinstance(tree, list) else tree.get(key)
    return tree


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if len(known) == len(values) else None
