"""Our side: a worker that runs the library's own steps on the rows.

    python -m benchmarks.ours --work=DIR --case=CASE [--check]

With --check it measures nothing and leaves what the peer's must agree with in DIR/check.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, ours_check, profile, roofline, rows
from benchmarks.protocol import Channel, peak_bytes
from popi_jax.data.schema import Example
from popi_jax.evaluation import evaluate
from popi_jax.modes import compile as compile_lib
from popi_jax.modes import host_memory, train
from popi_jax.modes import setup as system_lib
from popi_jax.modes.setup import System
from popi_jax.rollout import limits as preflight
from popi_jax.rollout import sampler
from popi_jax.rollout import text as rollout
from popi_jax.rollout.pairs import Item
from popi_jax.rollout.references import References
from popi_jax.training import batches, metrics

Measure = Callable[[], dict[str, Any]]  # One measurement: what it worked through, beside its time.


@dataclasses.dataclass
class Job:
    """What a worker was asked for."""

    case: str
    sizes: cases.Sizes
    work: pathlib.Path
    scratch: pathlib.Path
    rows: dict[str, Any]


def load(job: Job, examples: list[Example], **changes: Any) -> System:
    """The system of the benchmark's config with these keys changed, fitted to the examples as a run's to its data."""
    config = rows.make_config(job.rows["model"], job.sizes)
    config.update_from_flattened_dict(changes)
    return preflight.fit(system_lib.load(config), {"train": examples})


def dpo_system(job: Job, examples: list[Example]) -> System:
    """A system whose generator steps learn from raw signals or summaries in context, as the case says."""
    told = cases.context_kind(job.case)
    return load(
        job,
        examples,
        **{
            "method": {"signals": "raw_signals", "summaries": "oracle"}[told],
            # The peer's reference reads the prompt that its policy reads.
            "objective.reference_context": {"signals": "signals", "summaries": "summary"}[told],
            "lora.rank": job.sizes.lora_rank if cases.is_lora(job.case) else 0,
            "train.users_per_step": job.sizes.pairs,
        },
    )


def told_items(system: System, examples: list[Example]) -> list[Item]:
    """Each example's query with what the config's method tells of its user."""
    told = evaluate.contexts(system, None, examples, jax.random.key(0))
    return [Item(e.queries[0], own[0].text) for e, own in zip(examples, told, strict=True)]


class Steps:
    """The train loop's own parts, step by step: `make_batch`, then the jitted step."""

    def __init__(self, job: Job, system: System, kind: str, examples: list[Example]):
        self.system, self.kind, self.examples = system, kind, examples
        self.state = train.initial_state(system)
        self.fn = train.make_steps(system)[kind]
        self.references = References(system, job.scratch, system.config.eval.users_per_batch)
        self.written = batches.WrittenSummaries(job.scratch / "written.jsonl")
        self.step = 0

    def batch(self) -> Any:
        """This step's batch and counts."""
        arguments = (self.system, self.state, self.examples, self.step, self.kind, self.references, self.written)
        return batches.make_batch(*arguments)

    def __call__(self) -> dict[str, Any]:
        """One step, to its end."""
        batch, counts = self.batch()
        self.state, scalars = self.fn(self.state, self.system.base, batch)
        values = {name: float(value) for name, value in jax.device_get(scalars | counts).items()}
        self.step += 1
        return {"tokens": values["tokens"], "nats": values["nats"]} | {"sample_s": values.get("sample_s")}


def flops(fn: Any, *args: Any, trips: tuple[int, ...] = ()) -> float:
    """FLOPs of the model's products in one call, padding included, nothing that is computed a second time."""
    return compile_lib.products(compile_lib.Program("", fn, args, trips))["model_flops_all_devices"]


