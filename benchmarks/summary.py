"""Rows, a table and a plot from measurements. Ratios compare neighbouring turns of one run."""

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
    """Median, smallest and largest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def side(ready: Mapping[str, Any], turns: Sequence[Mapping[str, Any]], end: Mapping[str, Any], items: float) -> dict:
    """One side of a case.

    Args:
        ready: the worker's first event, with its setup.
        turns: its measurements.
        end: its last event.
        items: how much one measurement works through; 0 if each measurement says so.
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
    """Our rate over theirs, turn by turn, and our memory over theirs."""
    return {
        "speed": spread([a / b for a, b in zip(ours["rates"], theirs["rates"], strict=True)]),
        "memory": ours["peak_bytes"] / theirs["peak_bytes"],
    }


def best_roofline(turns: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The highest rates of several measurements."""
    return {name: max(turn[name] for turn in turns) for name in ("flops", "copy_bytes")}


def roofline_fractions(ours: Mapping[str, Any], peak: Mapping[str, float]) -> dict[str, float]:
    """The shares of the measured roofline that our side reaches; {} for cases whose work isn't known."""
    before, seconds = ours["before"], ours["seconds_spread"]["median"]
    if "flops" in before:  # A generator step.
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


def times(speed: Mapping[str, float], digits: int = 2) -> str:
    """A median with its smallest and largest value."""
    return "{median:.{n}f} [{low:.{n}f}, {high:.{n}f}]".format(**speed, n=digits)


HEADERS = "case,peer,ours,theirs,times,ours GiB,theirs GiB,share,compile s,roofline,agrees".split(",")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A comparison as a line of the table."""
    if "ours" not in row:
        return (row["case"], row["peer"], row["note"], *[""] * 8)

    def rate(one: Mapping[str, Any]) -> str:
        return f"{one['rate_spread']['median']:.3g} {row['unit']}/s"

    ours = row["ours"]
    fractions = ", ".join(f"{name} {value:.0%}" for name, value in row["roofline"].items())
    if "theirs" in row:
        theirs = row["theirs"]
        middle = (rate(theirs), times(row["speed"]), _gib(ours), _gib(theirs), f"{row['memory']:.2f}")
    else:
        middle = (row["note"], "", _gib(ours), "", "")
    agrees = {True: "yes", False: "NO", None: ""}[row.get("agreement", {}).get("agrees")]
    compile_s = f"{ours['before'].get('compile_s', 0):.1f}"
    return (row["case"], row["peer"], rate(ours), *middle, compile_s, fractions, agrees)


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
        grown = [f"{now / then:.2f}" for now, then in zip(sizes, before.get(kind, ()), strict=False)] or ["", ""]
        before[kind] = sizes
        spread_text = f"[{seconds['low']:.2f}, {seconds['high']:.2f}]"
        middle = (f"{known['signal_tokens']:.0f}", str(known["k"]), f"{seconds['median']:.2f}", spread_text, *grown)
        table.append((row["case"], *middle, _gib(ours), f"{known['compile_s']:.1f}"))
    return table


PROFILE_HEADERS = ("case", "products", "copies", "arithmetic", "the largest parts", "XLA busy")


def profile_cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Where our side's time goes in each case, from the first row that has a profile."""
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
    """All results of a run, as markdown."""
    machine, scaled = results["machine"], [row for row in results["rows"] if row["case"].startswith("scaling")]
    compared = [row for row in results["rows"] if row not in scaled and row["case"] != "roofline"]
    malloc = " ".join(f"{name}={value}" for name, value in results["malloc"].items())
    parts = [
        f"{machine['cpu']} ({', '.join(machine['instructions']) or 'instructions unknown'}), {machine['cores']} cores,"
        f" {machine['memory_gib']} GiB, {machine['dtype']};"
        f" {results['model']}, {results['data']} rows; load before: {machine['load_before'][0]}",
        f"malloc, on all sides: {malloc or 'its defaults'}",
    ]
    for name, peak in results["roofline"].items():
        parts.append(f"{name}: {peak['flops'] / 1e9:.0f} GFLOP/s, copy {peak['copy_bytes'] / 1e9:.1f} GB/s")
    if compared:
        parts.append(markdown(HEADERS, [cells(row) for row in compared]))
    if scaled:
        parts.append(markdown(SCALING_HEADERS, scaling_cells(scaled)))
    if profiled := profile_cells(results["rows"]):
        parts += ["Where our side's time goes, as shares of what XLA executes:", markdown(PROFILE_HEADERS, profiled)]
    parts += [f"left out: {text}" for text in results["left_out"]]
    return "\n\n".join(parts) + "\n"


def _ratios(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that compare a case with a peer."""
    return [row for row in results["rows"] if "speed" in row and row["case"] != "roofline"]


def short(results: Mapping[str, Any]) -> str:
    """README's table of a run: our rate and our memory over the peer's."""
    rows = [(row["case"], row["peer"], times(row["speed"], 1), f"{row['memory']:.2f}") for row in _ratios(results)]
    return markdown(("case", "beside", "times its rate", "share of its memory"), rows)


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Plots the speed of each case, and how the time grows with signals and with summaries."""
    figure, (bars, signals, summaries) = pyplot.subplots(1, 3, figsize=(15, 4.5), width_ratios=(2, 1, 1))
    if compared := _ratios(results):
        names = [f"{row['case']} / {row['peer']}" for row in compared]
        middle, low, high = ([row["speed"][part] for row in compared] for part in ("median", "low", "high"))
        errors = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
        bars.barh(names, middle, xerr=errors, color="tab:blue", ecolor="black")
        bars.invert_yaxis()
    bars.axvline(1, color="black", linewidth=0.8)
    bars.set_xlabel("times the peer's rate (median, smallest and largest turn)")
    _growth(signals, results, ("scaling_signals",), "signal_tokens", "tokens of signals")
    _growth(summaries, results, ("scaling_k", "scaling_k_long"), "k", "K, summaries per user")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _growth(axes: Axes, results: Mapping[str, Any], kinds: Sequence[str], key: str, name: str) -> None:
    """Seconds over a size, beside a line of linear growth."""
    axes.set_xlabel(name)
    axes.set_ylabel("seconds per iteration")
    for kind in kinds:
        rows = [row for row in results["rows"] if row["case"].partition(":")[0] == kind and "ours" in row]
        if not rows:
            continue
        x = [row["ours"]["before"][key] for row in rows]
        y = [row["ours"]["seconds_spread"]["median"] for row in rows]
        label = f"{rows[0]['ours']['before']['signal_tokens']:.0f} tokens of signals" if key == "k" else "measured"
        (line,) = axes.loglog(x, y, "o-", label=label)
        axes.loglog(x, [y[0] * value / x[0] for value in x], "--", color=line.get_color(), alpha=0.5, label="if linear")
        axes.set_xticks(x, [f"{value:.0f}" for value in x])
        axes.minorticks_off()
        axes.legend(fontsize="small")
