"""popi_jax: the library's own steps on the rows.

The check of a case uses the functions that the case measures.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import profile, roofline, rows
from benchmarks.cases import DPO, Checked, Job, Measure, Prepared, Turn, repeat
from popi_jax import batches, evaluate, objective, pairs, preflight, rollout, sampler, steps, train
from popi_jax import compile as compile_lib
from popi_jax import system as system_lib
from popi_jax.data.schema import Example
from popi_jax.model import hub
from popi_jax.pairs import Item
from popi_jax.references import References
from popi_jax.system import System

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Hub names of the projections that carry an adapter.
ADAPTED = {name: f"self_attn.{name}_proj" for name in "qkvo"}
ADAPTED |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def profiled(measurement: Callable[[], dict[str, Any]]) -> Measure:
    """As `repeat`, with a profile of one more measurement at the end."""
    measure = repeat(measurement)

    def then_profile(turn: Turn) -> dict[str, Any]:
        return measure(turn) | {"profile": profile.where(measurement)}

    return then_profile


def load(job: Job, examples: list[Example], **changes: Any) -> System:
    """The system of the benchmark's config with these keys changed, fitted to the examples as a run is to its data."""
    config = rows.make_config(job.rows["model"], job.sizes)
    config.update_from_flattened_dict(changes)
    return preflight.fit(system_lib.load(config), {"train": examples})


def told_items(system: System, examples: list[Example]) -> list[Item]:
    """Each example's query with what the config's method tells about its user."""
    told = evaluate.contexts(system, None, examples, jax.random.key(0))
    return [Item(e.queries[0], own[0].text) for e, own in zip(examples, told, strict=True)]


def bare_items(examples: list[Example]) -> list[Item]:
    """Each example's query alone, as the POPI iteration's reference reads it."""
    return [Item(e.queries[0], None) for e in examples]


class Steps:
    """The parts of the train loop, step by step: `make_batch`, then the jitted step."""

    def __init__(self, job: Job, system: System, kind: str, examples: list[Example]):
        self.system, self.kind, self.examples = system, kind, examples
        scratch = job.work / "ours" / job.case.replace(":", "_")
        self.state = train.initial_state(system)
        self.fn = train.make_steps(system)[kind]
        self.references = References(system, scratch, system.config.eval.users_per_batch)
        self.written = batches.WrittenSummaries(scratch / "written.jsonl")
        self.step = 0

    def batch(self) -> Any:
        """This step's batch and counts."""
        arguments = (self.system, self.state, self.examples, self.step, self.kind, self.references, self.written)
        return batches.make_batch(*arguments)

    def __call__(self) -> dict[str, Any]:
        """A whole step."""
        batch, counts = self.batch()
        self.state, scalars = self.fn(self.state, self.system.base, batch)
        values = {name: float(value) for name, value in jax.device_get(scalars | counts).items()}
        self.step += 1
        return {name: values[name] for name in ("tokens", "nats", "sample_s") if name in values}


def flops(fn: Any, *args: Any, trips: tuple[int, ...] = ()) -> float:
    """FLOPs of the model's products in one call, with padding and without recomputation."""
    return compile_lib.products(compile_lib.Program("", fn, args, trips))["model_flops_all_devices"]


def dpo_steps(job: Job, examples: list[Example]) -> Steps:
    """Generator steps that learn from raw signals or summaries in context, as the case says."""
    signals = "signals" in job.case
    system = load(
        job,
        examples,
        **{
            "method": "raw_signals" if signals else "oracle",
            # The peer's reference reads the prompt that its policy reads.
            "objective.reference_context": "signals" if signals else "summary",
            "lora.rank": job.sizes.lora_rank if job.lora else 0,
            "train.users_per_step": job.sizes.pairs,
        },
    )
    return Steps(job, system, "generator", examples)


def dpo(job: Job) -> Prepared:
    """A DPO step. The reference's log-probabilities are computed once and before, as in a run."""
    examples = rows.read_examples(job.rows, "dpo")
    step = dpo_steps(job, examples)
    started = time.perf_counter()
    step.references.remember(told_items(step.system, examples))
    setup = {"reference_s": time.perf_counter() - started}
    batch, counts = step.batch()
    setup["flops"] = flops(step.fn, step.state, step.system.base, batch)
    setup["filled"] = float(counts["tokens"]) / batch.rows.tokens_CxL.size
    return profiled(step), setup


