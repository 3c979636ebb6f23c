"""What is measured: the cases, and how large they are. Standard library only: workers of both environments read it."""

import dataclasses
from collections.abc import Sequence

DPO = ("dpo_signals", "dpo_summaries", "dpo_signals_lora", "dpo_summaries_lora")
# What a case is compared with. trl_checkpointing is what TRL does unless told otherwise: less memory, more time.
# tunix_micro is for machines that cannot hold Tunix's whole batch (XLA plans 22 GiB of temporaries for dpo_signals, and
# its rematerialisation saves next to nothing on the CPU): one pair at a time, gradients accumulated.
DPO_PEERS = ("trl", "trl_precomputed", "trl_checkpointing", "tunix", "tunix_micro")
PEERS: dict[str, tuple[str, ...]] = {
    "roofline": ("torch",),
    **dict.fromkeys(DPO, DPO_PEERS),
    "sampling": ("transformers", "tunix"),
    "evaluation": ("trl", "tunix"),
    "popi_iteration": ("trl", "trl_precomputed", "tunix"),
}
CASES = (*PEERS, "scaling_signals", "scaling_k", "scaling_k_long")
# What both sides of a row take together at `Sizes()`, where that is more than many machines have.
_NEEDS_GIB = dict.fromkeys((("dpo_signals", "tunix"), ("dpo_signals_lora", "tunix")), 28)
# GiB below which both sides of a row fit only if each, once measured, gives freed memory back.
GIVE_BACK_BELOW = {("popi_iteration", "tunix"): 32}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the cases are; lengths in tokens.

    Attributes:
        repeats: measurements of each side; `long_repeats` of cases that take minutes each.
        pairs: in a DPO step.
        pair_tokens: of a prompt with the raw signals and its longer response.
        question, response: of synthetic texts, on average.
        signals: of each user: `sampling_signals` and `popi_signals` are what the prompt with them takes.
        micro_pairs: of the peer, in a micro-batch of the POPI iteration: 16 at once would not fit a small machine.
        scaling_signals, scaling_k: what ours is measured at; of the case scaling_k_long, whose K are scaling_k's,
            `long_signals` is what its one user's signals take.
        matmul, copy_mb: of the roofline: width of the square matrices, size of the array.
        limits: of config.limits.
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


def expand(cases: Sequence[str], sizes: Sizes, largest_signals: int) -> tuple[list[str], list[str]]:
    """The runs of these cases, those that scale as one for each size; and what is left out, in words."""
    runs, left_out = [], []
    for case in cases:
        if case == "scaling_signals":
            for size in sizes.scaling_signals:
                if size > largest_signals:
                    left_out.append(f"scaling_signals at {size} tokens: --largest_signals is {largest_signals}")
                else:
                    runs.append(f"{case}:{size}")
        elif case == "scaling_k_long" and sizes.long_signals > largest_signals:
            left_out.append(f"{case} at {sizes.long_signals} tokens: --largest_signals is {largest_signals}")
        elif case in ("scaling_k", "scaling_k_long"):
            runs += [f"{case}:{k}" for k in sizes.scaling_k]
        else:
            runs.append(case)
    return runs, left_out


def repeats(case: str, sizes: Sizes) -> int:
    """How many measurements a case gets."""
    long = case in ("evaluation", "popi_iteration") or case.startswith("scaling")
    return min(sizes.repeats, sizes.long_repeats) if long else sizes.repeats


def needs_gib(case: str, peer: str, sizes: Sizes) -> float:
    """The memory without which a row is not worth starting; 0 where any will do."""
    return _NEEDS_GIB.get((case, peer), 0) if sizes.pair_tokens >= Sizes().pair_tokens else 0


def worker(peer: str) -> str:
    """The module whose worker serves a peer."""
    return "tunix_peer" if peer.startswith("tunix") else "trl_peer"


def is_lora(case: str) -> bool:
    """Whether a DPO case trains adapters."""
    return case.endswith("_lora")


def context_kind(case: str) -> str:
    """What the generator is told in a DPO case: "signals" or "summaries"."""
    return case.removesuffix("_lora").removeprefix("dpo_")


def items(case: str, sizes: Sizes) -> tuple[float, str]:
    """How many of what one measurement works through, for rates; of sampling each measurement says itself."""
    if case in DPO:
        return sizes.pairs, "pairs"
    if case == "evaluation":
        return sizes.evaluation_pairs, "pairs"
    if case == "sampling":
        return 0, "tokens"
    return 1, "iterations"
