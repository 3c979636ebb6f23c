"""Draws the report's figures: comparisons of methods, by persona and number of signals too, and training curves."""

import contextlib
import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.colors
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Method -> label. Tables and figures keep this order.
METHODS = {
    "base": "Base model",
    "population": "Population",
    "raw_signals": "Raw signals",
    "zero_shot_summary": "Zero-shot summary",
    "inference_only": "Inference only",
    "generator_only": "Generator only",
    "popi_joint": "POPI, joint",
    "popi_two_phase": "POPI, two phases",
    "popi_alternate": "POPI, alternating",
    "popi": "POPI",
    "oracle": "Oracle persona",
    "bayes_signals": "Bayes given signals",
    "bayes_persona": "Bayes given persona",
}
HERO, INK, MUTED, GRID = "#2457d6", "#1d2433", "#7b8496", "#e4e7ee"
LINES = (HERO, "#d97706")  # Colour-blind readers can tell blue from amber.
MARKERS = "osD^vPX*<>"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.hashsalt": "popi",  # A fixed salt makes the ids in an SVG file reproducible.
}
# Panels of the curves: (title, ((metric, legend label), ...)).
PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", (("loss", "training"), ("eval_loss", "test"))),
    ("Accuracy", (("accuracy", "training"), ("eval_accuracy", "test"))),
    ("Reward", (("reward", "mean over summaries"),)),
    ("KL of q to its reference (nats per summary)", (("kl", "training"),)),
    ("Summary length (tokens)", (("summary_tokens", "training"), ("eval_summary_tokens_mean", "test"))),
    ("Spread of the K rewards per user", (("reward_std", "standard deviation"),)),
    ("Share of their variance that is due to the summary", (("reward_share", "share"),)),
    ("Signal to noise of the inference model's gradient", (("grad_snr", "ratio"),)),
    ("Different summaries among a user's K", (("summaries_distinct", "share"),)),
    ("Users with a summary to imitate", (("imitated", "share"),)),
    (
        "Test accuracy told something else",
        (("eval_accuracy_persona", "the persona"), ("eval_accuracy_nothing", "nothing")),
    ),
    ("Gradient norm", (("grad_norm_inference", "inference"), ("grad_norm_generator", "generator"))),
    ("Largest gap between sampler and trainer log-probs", (("sampler_gap_max", "gap"),)),
)


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of one method, averaged over its seeds. None marks a figure that a row lacks.

    Attributes:
        seeds: number of runs.
        n: number of test rows.
        accuracy: mean over seeds.
        interval: (low, high), each averaged over the seeds' 95% intervals. More seeds do not narrow it, because every
            seed is tested on the same users.
        per_seed: accuracy of each seed.
        context_tokens: tokens of context per prompt, mean over test rows and seeds.
        summary_tokens: tokens of summary per prompt, 0 for a method without summaries.
        raw_signal_tokens: tokens of the user's raw signals, mean over test rows and seeds.
        loss: test loss.
        informativeness: estimate of I(o; z) in nats.
        popi_minus_this: (difference, low, high): POPI's accuracy minus this method's, with its paired 95% interval.
        by_persona: persona -> accuracy.
        published: the paper's accuracy in percent, see `evaluation.published`.
        published_source: the paper.
    """

    method: str
    seeds: int
    n: int | None
    accuracy: float
    interval: tuple[float, float] | None
    per_seed: tuple[float, ...]
    context_tokens: float | None
    summary_tokens: float | None
    raw_signal_tokens: float | None
    loss: float | None
    informativeness: float | None
    popi_minus_this: tuple[float, float, float] | None
    by_persona: Mapping[str, float]
    published: float | None
    published_source: str | None

    @property
    def label(self) -> str:
        """The method's display name."""
        return METHODS.get(self.method, self.method)


def style() -> contextlib.AbstractContextManager[None]:
    """Returns the style context in which figures are drawn and saved as SVG."""
    return matplotlib.rc_context(STYLE)


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Groups rows of results.json, one per method and seed, into one Summary per method, in the order of METHODS."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    order = {method: place for place, method in enumerate(METHODS)}
    return [_summary(m, by_method[m]) for m in sorted(by_method, key=lambda m: order.get(m, len(order)))]


def by_signals(results: Mapping[str, Any]) -> dict[int, list[Summary]]:
    """Returns the Summaries of each number of signals in a results.json, fewest first; {} if it has none."""
    rows = results.get("by_signals", [])
    return {
        count: summarize([r for r in rows if r["signals"] == count]) for count in sorted({r["signals"] for r in rows})
    }