def check_dpo(job: Job) -> Checked:
    """The loss and its gradient with respect to every trained weight, in the hub's names and shapes."""
    step = dpo_steps(job, rows.read_examples(job.rows, "dpo"))
    system, theta = step.system, step.state.theta
    if job.lora:
        theta = with_noise(theta)
        np.savez(job.check_file("adapter.npz"), **adapter_tensors(system, theta))  # type: ignore[arg-type]
    batch, _ = step.batch()
    gradient = jax.jit(jax.value_and_grad(steps.generator_loss, has_aux=True), static_argnames="settings")
    grads, total, count = jax.tree.map(np.zeros_like, theta), 0.0, 0.0
    for i in range(system.config.train.accumulation_generator):
        micro = jax.tree.map(lambda x, i=i: x[i], batch)
        (_, (_, terms)), own = gradient(theta, system.base, micro, settings=system.settings)
        grads = jax.tree.map(lambda a, b: a + np.asarray(b), grads, own)
        total, count = (a + float(b) for a, b in zip((total, count), terms["nats"], strict=True))
    # Our loss is DPO's divided by beta, so that beta changes no learning rate. The peer's is DPO's.
    scale = np.float32(system.settings.beta / count)
    grads = jax.tree.map(lambda g: g * scale, grads)
    return {"loss": total / count}, adapter_tensors(system, grads) if job.lora else hub_tensors(system, grads)


