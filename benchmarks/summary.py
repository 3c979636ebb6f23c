"""From measurements to rows, a table and a plot. Ratios are of one run's turns: ours and theirs, in alternation."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

GIB = 2**30


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def side(ready: Mapping[str, Any], turns: Sequence[Mapping[str, Any]], end: Mapping[str, Any], items: float) -> dict:
    """One side of a case.

    Args:
        ready: the worker's "ready": what loading and warming up took, and what else it knows.
        turns: its measurements.
        end: its last word.
        items: what one measurement works through; 0 where each says so itself.
    """
    rates = [(items or turn["items"]) / turn["seconds"] for turn in turns]
    return {
        "seconds": [turn["seconds"] for turn in turns],
        "seconds_spread": spread([turn["seconds"] for turn in turns]),
        "rates": rates,
        "rate_spread": spread(rates),
        "peak_bytes": end["peak_bytes"],
        "before": {key: value for key, value in ready.items() if key != "event"},
        "turns": [{key: value for key, value in turn.items() if key != "event"} for turn in turns],
    } | {key: end[key] for key in ("profile",) if key in end}


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """How many times as fast we are, turn by turn, and our memory as a share of theirs."""
    return {
        "speed": spread([a / b for a, b in zip(ours["rates"], theirs["rates"], strict=True)]),
        "memory": ours["peak_bytes"] / theirs["peak_bytes"],
    }


def best_roofline(turns: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The highest rates of several measurements."""
    return {name: max(turn[name] for turn in turns) for name in ("flops", "copy_bytes")}


def roofline_fractions(ours: Mapping[str, Any], peak: Mapping[str, float]) -> dict[str, float]:
    """The share of the measured roofline that a case reaches, for those whose work is known."""
    before, seconds = ours["before"], ours["seconds_spread"]["median"]
    if "flops" in before:  # A generator step: all products, and the share of them that is on tokens, not on padding.
        reached = before["flops"] / seconds / peak["flops"]
        return {"step": reached, "step on tokens": reached * before["filled"]}
    if "prefill_flops" not in before:
        return {}
    steps = statistics.median(turn["decode_steps"] for turn in ours["turns"])
    reached = before["prefill_flops"] / before["prefill_s"] / peak["flops"]
    fractions = {"prefill": reached, "prefill on tokens": reached * before["filled"]}
    if steps > 0 and seconds > before["prefill_s"]:
        step_s = (seconds - before["prefill_s"]) / steps
        fractions["decode, copy rate"] = before["decode_bytes"] / step_s / peak["copy_bytes"]
        fractions["decode, products"] = before["decode_flops"] / step_s / peak["flops"]
    return fractions


HEADERS = (
    "case",
    "peer",
    "ours",
    "theirs",
    "times",
    "ours GiB",
    "theirs GiB",
    "share",
    "compile s",
    "roofline",
    "agrees",
)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A comparison as the table shows it."""
    if "ours" not in row:
        return (row["case"], row["peer"], row["note"], *[""] * 8)
    ours, theirs, unit = row["ours"], row.get("theirs"), row["unit"]

    def rate(one: Mapping[str, Any]) -> str:
        return f"{one['rate_spread']['median']:.3g} {unit}/s"

    fractions = ", ".join(f"{name} {value:.0%}" for name, value in row["roofline"].items())
    common = (f"{ours['before'].get('compile_s', 0):.1f}", fractions)
    if theirs is None:
        return (row["case"], row["peer"], rate(ours), row["note"], "", _gib(ours), "", "", *common, "")
    speed = row["speed"]
    return (
        row["case"],
        row["peer"],
        rate(ours),
        rate(theirs),
        f"{speed['median']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]",
        _gib(ours),
        _gib(theirs),
        f"{row['memory']:.2f}",
        *common,
        {True: "yes", False: "NO", None: ""}[row.get("agreement", {}).get("agrees")],
    )


def _gib(one: Mapping[str, Any]) -> str:
    return f"{one['peak_bytes'] / GIB:.2f}"


SCALING_HEADERS = (
    "case",
    "signal tokens",
    "K",
    "s/iteration",
    "spread",
    "times the one before",
    "update's FLOPs, times the one before",
    "GiB",
    "compile s",
)


def scaling_cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The scaling runs, each beside the one before it of the same kind."""
    table: list[tuple[str, ...]] = []
    before: dict[str, tuple[float, float]] = {}
    for row in rows:
        kind = row["case"].partition(":")[0]
        if "ours" not in row:
            table.append((row["case"], "", "", row["note"], *[""] * 5))
            continue
        ours, known = row["ours"], row["ours"]["before"]
        seconds = ours["seconds_spread"]
        sizes = (seconds["median"], known["update_flops"])
        grown = (
            [f"{now / then:.2f}" for now, then in zip(sizes, before[kind], strict=True)] if kind in before else [""] * 2
        )
        before[kind] = sizes
        spread_text = f"[{seconds['low']:.2f}, {seconds['high']:.2f}]"
        middle = (f"{known['signal_tokens']:.0f}", str(known["k"]), f"{seconds['median']:.2f}", spread_text, *grown)
        table.append((row["case"], *middle, _gib(ours), f"{known['compile_s']:.1f}"))
    return table


