"""What the peers' values must agree with, from the same functions that are measured; in WORK/check, named CASE_ours."""

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from benchmarks import cases, rows
from popi_jax.model import hub
from popi_jax.modes.setup import System
from popi_jax.rollout import pairs
from popi_jax.rollout import text as rollout
from popi_jax.rollout.pairs import Item
from popi_jax.training import objective, steps

if TYPE_CHECKING:
    from benchmarks.ours import Job

# Hub names of what carries an adapter.
ADAPTED = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
ADAPTED |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def write(job: "Job") -> None:
    """Writes the check of one case; nothing where there is none."""
    folder = job.work / "check"
    folder.mkdir(exist_ok=True)
    if job.case in cases.DPO:
        _write_gradients(job, folder)
    elif job.case == "sampling":
        _write_greedy(job, folder / "sampling_ours.json")
    elif job.case == "evaluation":
        _write_logps(job, folder / "evaluation_ours.json")
    elif job.case == "popi_iteration":
        _write_rewards(job, folder / "popi_iteration_ours.json")


def _write_gradients(job: "Job", folder: pathlib.Path) -> None:
    """The loss and its gradient with respect to every trained weight, in the hub's names and shapes."""
    from benchmarks import ours

    examples = rows.read_examples(job.rows, "dpo")
    system = ours.dpo_system(job, examples)
    stepper = ours.Steps(job, system, "generator", examples)
    theta = stepper.state.theta
    if system.policy.lora is not None:
        theta = _with_noise(theta)
        safetensors.numpy.save_file(_adapter_tensors(system, theta), folder / f"{job.case}_adapter.safetensors")
    batch, _ = stepper.batch()
    gradient = jax.jit(jax.value_and_grad(steps.generator_loss, has_aux=True), static_argnames="settings")
    grads, total, count = jax.tree.map(np.zeros_like, theta), 0.0, 0.0
    for i in range(system.config.train.accumulation_generator):
        micro = jax.tree.map(lambda x, i=i: x[i], batch)
        (_, (_, terms)), own = gradient(theta, system.base, micro, settings=system.settings)
        grads = jax.tree.map(lambda a, b: a + np.asarray(b), grads, own)
        total, count = (a + float(b) for a, b in zip((total, count), terms["nats"], strict=True))
    # Our loss is DPO's over beta, so that beta changes no learning rate; the peer's is not.
    scale = system.settings.beta / count
    grads = jax.tree.map(lambda g: g * np.float32(scale), grads)
    tensors = _hub_tensors(system, grads) if system.policy.lora is None else _adapter_tensors(system, grads)
    safetensors.numpy.save_file(tensors, folder / f"{job.case}_ours.safetensors")
    (folder / f"{job.case}_ours.json").write_text(json.dumps({"loss": total / count}), encoding="utf-8")


def _with_noise(adapter: Any) -> Any:
    """An adapter that does something: of a fresh one, whose b is 0, the loss is log 2 and a's gradient is 0."""
    leaves, treedef = jax.tree.flatten(adapter)
    rng = np.random.default_rng(0)
    noisy = [np.asarray(x) + 0.02 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


def _hub_tensors(system: System, tree: Any) -> dict[str, np.ndarray]:
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


def _adapter_tensors(system: System, tree: Any) -> dict[str, np.ndarray]:
    """A tree of adapters in PEFT's names and shapes."""
    rank = system.config.lora.rank
    tensors: dict[str, np.ndarray] = {}
    for target, adapter in tree["layers"].items():
        for i in range(system.policy.config.n_layers):
            name = f"base_model.model.model.layers.{i}.{ADAPTED[target]}"
            a, b = (np.asarray(adapter[part][i]) for part in ("a", "b"))
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, rank).T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(rank, -1).T)
    return tensors


def _write_greedy(job: "Job", path: pathlib.Path) -> None:
    from benchmarks import ours

    examples = rows.read_examples(job.rows, "sampling")
    system = ours.load(job, examples, **{"train.users_per_step": job.sizes.sampling_users})
    options = dataclasses.replace(rollout.in_training(system.config), temperature=0.0)
    samples = rollout.draw_summaries(system, None, examples, jax.random.key(0), options, k=1).samples
    tokens = [samples.tokens_BxNxS[b, 0, : samples.length_BxN[b, 0]].tolist() for b in range(job.sizes.sampling_users)]
    path.write_text(json.dumps({"tokens": tokens}), encoding="utf-8")


def _write_logps(job: "Job", path: pathlib.Path) -> None:
    from benchmarks import ours

    examples = rows.read_examples(job.rows, "evaluation")
    system = ours.load(job, examples, method="raw_signals")
    items = ours.told_items(system, examples)
    logp_Rx2 = pairs.pair_logps(system, None, items, job.sizes.evaluation_batch)
    chosen, rejected = np.mean(logp_Rx2, axis=0).tolist()
    path.write_text(json.dumps({"logps_chosen": chosen, "logps_rejected": rejected}), encoding="utf-8")


def _write_rewards(job: "Job", path: pathlib.Path) -> None:
    """The reward of each user's persona as a summary; the reference reads the question alone."""
    from benchmarks import ours

    examples = rows.read_examples(job.rows, "popi")
    system = ours.load(job, examples)
    told = [Item(e.queries[0], e.persona) for e in examples]
    bare = [Item(e.queries[0], None) for e in examples]
    logps = (jnp.asarray(pairs.pair_logps(system, None, items, len(items))) for items in (told, bare))
    loss_U = objective.preference_loss(system.config.objective.loss)(
        objective.implicit_reward_margin(*logps), system.settings.beta
    )
    path.write_text(json.dumps({"rewards": (-loss_U).tolist()}), encoding="utf-8")