def with_noise(adapter: Any) -> Any:
    """The adapter with noise. A fresh one has b = 0, which makes the loss log 2 and the gradient of a 0."""
    leaves, treedef = jax.tree.flatten(adapter)
    rng = np.random.default_rng(0)
    noisy = [np.asarray(x) + 0.02 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


def hub_tensors(system: System, tree: Any) -> dict[str, np.ndarray]:
    """A tree of base weights as hub tensors."""
    config = system.policy.config
    tensors: dict[str, np.ndarray] = {}
    for leaf in hub.leaves(config):
        value = tree
        for key in leaf.path:
            value = value[key]
        if leaf.stacked:
            tensors |= {leaf.name.format(i): leaf.to_hub(value[i]) for i in range(config.n_layers)}
        else:
            tensors[leaf.name] = leaf.to_hub(value)
    return tensors


def adapter_tensors(system: System, tree: Any) -> dict[str, np.ndarray]:
    """A tree of adapters in PEFT's names and shapes."""
    rank = system.config.lora.rank
    tensors: dict[str, np.ndarray] = {}
    for target, adapter in tree["layers"].items():
        for i in range(system.policy.config.n_layers):
            name = f"base_model.model.model.layers.{i}.{ADAPTED[target]}"
            tensors[f"{name}.lora_A.weight"] = np.asarray(adapter["a"][i]).reshape(-1, rank).T
            tensors[f"{name}.lora_B.weight"] = np.asarray(adapter["b"][i]).reshape(rank, -1).T
    return tensors


def sampling_system(job: Job) -> tuple[System, list[Example]]:
    """The system and the users that it samples for."""
    examples = rows.read_examples(job.rows, "sampling")
    return load(job, examples, **{"train.users_per_step": job.sizes.sampling_users}), examples


def sampling(job: Job) -> Prepared:
    """K summaries of each user; the setup has the prefill apart, whose time is that of drawing one token."""
    system, examples = sampling_system(job)
    options = rollout.in_training(system.config)
    prefixes = [system.encoder.signals(example) for example in examples]
    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def draw(limit: int) -> rollout.Drawn:
        return rollout.draw_text(system, None, prefixes, next(keys), options, branches=job.sizes.k, max_tokens=limit)

    def measurement() -> dict[str, Any]:
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
    B, T = line.prefix_BxT.shape
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(system.base))
    cache_bytes = counted.n_layers * 2 * counted.n_kv_heads * counted.head_dim * 4  # Of one token.
    return profiled(measurement), {
        "prefill_s": roofline.best_seconds(lambda: draw(1), least_s=0),
        "prefill_flops": prefill,
        "decode_flops": (products(turns) - prefill) / sum(turns),  # Of one step.
        # A step must read every weight, and the keys and values of the prefix and, on average, of half the text.
        "decode_bytes": weight_bytes + cache_bytes * B * (T + job.sizes.k * job.sizes.summary // 2),
        "filled": float(line.prefix_length_B.sum() / line.prefix_BxT.size),
    }


def check_sampling(job: Job) -> Checked:
    """Each prompt with its greedy tokens."""
    system, examples = sampling_system(job)
    options = dataclasses.replace(rollout.in_training(system.config), temperature=0.0)
    samples = rollout.draw_summaries(system, None, examples, jax.random.key(0), options, k=1).samples
    new = [samples.tokens_BxNxS[b, 0, : samples.length_BxN[b, 0]].tolist() for b in range(len(examples))]
    return {"tokens": [system.encoder.signals(e) + row for e, row in zip(examples, new, strict=True)]}, {}


def evaluation_system(job: Job) -> tuple[System, list[Example]]:
    """The system and the examples that it evaluates; policy and reference read the raw signals."""
    examples = rows.read_examples(job.rows, "evaluation")
    return load(job, examples, **{"method": "raw_signals", "objective.reference_context": "signals"}), examples


def evaluation(job: Job) -> Prepared:
    """`evaluate.evaluate`, with the reference's values computed anew each time."""
    system, examples = evaluation_system(job)
    theta = train.initial_state(system).theta
    calls = iter(range(10_000))

    def measurement() -> dict[str, Any]:
        folder = job.work / "ours" / f"references{next(calls)}"
        references = References(system, folder, job.sizes.evaluation_batch)
        records = evaluate.evaluate(system, None, theta, examples, references, 0)
        return {"margin": float(np.mean([record.h for record in records]))}

    return profiled(measurement), {}


def check_evaluation(job: Job) -> Checked:
    """Mean log-probabilities."""
    system, examples = evaluation_system(job)
    logp_Rx2 = pairs.pair_logps(system, None, told_items(system, examples), job.sizes.evaluation_batch)
    chosen, rejected = np.mean(logp_Rx2, axis=0).tolist()
    return {"logps_chosen": chosen, "logps_rejected": rejected}, {}


def popi_iteration(job: Job) -> Prepared:
    """A joint step: sample, reward, update both models."""
    examples = rows.read_examples(job.rows, "popi")
    system = load(job, examples, **{"train.users_per_step": job.sizes.popi_users})
    step = Steps(job, system, "joint", examples)
    started = time.perf_counter()
    step.references.remember(bare_items(examples))
    return profiled(step), {"reference_s": time.perf_counter() - started}


def check_rewards(job: Job) -> Checked:
    """The reward of each user's persona as a summary."""
    examples = rows.read_examples(job.rows, "popi")
    system = load(job, examples)
    told = [Item(e.queries[0], e.persona) for e in examples]
    logps = [jnp.asarray(pairs.pair_logps(system, None, items, len(items))) for items in (told, bare_items(examples))]
    loss = objective.preference_loss(system.config.objective.loss)
    return {"rewards": (-loss(objective.implicit_reward_margin(*logps), system.settings.beta)).tolist()}, {}


def scaling(job: Job) -> Prepared:
    """A joint step with more signals for one user, or with more summaries for one or several users."""
    size, sizes = int(job.case.partition(":")[2]), job.sizes
    changes: dict[str, Any] = {} if job.kind == "scaling_signals" else {"sampling.k": size}
    if job.kind == "scaling_k":
        changes["train.users_per_step"] = sizes.popi_users
        examples = rows.read_examples(job.rows, "popi")
    else:
        longest = json.loads((pathlib.Path(job.rows["model"]) / "config.json").read_text())["max_position_embeddings"]
        limit = min(size if job.kind == "scaling_signals" else sizes.long_signals, longest - sizes.summary)
        changes |= {"train.users_per_step": 1, "limits.signals": limit}
        examples = rows.long_signals(job.rows["model"], sizes, limit, 1)
    system = load(job, examples, **changes)
    step = Steps(job, system, "joint", examples)
    step.references.remember(bare_items(examples))
    return profiled(step), {
        "signal_tokens": float(np.mean([len(system.encoder.signals(example)) for example in examples])),
        "k": system.config.sampling.k,
        "update_flops": flops(step.fn, step.state, system.base, step.batch()[0]),  # With padding.
    }


def measure_roofline(job: Job) -> Prepared:
    """See roofline.py."""
    width = job.sizes.matmul
    matrix = jax.random.normal(jax.random.key(0), (width, width), jnp.float32)
    array = jnp.ones(job.sizes.copy_mb * 2**20 // 4, jnp.float32)
    # x + 1 rather than a copy, because XLA would copy with memcpy and programs move data in loops.
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)

    def measurement() -> dict[str, Any]:
        return roofline.rates(
            lambda: product(matrix, matrix).block_until_ready(),
            width,
            lambda: copy(array).block_until_ready(),
            array.nbytes,
        )

    return repeat(measurement), {}


PREPARE = dict.fromkeys(DPO, dpo) | dict.fromkeys(("scaling_signals", "scaling_k", "scaling_k_long"), scaling)
PREPARE |= {
    "roofline": measure_roofline,
    "sampling": sampling,
    "evaluation": evaluation,
    "popi_iteration": popi_iteration,
}
CHECK = dict.fromkeys(DPO, check_dpo) | {
    "sampling": check_sampling,
    "evaluation": check_evaluation,
    "popi_iteration": check_rewards,
}
