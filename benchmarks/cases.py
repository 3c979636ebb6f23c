"""The cases and their sizes. Standard library only, because the workers of every environment import this module."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DPO = ("dpo_signals", "dpo_summaries", "dpo_signals_lora", "dpo_summaries_lora")
# trl_checkpointing has TRL's default gradient checkpointing, which saves memory and costs time; the other variants turn
# it off. tunix_micro takes one pair at a time and accumulates gradients. It is for machines that cannot hold Tunix's
# whole batch: XLA plans 22 GiB of temporaries for dpo_signals, and rematerialisation saves little of it on a CPU.
DPO_PEERS = ("trl", "trl_precomputed", "trl_checkpointing", "tunix", "tunix_micro")
PEERS: dict[str, tuple[str, ...]] = {
    "roofline": ("torch",),
    **dict.fromkeys(DPO, DPO_PEERS),
    "sampling": ("transformers", "tunix"),
    "evaluation": ("trl", "tunix"),
    "popi_iteration": ("trl", "trl_precomputed", "tunix"),
}
CASES = (*PEERS, "scaling_signals", "scaling_k", "scaling_k_long")
# GiB that both sides of a row take together with `Sizes()`, for rows that many machines cannot hold.
_NEEDS_GIB = {("dpo_signals", "tunix"): 28, ("dpo_signals_lora", "tunix"): 28}
# On machines with fewer GiB, both sides of these rows fit only if each returns freed memory while it waits.
GIVE_BACK_BELOW = {("popi_iteration", "tunix"): 32}

# A side calls this after each measurement with the values to record. It returns whether to take another one.
Turn = Callable[[Mapping[str, Any]], bool]
# Takes measurements until its turn returns False. Returns what else to record.
Measure = Callable[[Turn], dict[str, Any]]
# How to measure a case that is loaded, and what to record of loading it.
Prepared = tuple[Measure, dict[str, Any]]
# Numbers and named arrays that both sides must agree on.
Checked = tuple[dict[str, Any], dict[str, Any]]
# How a side prepares and checks each kind of case; some have no check.
Cases = Mapping[str, tuple[Callable[["Job"], Prepared], Callable[["Job"], Checked] | None]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the cases are; lengths in tokens.

    Attributes:
        repeats: measurements of each side; `long_repeats` for cases that take minutes each.
        pairs: pairs in a DPO step.
        pair_tokens: length of a prompt with the raw signals and its longer response.
        question, response: average lengths of synthetic texts.
        sampling_signals, popi_signals: lengths of the prompts that hold a user's signals.
        micro_pairs: pairs in a peer's micro-batch of the POPI iteration; 16 would not fit a small machine.
        scaling_signals: lengths of one user's signals.
        scaling_k: values of K, for scaling_k and scaling_k_long.
        long_signals: length of the signals in scaling_k_long.
        matmul, copy_mb: width of the roofline's square matrices, size of its array in MiB.
        limit_*: the config's limits.
    """

    repeats: int = 5
    long_repeats: int = 3
    pairs: int = 4
    pair_tokens: int = 690
    signals_per_user: int = 4
    question: int = 20
    response: int = 46
    sampling_users: int = 8
    sampling_signals: int = 348
    k: int = 4
    summary: int = 48
    evaluation_pairs: int = 100
    evaluation_batch: int = 8
    popi_users: int = 4
    popi_signals: int = 302
    micro_pairs: int = 4
    scaling_signals: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    scaling_k: tuple[int, ...] = (2, 4, 8, 16)
    long_signals: int = 4096
    matmul: int = 4096
    copy_mb: int = 512
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = ("q", "v")
    beta: float = 0.1
    kl_coef: float = 2e-3
    learning_rate: float = 1e-6
    limit_signals: int = 384
    limit_prompt: int = 768
    limit_response: int = 384
    limit_bin: int = 768