def _summary(method: str, rows: Sequence[Mapping[str, Any]]) -> Summary:
    interval = (_mean(rows, "accuracy_ci95", 0), _mean(rows, "accuracy_ci95", 1))
    difference = (
        _mean(rows, "popi_minus_this"),
        _mean(rows, "popi_minus_this_ci95", 0),
        _mean(rows, "popi_minus_this_ci95", 1),
    )
    personas = sorted({name for row in rows for name in row.get("accuracy_by_persona") or {}})
    by_persona = {name: _mean([row["accuracy_by_persona"] for row in rows], name) for name in personas}
    return Summary(
        method=method,
        seeds=len(rows),
        n=rows[0].get("n"),
        accuracy=float(np.mean([row["accuracy"] for row in rows])),
        interval=None if None in interval else interval,  # type: ignore[arg-type]
        per_seed=tuple(row["accuracy"] for row in rows),
        context_tokens=_mean(rows, "context_tokens_mean"),
        summary_tokens=_mean(rows, "summary_tokens_mean"),
        raw_signal_tokens=_mean(rows, "raw_signal_tokens_mean"),
        loss=_mean(rows, "loss"),
        informativeness=_mean(rows, "informativeness_nats"),
        popi_minus_this=None if None in difference else difference,  # type: ignore[arg-type]
        by_persona={name: value for name, value in by_persona.items() if value is not None},
        published=_mean(rows, "published_accuracy"),
        published_source=rows[0].get("published_source"),
    )


def _mean(rows: Sequence[Mapping[str, Any]], key: str, index: int | None = None) -> float | None:
    """Returns the mean of `key` over the rows, or None if any row lacks it (a Bayes row has no tokens)."""
    values = [row.get(key) for row in rows]
    if index is not None:
        values = [value[index] if value else None for value in values]
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if len(known) == len(rows) else None