def dpo(job: Job) -> tuple[Measure, dict[str, Any]]:
    """A DPO step; the reference's log-probabilities are taken once, before, as for every data set."""
    examples = rows.read_examples(job.rows, "dpo")
    system = dpo_system(job, examples)
    stepper = Steps(job, system, "generator", examples)
    started = time.perf_counter()
    stepper.references.remember(told_items(system, examples))
    setup = {"reference_s": time.perf_counter() - started}
    batch, counts = stepper.batch()
    setup |= {
        "flops": flops(stepper.fn, stepper.state, system.base, batch),
        "filled": float(counts["tokens"]) / batch.rows.tokens_CxL.size,
    }
    return stepper, setup


def sampling(job: Job) -> tuple[Measure, dict[str, Any]]:
    """K summaries of each user; apart from it the prefill, whose time is that of one token."""
    examples = rows.read_examples(job.rows, "sampling")
    system = load(job, examples, **{"train.users_per_step": job.sizes.sampling_users})
    options = rollout.in_training(system.config)
    prefixes = [system.encoder.signals(example) for example in examples]
    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def draw(limit: int) -> rollout.Drawn:
        return rollout.draw_text(system, None, prefixes, next(keys), options, branches=job.sizes.k, max_tokens=limit)

    def measure() -> dict[str, Any]:
        drawn = rollout.draw_summaries(system, None, examples, next(keys), options, k=job.sizes.k)
        length_BxN = drawn.samples.length_BxN
        return {"items": int(length_BxN.sum()), "decode_steps": int(length_BxN.max()) - 1}

    line, counted = draw(1), system.policy.config
    drawn_prefix = (line.prefix_BxT, line.prefix_length_B)
    static: dict[str, Any] = {"policy": system.policy, "branches": job.sizes.k, "temperature": 1.0, "top_p": 1.0}
    static |= {"stop_ids": tuple(job.rows["stop_ids"]), "pad_id": job.rows["pad_id"], "max_tokens": job.sizes.summary}
    fn = jax.jit(lambda *args: rollout.draw(*args, **static))

    def products(trips: tuple[int, ...]) -> float:
        return flops(fn, system.base, None, *map(jnp.asarray, drawn_prefix), jax.random.key(0), trips=trips)

    turns = sampler.turns(job.sizes.summary)
    prefill = products((0,) * len(turns))
    n, kv = counted.n_layers, 2 * counted.n_kv_heads * counted.head_dim * 4
    B, T = line.prefix_BxT.shape
    weights = sum(x.nbytes for x in jax.tree.leaves(system.base))
    return measure, {
        "prefill_s": roofline.best_seconds(lambda: draw(1), least_s=0),
        "prefill_flops": prefill,
        "decode_flops": (products(turns) - prefill) / sum(turns),  # Of one step.
        # What a step cannot do without: every weight, and the keys and values of prefix and, on average, half the text.
        "decode_bytes": weights + n * kv * B * (T + job.sizes.k * job.sizes.summary // 2),
        "filled": float(line.prefix_length_B.sum() / line.prefix_BxT.size),
    }


def evaluation(job: Job) -> tuple[Measure, dict[str, Any]]:
    """`evaluate.evaluate` on raw signals, the reference shown the same; its values are forgotten each time."""
    examples = rows.read_examples(job.rows, "evaluation")
    system = load(job, examples, **{"method": "raw_signals", "objective.reference_context": "signals"})
    theta = train.initial_state(system).theta
    calls = iter(range(10_000))

    def measure() -> dict[str, Any]:
        references = References(system, job.scratch / f"references{next(calls)}", job.sizes.evaluation_batch)
        records = evaluate.evaluate(system, None, theta, examples, references, 0)
        return {"margin": float(np.mean([record.h for record in records]))}

    return measure, {}


def popi_iteration(job: Job) -> tuple[Measure, dict[str, Any]]:
    """A joint step: sample, reward, update both models."""
    examples = rows.read_examples(job.rows, "popi")
    system = load(job, examples, **{"train.users_per_step": job.sizes.popi_users})
    stepper = Steps(job, system, "joint", examples)
    started = time.perf_counter()
    stepper.references.remember([Item(e.queries[0], None) for e in stepper.examples])
    return stepper, {"reference_s": time.perf_counter() - started}


def scaling(job: Job) -> tuple[Measure, dict[str, Any]]:
    """A joint step for one user with more signals, or with more summaries for that user or the POPI iteration's."""
    name, _, size = job.case.partition(":")
    sizes = job.sizes
    changes: dict[str, Any] = {} if name == "scaling_signals" else {"sampling.k": int(size)}
    if name == "scaling_k":
        changes |= {"train.users_per_step": sizes.popi_users}
        examples = rows.read_examples(job.rows, "popi")
    else:
        longest = json.loads((pathlib.Path(job.rows["model"]) / "config.json").read_text())["max_position_embeddings"]
        limit = min(int(size) if name == "scaling_signals" else sizes.long_signals, longest - sizes.summary)
        changes |= {"train.users_per_step": 1, "model.remat": "dots", "limits.signals": limit}
        examples = rows.long_signals(job.rows["model"], sizes, limit, 1)
    system = load(job, examples, **changes)
    stepper = Steps(job, system, "joint", examples)
    stepper.references.remember([Item(e.queries[0], None) for e in examples])
    tokens = [len(system.encoder.signals(example)) for example in examples]
    return stepper, {
        "signal_tokens": float(np.mean(tokens)),
        "k": system.config.sampling.k,
        # Padding included; to hold the time's growth against.
        "update_flops": flops(stepper.fn, stepper.state, system.base, stepper.batch()[0]),
    }


def measure_roofline(job: Job) -> tuple[Measure, dict[str, Any]]:
    """Not a case to compare: what the others are held against."""
    return lambda: roofline.with_jax(job.sizes.matmul, job.sizes.copy_mb), {}


PREPARE: dict[str, Callable[[Job], tuple[Measure, dict[str, Any]]]] = {
    "roofline": measure_roofline,
    **dict.fromkeys(cases.DPO, dpo),
    "sampling": sampling,
    "evaluation": evaluation,
    "popi_iteration": popi_iteration,
    **dict.fromkeys(("scaling_signals", "scaling_k", "scaling_k_long"), scaling),
}


def one_turn(measure: Measure) -> dict[str, Any]:
    """One measurement, and how long it took.

    It is taken again where something was compiled in it, for texts that are drawn may be of a length that comes for the
    first time; where that comes three times over, the last is taken, and `compile_s` says what it holds.
    """
    for _ in range(3):
        compiling = metrics.CompileClock()
        started = time.perf_counter()
        values = measure()
        turn = {"seconds": time.perf_counter() - started, **values, "compile_s": compiling.seconds()}
        if turn["compile_s"] == 0:
            break
    return turn


def main() -> None:
    """Serves the driver, or writes the check."""
    host_memory.keep()  # As every command of ours does.
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--case", required=True)
    parser.add_argument("--check", action="store_true")
    flags = parser.parse_args()
    channel = Channel()
    started = time.perf_counter()
    given = json.loads((flags.work / "rows.json").read_text(encoding="utf-8"))
    given_sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given["sizes"].items()}
    sizes = cases.Sizes(**given_sizes)
    job = Job(flags.case, sizes, flags.work, flags.work / "ours" / flags.case.replace(":", "_"), given)
    job.scratch.mkdir(parents=True, exist_ok=True)
    if flags.check:
        ours_check.write(job)
        channel.ready()
        channel.end()
        return
    compiling = metrics.CompileClock()
    measure, setup = PREPARE[job.case.partition(":")[0]](job)
    setup["load_s"] = time.perf_counter() - started
    started = time.perf_counter()
    first = measure()
    setup |= {"warmup_s": time.perf_counter() - started, "compile_s": compiling.seconds()}
    channel.ready(**setup, first=first)
    while channel.wait():
        channel.done(**one_turn(measure))
    last: dict[str, Any] = {"peak_bytes": peak_bytes()}  # Before the profile, which is no part of the work.
    if job.case != "roofline":
        last["profile"] = profile.where(measure)
    channel.end(**last)


if __name__ == "__main__":
    main()