SMALLEST = Sizes(
    repeats=1,
    long_repeats=1,
    pairs=2,
    pair_tokens=150,
    signals_per_user=2,
    question=6,
    response=8,
    sampling_users=2,
    sampling_signals=60,
    k=2,
    summary=6,
    evaluation_pairs=4,
    evaluation_batch=2,
    popi_users=2,
    popi_signals=60,
    micro_pairs=2,
    scaling_signals=(128, 256),
    scaling_k=(2, 4),
    long_signals=128,
    matmul=256,
    copy_mb=4,
    lora_rank=2,
    limit_signals=160,
    limit_prompt=320,
    limit_response=64,
    limit_bin=256,
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One case for one side.

    Attributes:
        case: its name; a scaling case also has its size, after a colon.
        peer: which variant of the peer to measure; "" on our side.
        work: the folder with the run's files.
        rows: what `rows.build` returned.
    """

    case: str
    peer: str
    work: pathlib.Path
    rows: dict[str, Any]
    sizes: Sizes

    @classmethod
    def read(cls, case: str, peer: str, work: pathlib.Path) -> "Job":
        """A job on the rows in the folder."""
        rows = json.loads((work / "rows.json").read_text(encoding="utf-8"))
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in rows["sizes"].items()}
        return cls(case, peer, work, rows, Sizes(**sizes))

    @property
    def kind(self) -> str:
        """The case without its size."""
        return self.case.partition(":")[0]

    @property
    def lora(self) -> bool:
        """Whether the case trains adapters."""
        return self.case.endswith("_lora")

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """The preference pairs of a DPO case or of the evaluation."""
        return self.rows[self.case.removesuffix("_lora")]

    def check_file(self, name: str) -> pathlib.Path:
        """Where a check leaves what the other side or the driver reads."""
        (self.work / "check").mkdir(exist_ok=True)
        return self.work / "check" / f"{self.case}_{name}"


def repeat(measurement: Callable[[], dict[str, Any]], warm_up: Callable[[], Any] | None = None) -> Measure:
    """Takes one measurement after another; `warm_up` replaces the first."""

    def measure(turn: Turn) -> dict[str, Any]:
        wanted = turn((warm_up or measurement)())
        while wanted:
            wanted = turn(measurement())
        return {}

    return measure


def expand(cases: Sequence[str], sizes: Sizes, largest_signals: int) -> tuple[list[str], list[str]]:
    """The runs of these cases, with a run for each size of a scaling case; and notes on the runs left out."""
    runs, left_out = [], []
    for case in cases:
        steps = {"scaling_signals": sizes.scaling_signals}.get(case, sizes.scaling_k)
        for size in steps if case.startswith("scaling") else (0,):
            tokens = {"scaling_signals": size, "scaling_k_long": sizes.long_signals}.get(case, 0)
            if tokens > largest_signals:
                left_out.append(f"{case} at {tokens} tokens: --largest_signals is {largest_signals}")
            else:
                runs.append(f"{case}:{size}" if size else case)
    return runs, list(dict.fromkeys(left_out))


def repeats(case: str, sizes: Sizes) -> int:
    """How many measurements a case gets."""
    long = case in ("evaluation", "popi_iteration") or case.startswith("scaling")
    return min(sizes.repeats, sizes.long_repeats) if long else sizes.repeats


def needs_gib(case: str, peer: str, sizes: Sizes) -> float:
    """The memory that a row needs, GiB; 0 if any machine has enough."""
    return _NEEDS_GIB.get((case, peer), 0) if sizes.pair_tokens >= Sizes().pair_tokens else 0


def side(peer: str) -> str:
    """The module of `sides` that measures a peer."""
    return "tunix" if peer.startswith("tunix") else "trl"


def items(case: str, sizes: Sizes) -> tuple[float, str]:
    """How much one measurement works through, and its unit. 0 for sampling, where each measurement reports it."""
    if case in DPO:
        return sizes.pairs, "pairs"
    if case == "evaluation":
        return sizes.evaluation_pairs, "pairs"
    return (0, "tokens") if case == "sampling" else (1, "iterations")
