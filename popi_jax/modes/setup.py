"""What a config stands for, loaded: mesh, tokenizer, model, optimizers; and the random keys of a run."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import optax

from popi_jax.data import packing, templates
from popi_jax.data.encoding import Encoder
from popi_jax.errors import UserError
from popi_jax.model import hub, kernels, remat, sharding
from popi_jax.model.config import LoraConfig, ModelConfig
from popi_jax.model.policy import Policy
from popi_jax.model.tokenizer import Tokenizer
from popi_jax.training import objective, steps

STREAMS = ("init", "sample", "queries", "evaluate", "respond", "personalize")
METHODS = ("popi", "base", "population", "raw_signals", "zero_shot_summary", "oracle")
SUMMARIZED = ("popi", "zero_shot_summary")  # Whose contexts a model writes.
SCHEDULES = ("joint", "alternate", "two_phase", "inference_only", "generator_only")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run's programs are made from: all that can be known without a weight or a tokenizer."""

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    policy: Policy
    settings: steps.Settings
    buckets: tuple[int, ...]  # limits.buckets; where that is (), preflight.py chooses them from a run's data.


@dataclasses.dataclass(frozen=True)
class System(Plan):
    """The fixed parts of a run. `base` is the frozen checkpoint: the references, and with LoRA also the trunk."""

    tokenizer: Tokenizer
    tokenizer_path: str
    base: dict
    fingerprint: str
    encoder: Encoder  # Its `overflow` says what the limits have cost so far; shown at the end of a run.


def load(config: ml_collections.ConfigDict) -> System:
    """Loads what the config names. Raises UserError for settings that make no sense."""
    check(config)
    mesh = make_mesh(config)
    jax.set_mesh(mesh)  # The decoder holds its activations to the mesh that is set.
    checkpoint = hub.load(config.model.path, mesh=mesh, **model_options(config, mesh))
    tokenizer_path = str(config.model.tokenizer or checkpoint.tokenizer_path)
    tokenizer = Tokenizer.load(tokenizer_path)
    encoder = Encoder(tokenizer, config.prompts, config.limits)
    encoder.summary_stop()  # Its mistakes are told now.
    plan = make_plan(config, mesh, checkpoint.config)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise UserError(
            f"{tokenizer_path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.model.path} only"
            f" {checkpoint.config.vocab_size}; set config.model.tokenizer to the model's own"
        )
    return System(
        **vars(plan),
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        base=checkpoint.params,
        fingerprint=checkpoint.fingerprint,
        encoder=encoder,
    )