def results_figure(summaries: Sequence[Summary]) -> Figure:
    """Draws accuracy with its 95% interval per method (left) and accuracy against context tokens (right)."""
    with style():
        costs = [s for s in summaries if s.context_tokens is not None]
        figure = Figure(figsize=(10.5, 1.5 + 0.36 * max(len(summaries), 5)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _accuracy_axes(left, summaries)
        _cost_axes(right, costs)
    return figure


def _accuracy_axes(axes: Axes, summaries: Sequence[Summary]) -> None:
    for y, s in enumerate(summaries):
        color = HERO if s.method == "popi" else INK
        if s.interval is not None:
            axes.plot(s.interval, [y, y], color=color, linewidth=2.2, alpha=0.45, solid_capstyle="round")
        if s.seeds > 1:
            axes.plot(s.per_seed, [y] * s.seeds, "|", color=color, markersize=9, alpha=0.8)
        axes.plot(s.accuracy, y, "o", color=color, markersize=6.5)
        axes.annotate(
            f"{s.accuracy:.1%}", (1.02, y), xycoords=("axes fraction", "data"), va="center", color=color, fontsize=9
        )
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    axes.set_yticks(range(len(summaries)), [s.label for s in summaries])
    for tick, s in zip(axes.get_yticklabels(), summaries, strict=True):
        tick.set_color(HERO if s.method == "popi" else INK)
        tick.set_fontweight("bold" if s.method == "popi" else "normal")
    axes.set_ylim(len(summaries) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_title("Test accuracy, 95% interval", pad=10)


def _cost_axes(axes: Axes, summaries: Sequence[Summary]) -> None:
    # Base and population cost 0 tokens, which a log scale cannot show. Symlog can.
    axes.set_xscale("symlog", linthresh=4, linscale=0.5)
    seen: list[tuple[float, float]] = []
    for s in sorted(summaries, key=lambda s: s.accuracy):
        hero = s.method == "popi"
        assert s.context_tokens is not None
        axes.plot(s.context_tokens, s.accuracy, "o", color=HERO if hero else INK, markersize=8 if hero else 6)
        # Labels of methods with nearly the same cost and accuracy would overlap, so later ones move up.
        near = sum(abs(x - s.context_tokens) < 0.5 * x + 2 and abs(y - s.accuracy) < 0.012 for x, y in seen)
        seen += [] if hero else [(s.context_tokens, s.accuracy)]
        axes.annotate(
            s.label,
            (s.context_tokens, s.accuracy),
            xytext=(-9, 0) if hero else (8, 11 * near),  # POPI's label goes left, clear of the nearby oracle.
            textcoords="offset points",
            ha="right" if hero else "left",
            va="center",
            fontsize=8.5,
            color=HERO if hero else INK,
            fontweight="bold" if hero else "normal",
        )
    most = max((s.context_tokens or 0 for s in summaries), default=1)
    axes.set_xlim(-0.6, max(most, 4) * 6)  # Room for the rightmost label.
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.margins(y=0.12)
    axes.set_xlabel("context tokens per prompt (log scale)")
    axes.set_title("Test accuracy against context tokens", pad=10)


def personas_figure(summaries: Sequence[Summary]) -> Figure | None:
    """Draws a heat map of accuracy per persona and method. Returns None if no row has accuracy per persona."""
    summaries = [s for s in summaries if s.by_persona]
    if not summaries:
        return None
    names = sorted({name for s in summaries for name in s.by_persona})
    value_PxS = np.array([[s.by_persona.get(name, np.nan) for s in summaries] for name in names])
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(10.5, 0.9 + 0.42 * len(names)), layout="constrained")
        axes = figure.subplots()
        shades = matplotlib.colors.LinearSegmentedColormap.from_list("accuracy", ["#ffffff", "#dbe6fd", "#5b85e8"])
        axes.imshow(value_PxS, cmap=shades, vmin=0.4, vmax=1.0, aspect="auto")
        for (y, x), value in np.ndenumerate(value_PxS):
            axes.text(x, y, "" if np.isnan(value) else f"{value:.0%}", ha="center", va="center", fontsize=9)
        axes.set_xticks(range(len(summaries)), [s.label.replace(" ", "\n", 1) for s in summaries], color=INK)
        wrapped = [textwrap.fill(textwrap.shorten(name, 120, placeholder="…"), 64) for name in names]
        axes.set_yticks(range(len(names)), wrapped, fontsize=8.5, parse_math=False)  # A persona may contain $ signs.
        axes.tick_params(axis="y", labelcolor=INK)
        axes.xaxis.tick_top()
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def signals_figure(by_count: Mapping[int, Sequence[Summary]]) -> Figure | None:
    """Draws accuracy with its 95% interval against the number of signals, a line per method. None without numbers."""
    if not by_count:
        return None
    lines: dict[str, list[tuple[int, Summary]]] = {}
    for count, summaries in by_count.items():
        for s in summaries:
            lines.setdefault(s.method, []).append((count, s))
    with style():
        figure = Figure(figsize=(10.5, 4), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        for place, (method, points) in enumerate(lines.items()):
            accuracy = np.array([s.accuracy for _, s in points])
            ends_2xP = np.array([s.interval or (np.nan, np.nan) for _, s in points]).T
            aside = 2 ** (0.03 * (place - (len(lines) - 1) / 2))  # The methods' intervals would hide each other.
            axes.errorbar(
                [count * aside for count, _ in points],
                accuracy,
                yerr=np.abs(ends_2xP - accuracy),
                fmt=f"{MARKERS[place % len(MARKERS)]}-",
                color=HERO if method == "popi" else (LINES[1], INK, MUTED)[place % 3],
                label=points[0][1].label,
                alpha=0.8,
            )
        axes.set_xticks(list(by_count), [f"{count:,}" for count in by_count])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        axes.margins(x=0.08)
        axes.grid(axis="x", visible=False)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8.5)
        axes.set_xlabel("signals per user (log scale)")
        axes.set_title("Test accuracy by number of signals, 95% interval", pad=10)
    return figure


def curves_figure(lines: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draws one panel for each entry of PANELS that the lines of metrics.jsonl cover. Returns None if there is none.

    Training steps are a faint line under their moving mean. Evaluations are dots.
    """
    lines = with_ratios(lines)
    panels = [
        (title, present)
        for title, names in PANELS
        if (present := [pair for pair in names if any(line.get(pair[0]) is not None for line in lines)])
    ]
    if not panels:
        return None
    rows = math.ceil(len(panels) / 2)
    with style():
        figure = Figure(figsize=(10.5, 2.35 * rows), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, names) in zip(grid.flat, panels, strict=False):
            for color, (name, label) in zip(LINES, names, strict=False):
                known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                steps, values = map(np.asarray, zip(*known, strict=True))
                if name.startswith("eval_"):
                    axes.plot(steps, values, "o-", color=color, linewidth=1, markersize=4, label=label)
                else:
                    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.28)
                    axes.plot(steps, moving_mean(values), color=color, linewidth=1.8, label=label)
            if "accuracy" in dict(names) or "eval_accuracy" in dict(names):
                axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
            if len(names) > 1:
                axes.legend(loc="best", fontsize=8.5)
            axes.grid(axis="x", visible=False)
            axes.margins(x=0.01)
            axes.set_xlabel("step")
            axes.set_title(title)
    return figure


def with_ratios(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Adds reward_share and grad_snr to the lines that have their parts.

    They are ratios of moving means. The ratio of a single step's noisy estimates would be biased.
    """
    out = [dict(line) for line in lines]
    for name, over, under, less in (
        ("reward_share", "reward_noise", "reward_variance", True),
        ("grad_snr", "grad_signal_inference", "grad_noise_inference", False),
    ):
        own = [line for line in out if line.get(over) is not None and line.get(under) is not None]
        parts = [moving_mean(np.array([line[key] for line in own])) for key in (over, under)]
        for line, a, b in zip(own, *parts, strict=True):
            if b > 0:
                line[name] = 1 - a / b if less else a / b
    return out  # type: ignore[return-value]


def moving_mean(values: np.ndarray) -> np.ndarray:
    """Returns the exponential moving mean over about 1/25 of the points, bias-corrected (Kingma and Ba 2015)."""
    decay = 1 - 1 / max(1.0, len(values) / 25)
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + (1 - decay) * float(value), decay * weight + (1 - decay)
        out.append(total / weight)
    return np.array(out)
