"""popi_jax: the library's own steps on the rows.

The check of a case uses the functions that the case measures.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, profile, roofline, rows
from benchmarks.cases import DPO, Cases, Checked, Job, Measure, Prepared, Turn, repeat
from popi_jax import config
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example
from popi_jax.model import hub
from popi_jax.modes import compile as compile_lib
from popi_jax.modes import setup
from popi_jax.modes.compile import Call
from popi_jax.modes.setup import Run
from popi_jax.rollout import contexts, sampler, text
from popi_jax.rollout.pairs import Item
from popi_jax.training import objective, steps
from popi_jax.training.batches import BatchMaker, WrittenSummaries

PACKAGES = machine.PACKAGES


def profiled(measurement: Callable[[], dict[str, Any]]) -> Measure:
    """As `repeat`, with a profile of one more measurement at the end."""
    measure = repeat(measurement)

    def then_profile(turn: Turn) -> dict[str, Any]:
        return measure(turn) | {"profile": profile.where(measurement)}

    return then_profile


def load(job: Job, examples: list[Example], changes: dict[str, Any]) -> Run:
    """A run of the benchmark's config with these keys changed, fitted to the examples as a run is to its data."""
    settings = config.changed(rows.make_config(job.rows["model"], job.sizes), changes)
    return setup.load(settings).fitted({"train": examples})


def told_items(run: Run, examples: list[Example]) -> list[Item]:
    """Each example's query with what the config's method tells about its user."""
    return [Item(e.queries[0], contexts.told(run.config.method, run.encoder, e).told) for e in examples]


def bare_items(examples: list[Example]) -> list[Item]:
    """Each example's query alone, as the POPI iteration's reference reads it."""
    return [Item(e.queries[0], None) for e in examples]


class Steps:
    """The train loop's own parts, step by step: makes a batch, then calls the compiled step."""

    def __init__(self, job: Job, run: Run, kind: config.StepKind, examples: list[Example]):
        self.run, self.kind, self.examples, self.number = run, kind, examples, 0
        folder = job.work / "ours" / job.case.replace(":", "_")
        self.state, self.fn = run.initial_state(), run.programs.train_steps[kind]
        self.references = run.references(folder)
        written = WrittenSummaries(folder / "written.jsonl")
        self.maker = BatchMaker(run.config, run.sampler, run.scorer, self.references, written)

    def batch(self) -> Any:
        """This step's batch and counts."""
        return self.maker.make(self.state.phi, self.state.theta, self.examples, self.number, self.kind)

    def flops(self) -> float:
        """FLOPs of this step."""
        return flops(Call("", self.fn, (self.state, self.run.base, self.batch()[0])))

    def __call__(self) -> dict[str, Any]:
        """A whole step."""
        batch, counts = self.batch()
        self.state, scalars = self.fn(self.state, self.run.base, batch)
        values = {name: float(value) for name, value in jax.device_get(scalars | counts).items()}
        self.number += 1
        return {name: values[name] for name in ("tokens", "nats", "sample_s") if name in values}


def flops(call: Call) -> float:
    """FLOPs of the model's products in one call, with padding and without recomputation."""
    return compile_lib.products(call, devices=1)["model_flops_per_device"]


def dpo_steps(job: Job) -> Steps:
    """Generator steps that learn from raw signals or summaries in context, as the case says."""
    examples = rows.read_examples(job.rows, "dpo")
    signals = "signals" in job.case
    changes = {
        "method": "raw_signals" if signals else "oracle",
        # The peer's reference reads the prompt that its policy reads.
        "objective.reference_context": "signals" if signals else "summary",
        "lora.rank": job.sizes.lora_rank if job.lora else 0,
        "train.users_per_step": job.sizes.pairs,
    }
    return Steps(job, load(job, examples, changes), "generator", examples)


def dpo(job: Job) -> Prepared:
    """A DPO step. As in a run, the reference's log-probabilities are computed once, before the first step."""
    step = dpo_steps(job)
    started = time.perf_counter()
    step.references.remember(told_items(step.run, step.examples))
    reference_s = time.perf_counter() - started
    batch, counts = step.batch()
    filled = float(counts["tokens"]) / batch.generator.bins.tokens_CxL.size
    return profiled(step), {"reference_s": reference_s, "flops": step.flops(), "filled": filled}