PROFILE_HEADERS = ("case", "products", "copies", "arithmetic", "the largest parts", "XLA busy")


def profile_cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Where the time of our side of each case goes, from the first of its rows that says so."""
    found = {row["case"]: row["ours"]["profile"] for row in reversed(rows) if "profile" in row.get("ours", {})}
    table = []
    for case, profile in reversed(found.items()):
        kinds = [f"{profile['kinds'].get(kind, 0):.0%}" for kind in PROFILE_HEADERS[1:4]]
        parts = sorted(profile["parts"].items(), key=lambda item: -item[1])[:5]
        largest = ", ".join(f"{name} {share:.0%}" for name, share in parts)
        table.append((case, *kinds, largest, f"{profile['busy']:.0%}"))
    return table


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(line) + " |" for line in (headers, ["---"] * len(headers), *rows)]
    return "\n".join(lines)


def table(results: Mapping[str, Any]) -> str:
    """All that a run found, as markdown."""
    machine, scaled = results["machine"], [row for row in results["rows"] if row["case"].startswith("scaling")]
    compared = [row for row in results["rows"] if row not in scaled and row["case"] != "roofline"]
    parts = [
        f"{machine['cpu']} ({', '.join(machine['instructions']) or 'instructions unknown'}), {machine['cores']} cores,"
        f" {machine['memory_gib']} GiB, {machine['dtype']};"
        f" {results['model']}, {results['data']} rows; load before: {machine['load_before'][0]}"
    ]
    for name, peak in results["roofline"].items():
        parts.append(f"{name}: {peak['flops'] / 1e9:.0f} GFLOP/s, copy {peak['copy_bytes'] / 1e9:.1f} GB/s")
    if compared:
        parts.append(markdown(HEADERS, [cells(row) for row in compared]))
    if scaled:
        parts.append(markdown(SCALING_HEADERS, scaling_cells(scaled)))
    if profiled := profile_cells(results["rows"]):
        parts += ["Where our time goes, of what XLA executes:", markdown(PROFILE_HEADERS, profiled)]
    parts += [f"left out: {text}" for text in results["left_out"]]
    return "\n\n".join(parts) + "\n"


def short(results: Mapping[str, Any]) -> str:
    """What README shows of a run: how many times a peer's rate, and our memory beside its."""
    rows = []
    for row in results["rows"]:
        if "speed" in row and row["case"] != "roofline":
            speed = row["speed"]
            times = f"{speed['median']:.1f} [{speed['low']:.1f}, {speed['high']:.1f}]"
            rows.append((row["case"], row["peer"], times, f"{row['memory']:.2f}"))
    return markdown(("case", "beside", "times its rate", "share of its memory"), rows)


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """How many times as fast, case by case, and how time grows with signals and summaries."""
    compared = [row for row in results["rows"] if "speed" in row and row["case"] != "roofline"]
    figure, (bars, signals, summaries) = pyplot.subplots(1, 3, figsize=(15, 4.5), width_ratios=(2, 1, 1))
    names = [f"{row['case']} / {row['peer']}" for row in compared]
    middle = [row["speed"]["median"] for row in compared]
    errors = [
        [m - row["speed"]["low"] for m, row in zip(middle, compared, strict=True)],
        [row["speed"]["high"] - m for m, row in zip(middle, compared, strict=True)],
    ]
    if compared:
        bars.barh(names, middle, xerr=errors, color="tab:blue", ecolor="black")
        bars.invert_yaxis()
    bars.axvline(1, color="black", linewidth=0.8)
    bars.set_xlabel("times the peer's rate (median, least and greatest turn)")
    for axes, kinds, key in (
        (signals, ("scaling_signals",), "signal_tokens"),
        (summaries, ("scaling_k", "scaling_k_long"), "k"),
    ):
        for kind in kinds:
            rows = [row for row in results["rows"] if row["case"].partition(":")[0] == kind and "ours" in row]
            if rows:
                _growth(axes, rows, key)
        axes.set_xlabel({"signal_tokens": "tokens of signals", "k": "K, summaries per user"}[key])
        axes.set_ylabel("seconds per iteration")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _growth(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """Seconds over sizes, beside a line that grows as they do."""
    x = [row["ours"]["before"][key] for row in rows]
    y = [row["ours"]["seconds_spread"]["median"] for row in rows]
    label = f"{rows[0]['ours']['before']['signal_tokens']:.0f} tokens of signals" if key == "k" else "measured"
    (line,) = axes.loglog(x, y, "o-", label=label)
    axes.loglog(x, [y[0] * value / x[0] for value in x], "--", color=line.get_color(), alpha=0.5, label="if linear")
    axes.set_xticks(x, [f"{value:.0f}" for value in x])
    axes.minorticks_off()
    axes.legend(fontsize="small")