def make_mesh(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The config's mesh over these devices, or all of this machine's; UserError where its batches do not fit it."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    check_micro_batches(config, sharding.row_shards(mesh))
    return mesh


def model_options(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What of a ModelConfig no checkpoint says; UserError where these devices have no such attention."""
    platform = mesh.devices.flat[0].platform
    return {
        "compute_dtype": config.model.compute_dtype,
        "remat": config.model.remat,
        "frozen_dtype": config.model.frozen_dtype,
        "trained_dtype": config.model.trained_dtype,
        "attention": kernels.resolve(config.model.attention, platform, config.model.compute_dtype),
    }


def make_plan(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, model: ModelConfig) -> Plan:
    """The plan of a run with a model of this shape; UserError for limits beyond its context."""
    longest = max(config.limits.signals + config.limits.summary, config.limits.prompt + config.limits.response)
    if longest > model.max_length:
        raise UserError(
            f"config.limits: prompts and answers of {longest} tokens exceed the context of {config.model.path},"
            f" {model.max_length} tokens; lower config.limits.signals, .prompt, .response or .summary"
        )
    lora = None
    if config.lora.rank:
        lora = LoraConfig(rank=config.lora.rank, alpha=config.lora.alpha, targets=tuple(config.lora.targets))
    policy = Policy(model, lora)
    return Plan(config, mesh, policy, make_settings(config, policy), tuple(config.limits.buckets))


def make_settings(config: ml_collections.ConfigDict, policy: Policy) -> steps.Settings:
    """The static part of the train steps."""
    n_phi, n_theta = update_counts(config)
    tx_phi = make_optimizer(config.optim, config.optim.lr_inference, config.optim.clip_inference, n_phi)
    return steps.Settings(
        policy=policy,
        tx_phi=tx_phi if config.method == "popi" else None,
        tx_theta=make_optimizer(config.optim, config.optim.lr_generator, config.optim.clip_generator, n_theta),
        loss=config.objective.loss,
        beta=config.objective.beta,
        logp_reduction=config.objective.logp_reduction,
        advantage=config.objective.advantage,
        baseline_decay=config.objective.baseline_decay,
        kl=config.objective.kl,
        kl_coef=config.objective.kl_coef,
        temperature=config.sampling.temperature,
    )


def make_optimizer(
    optim: ml_collections.ConfigDict, learning_rate: float, clip: float, updates: int
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, then a cosine to 0 (or constant), over `updates` updates of this role."""
    warmup = optim.warmup_steps
    if optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, max(updates - warmup, 1))
    else:
        after = optax.constant_schedule(learning_rate)
    # The first update has count 0: (count + 1) / (warmup + 1) keeps it from being lost.
    ramp = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, max(warmup, 1))
    rate = optax.join_schedules([ramp, after], [warmup]) if warmup else after
    adamw = optax.adamw(rate, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw


def step_kind(config: ml_collections.ConfigDict, step: int) -> str:
    """Which update the 0-based `step` makes: "joint", "inference" or "generator"."""
    if config.method != "popi":
        return "generator"
    name, n_phi, n_theta = config.schedule.name, config.schedule.n_phi, config.schedule.n_theta
    if name == "alternate":
        return "inference" if step % (n_phi + n_theta) < n_phi else "generator"
    if name == "two_phase":
        return "inference" if step < n_phi else "generator"
    return {"joint": "joint", "inference_only": "inference", "generator_only": "generator"}[name]


def total_steps(config: ml_collections.ConfigDict) -> int:
    """How many steps the run takes; the base method trains nothing."""
    if config.method == "base":
        return 0
    if config.method == "popi" and config.schedule.name == "two_phase":
        return config.schedule.n_phi + config.schedule.n_theta
    return config.schedule.steps


def update_counts(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """How many updates phi and theta get in the whole run."""
    kinds = [step_kind(config, step) for step in range(total_steps(config))]
    return sum(kind != "generator" for kind in kinds), sum(kind != "inference" for kind in kinds)


def summaries_per_user(config: ml_collections.ConfigDict, kind: str) -> int:
    """How many summaries of each user a step draws, or reads, and shows the generator.

    Of those that a joint step draws the generator learns from as many as in a generator step.
    """
    if config.method not in SUMMARIZED:
        return 1
    if kind != "generator":
        return config.sampling.k
    if config.method == "popi" and config.schedule.name == "two_phase":
        return 1  # Written once, see batches.WrittenSummaries.
    return config.sampling.k_generator or config.sampling.k


def stream_key(seed: int, stream: str, step: int) -> jax.Array:
    """The one source of randomness: fold_in(fold_in(key(seed), stream), step), so that a restart replays it."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream)), step)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming the key and the remedy, for values that no run could use."""
    for name in ("compute_dtype", "frozen_dtype", "trained_dtype"):
        _one_of(f"config.model.{name}", config.model[name], ("float32", "bfloat16"))
    _one_of("config.method", config.method, METHODS)
    _one_of("config.schedule.name", config.schedule.name, SCHEDULES)
    _one_of("config.objective.loss", config.objective.loss, tuple(objective.LOSSES))
    _one_of("config.objective.advantage", config.objective.advantage, objective.ADVANTAGES)
    _one_of("config.objective.kl", config.objective.kl, objective.KL_ESTIMATORS)
    _one_of("config.objective.logp_reduction", config.objective.logp_reduction, objective.LOGP_REDUCTIONS)
    _one_of("config.objective.reference_context", config.objective.reference_context, ("prompt", "summary", "signals"))
    _one_of("config.optim.schedule", config.optim.schedule, ("cosine", "constant"))
    _one_of("config.model.attention", config.model.attention, kernels.CHOICES)
    _one_of("config.model.remat", config.model.remat, tuple(remat.CHOICES))
    _one_of("config.data.dataset", config.data.dataset, ("stylebook", "psoups", "users"))
    _one_of("config.limits.on_overflow", config.limits.on_overflow, ("error", "drop"))
    for key in (
        "limits.signals", "limits.prompt", "limits.response", "limits.summary", "limits.bin", "sampling.k",
        "train.users_per_step", "train.accumulation_inference", "train.accumulation_generator",
        "train.checkpoint_every", "train.checkpoints_kept", "data.queries_per_user", "eval.summaries_per_user",
        "eval.users_per_batch", "eval.bootstrap", "eval.response_tokens", "data.signals_per_user", "data.train_draws",
        "data.test_draws", "data.test_queries_per_user",
    ):  # fmt: skip
        _at_least(config, key, 1)
    for key in (
        "lora.rank", "schedule.steps", "schedule.n_phi", "schedule.n_theta", "eval.every", "eval.users", "eval.samples",
        "optim.warmup_steps", "optim.lr_inference", "optim.lr_generator", "optim.weight_decay", "optim.clip_inference",
        "optim.clip_generator", "objective.kl_coef", "eval.temperature", "seed", "data.seed",
    ):  # fmt: skip
        _at_least(config, key, 0)
    if not config.objective.beta > 0:
        raise UserError(f"config.objective.beta is {config.objective.beta}; it must be greater than 0")
    if not (config.sampling.temperature > 0 and math.isfinite(config.sampling.temperature)):
        raise UserError(
            f"config.sampling.temperature is {config.sampling.temperature}; REINFORCE needs samples, so a value above 0"
        )
    if not 0 < config.eval.top_p <= 1:
        raise UserError(f"config.eval.top_p is {config.eval.top_p}; it must be above 0, and at most 1")
    if len(config.train.profile_steps) not in (0, 2):
        raise UserError(f"config.train.profile_steps is {tuple(config.train.profile_steps)}; give (first, last), or ()")
    if min(config.limits.buckets, default=1) < 1:
        raise UserError(f"config.limits.buckets is {tuple(config.limits.buckets)}; give lengths, in tokens, or ()")
    if config.schedule.name in ("alternate", "two_phase") and config.schedule.n_phi + config.schedule.n_theta < 1:
        raise UserError("config.schedule.n_phi and .n_theta are both 0: nothing would be trained; raise one")
    fields = tuple(config.prompts.pair_fields)
    if "chosen" not in fields or not set(fields) <= set(templates.PAIR_LABELS):
        raise UserError(
            f"config.prompts.pair_fields is {fields}; give 'chosen', and with it what is wanted of"
            f" {', '.join(templates.PAIR_LABELS)}"
        )
    if not 0 <= config.sampling.k_generator <= config.sampling.k:
        raise UserError(
            f"config.sampling.k_generator is {config.sampling.k_generator}; it must be between 0 (all) and"
            f" config.sampling.k, {config.sampling.k}"
        )
    learns_phi = config.method == "popi" and config.schedule.name != "generator_only"
    if learns_phi and config.objective.advantage != "reinforce" and config.sampling.k < 2:
        raise UserError(
            f"config.sampling.k is {config.sampling.k}; advantage {config.objective.advantage} compares a user's"
            " summaries and needs 2 or more"
        )


def check_micro_batches(config: ml_collections.ConfigDict, shards: int) -> None:
    """Raises UserError where users or rows cannot be shared out alike among micro-batches and `shards` devices."""
    users = packing.round_up(config.train.users_per_step, shards)
    count = config.train.accumulation_inference
    if users % (count * shards):
        raise UserError(
            f"config.train.accumulation_inference is {count}: {users} users (config.train.users_per_step, filled up)"
            f" do not divide into as many micro-batches over mesh.data x mesh.fsdp = {shards} devices; change one"
        )
    count, queries = config.train.accumulation_generator, config.data.queries_per_user
    kinds = {step_kind(config, step) for step in range(total_steps(config))}
    counts = {summaries_per_user(config, kind) for kind in kinds | ({"generator"} if "joint" in kinds else set())}
    k = min(counts, default=0)
    if k and count > users * k * queries:
        raise UserError(
            f"config.train.accumulation_generator is {count}, more than the {users * k * queries} rows of a step:"
            f" {users} users (config.train.users_per_step, filled up) x {k} summaries x {queries} queries"
        )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _at_least(config: ml_collections.ConfigDict, key: str, least: int) -> None:
    value = functools.reduce(lambda section, name: section[name], key.split("."), config)
    if not value >= least:
        raise UserError(f"config.{key} is {value}; it must be at least {least}")