def check_dpo(job: Job) -> Checked:
    """The loss and its gradient with respect to every trained weight, in the hub's names and shapes."""
    step = dpo_steps(job)
    theta, settings = step.state.theta, step.run.programs.settings
    if job.lora:
        theta = with_noise(theta)
        np.savez(job.check_file("adapter.npz"), **adapter_tensors(step.run, theta))  # type: ignore[arg-type]
    micro_batch = jax.tree.map(lambda x: x[0], step.batch()[0].generator)  # accumulation_generator is 1.
    gradient = jax.jit(jax.value_and_grad(steps.generator_loss, has_aux=True), static_argnames="settings")
    (_, (_, terms)), grads = gradient(theta, step.run.base, micro_batch, settings=settings)
    total, count = map(float, terms["nats"])
    # Our loss is DPO's divided by beta, so that beta changes no learning rate. The peer's is DPO's.
    grads = jax.tree.map(lambda g: np.asarray(g) * np.float32(settings.beta / count), grads)
    return {"loss": total / count}, adapter_tensors(step.run, grads) if job.lora else hub_tensors(step.run, grads)


def with_noise(adapter: Any) -> Any:
    """The adapter with noise. In a fresh one b is 0, so the loss is log 2 and has no gradient with respect to a."""
    leaves, treedef = jax.tree.flatten(adapter)
    rng = np.random.default_rng(0)
    noisy = [np.asarray(x) + 0.02 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


def hub_tensors(run: Run, tree: Any) -> dict[str, np.ndarray]:
    """A tree of base weights in the hub's names and shapes."""
    model = run.programs.policy.config
    tensors: dict[str, np.ndarray] = {}
    for leaf, value in zip(hub.leaves(model), jax.tree.leaves(tree), strict=True):
        layers = value if leaf.stacked else [value]
        tensors |= {leaf.name.format(i): leaf.to_hub(layer) for i, layer in enumerate(layers)}
    return tensors


def adapter_tensors(run: Run, tree: Any) -> dict[str, np.ndarray]:
    """A tree of adapters in PEFT's names and shapes."""
    rank = run.config.lora.rank
    kernels = (leaf for leaf in hub.leaves(run.programs.policy.config) if leaf.path[-1] == "kernel")
    names = {leaf.path[-2]: leaf.name.removesuffix(".weight") for leaf in kernels}
    tensors: dict[str, np.ndarray] = {}
    for target, adapter in tree["layers"].items():
        for i, (a, b) in enumerate(zip(*(np.asarray(adapter[part]) for part in ("a", "b")), strict=True)):
            name = f"base_model.model.{names[target].format(i)}"
            tensors[f"{name}.lora_A.weight"] = a.reshape(-1, rank).T
            tensors[f"{name}.lora_B.weight"] = b.reshape(rank, -1).T
    return tensors


def sampling_run(job: Job) -> tuple[Run, list[Example]]:
    """The run and the users that it samples for."""
    examples = rows.read_examples(job.rows, "sampling")
    return load(job, examples, {"train.users_per_step": job.sizes.sampling_users}), examples


def sampling(job: Job) -> Prepared:
    """K summaries of each user. The setup has the prefill apart, whose time is that of drawing one token."""
    run, examples = sampling_run(job)
    sizes, options = job.sizes, text.in_training(run.config)
    prefixes = [run.encoder.signals(example) for example in examples]
    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def draw_one() -> text.Drawn:
        return run.sampler.draw(None, prefixes, next(keys), options, branches=sizes.k, max_tokens=1)

    def measurement() -> dict[str, Any]:
        length_BxN = run.sampler.summaries(None, examples, next(keys), options, k=sizes.k).samples.length_BxN
        return {"items": int(length_BxN.sum()), "decode_steps": int(length_BxN.max()) - 1}

    drawn = draw_one()
    arguments = (run.base, None, jnp.asarray(drawn.prefix_BxT), jnp.asarray(drawn.prefix_length_B), next(keys))
    static: dict[str, Any] = {"branches": sizes.k, "max_tokens": sizes.summary, "temperature": 1.0, "top_p": 1.0}
    static |= {"stop_ids": tuple(job.rows["stop_ids"]), "pad_id": job.rows["pad_id"]}

    def products(trips: tuple[int, ...]) -> float:
        return flops(Call("", run.programs.sample, arguments, static, trips))

    turns = sampler.turns(sizes.summary)
    prefill = products((0,) * len(turns))
    B, T = drawn.prefix_BxT.shape
    model = run.programs.policy.config
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(run.base))
    cache_bytes = model.n_layers * 2 * model.n_kv_heads * model.head_dim * 4  # Of one token.
    return profiled(measurement), {
        "prefill_s": roofline.best_seconds(draw_one, least_s=0),
        "prefill_flops": prefill,
        "decode_flops": (products(turns) - prefill) / sum(turns),  # Of one step.
        # A step must read every weight, and the keys and values of the prefix and, on average, of half the text.
        "decode_bytes": weight_bytes + cache_bytes * B * (T + sizes.k * sizes.summary // 2),
        "filled": float(drawn.prefix_length_B.sum() / drawn.prefix_BxT.size),
    }


def check_sampling(job: Job) -> Checked:
    """Each prompt with its greedy tokens."""
    run, examples = sampling_run(job)
    options = dataclasses.replace(text.in_training(run.config), temperature=0.0)
    samples = run.sampler.summaries(None, examples, jax.random.key(0), options, k=1).samples
    new = [samples.tokens_BxNxS[b, 0, : samples.length_BxN[b, 0]].tolist() for b in range(len(examples))]
    return {"tokens": [run.encoder.signals(e) + row for e, row in zip(examples, new, strict=True)]}, {}


def evaluation_run(job: Job) -> tuple[Run, list[Example]]:
    """The run and the examples that it evaluates; policy and reference read the raw signals."""
    examples = rows.read_examples(job.rows, "evaluation")
    return load(job, examples, {"method": "raw_signals", "objective.reference_context": "signals"}), examples


def evaluation(job: Job) -> Prepared:
    """`Evaluator.records`, with the reference's values computed anew each time."""
    run, examples = evaluation_run(job)
    theta, calls = run.initial_state().theta, iter(range(10_000))

    def measurement() -> dict[str, Any]:
        evaluator = run.evaluator(run.references(job.work / "ours" / f"references{next(calls)}"))
        return {"margin": float(np.mean([record.h for record in evaluator.records(None, theta, examples, 0)]))}

    return profiled(measurement), {}


def check_evaluation(job: Job) -> Checked:
    """Mean log-probabilities."""
    run, examples = evaluation_run(job)
    chosen, rejected = np.mean(run.scorer.logps(None, told_items(run, examples)), axis=0).tolist()
    return {"logps_chosen": chosen, "logps_rejected": rejected}, {}


def popi_iteration(job: Job) -> Prepared:
    """A joint step: sample, reward, update both models."""
    examples = rows.read_examples(job.rows, "popi")
    run = load(job, examples, {"train.users_per_step": job.sizes.popi_users})
    step = Steps(job, run, "joint", examples)
    started = time.perf_counter()
    step.references.remember(bare_items(examples))
    return profiled(step), {"reference_s": time.perf_counter() - started}


def check_rewards(job: Job) -> Checked:
    """The reward of each user's persona as a summary."""
    examples = rows.read_examples(job.rows, "popi")
    run = load(job, examples, {})
    told = [Item(e.queries[0], Told(e.persona)) for e in examples]
    logps = (jnp.asarray(run.scorer.logps(None, items)) for items in (told, bare_items(examples)))
    settings = run.programs.settings
    loss = objective.preference_loss(settings.loss)
    return {"rewards": (-loss(objective.implicit_reward_margin(*logps), settings.beta)).tolist()}, {}


def scaling(job: Job) -> Prepared:
    """A joint step with more signals for one user, or with more summaries for one or several users."""
    size, sizes = int(job.case.partition(":")[2]), job.sizes
    changes: dict[str, Any] = {} if job.kind == "scaling_signals" else {"sampling.k": size}
    if job.kind == "scaling_k":
        changes["train.users_per_step"] = sizes.popi_users
        examples = rows.read_examples(job.rows, "popi")
    else:
        longest = hub.read_config(pathlib.Path(job.rows["model"]) / "config.json").max_length
        limit = min(size if job.kind == "scaling_signals" else sizes.long_signals, longest - sizes.summary)
        changes |= {"train.users_per_step": 1, "limits.signals": limit}
        examples = [rows.long_signals(job.rows["model"], sizes, limit)]
    run = load(job, examples, changes)
    step = Steps(job, run, "joint", examples)
    step.references.remember(bare_items(examples))
    return profiled(step), {
        "signal_tokens": float(np.mean([len(run.encoder.signals(example)) for example in examples])),
        "k": run.config.sampling.k,
        "update_flops": step.flops(),
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


CASES: Cases = dict.fromkeys(DPO, (dpo, check_dpo)) | {
    "roofline": (measure_roofline, None),
    **dict.fromkeys(("scaling_signals", "scaling_k", "scaling_k_long"), (scaling, None)),
    "sampling": (sampling, check_sampling),
    "evaluation": (evaluation, check_evaluation),
    "popi_iteration": (popi_iteration, check_rewards),
}
