"""The training schedule: which step updates which model."""

import collections

from popi_jax.config import Config, StepKind
from popi_jax.data.shapes import Shapes
from popi_jax.errors import UserError
from popi_jax.model import sharding


def step_kind(config: Config, step: int) -> StepKind:
    """Returns the kind of the 0-based `step`."""
    if config.method != "popi":
        return "generator"
    schedule = config.schedule
    if step < schedule.n_generator_warmup:
        return "generator_warmup"
    step -= schedule.n_generator_warmup
    if step < schedule.n_warm_start:
        return _warm_start(config)
    step -= schedule.n_warm_start
    match schedule.name:
        case "joint":
            return "joint"
        case "alternate":
            return "inference" if step % (schedule.n_phi + schedule.n_theta) < schedule.n_phi else "generator"
        case "two_phase":
            return "inference" if step < schedule.n_phi else "generator"
        case "inference_only":
            return "inference"
        case "generator_only":
            return "generator"


def total_steps(config: Config) -> int:
    """Returns the number of steps of the run; 0 for the base method, which trains nothing."""
    return sum(_counts(config).values())


def update_counts(config: Config) -> tuple[int, int]:
    """Returns the number of updates of phi and of theta in the whole run."""
    counts = _counts(config)
    phi = sum(counts[kind] for kind in ("joint", "inference", "best_of_k", "imitation"))
    return phi, sum(counts[kind] for kind in ("joint", "generator", "generator_warmup"))


def step_kinds(config: Config) -> set[StepKind]:
    """Returns the kinds of steps that the run takes."""
    return {kind for kind, count in _counts(config).items() if count}


def _counts(config: Config) -> collections.Counter[StepKind]:
    """Returns the number of steps of each kind."""
    schedule, steps = config.schedule, config.schedule.steps
    counts: collections.Counter[StepKind] = collections.Counter()
    if config.method == "base":
        return counts
    if config.method != "popi":  # Its generator has as many updates as that of popi with joint.
        counts["generator"] = schedule.n_generator_warmup + steps
        return counts
    counts["generator_warmup"] = schedule.n_generator_warmup
    counts[_warm_start(config)] = schedule.n_warm_start
    match schedule.name:
        case "joint":
            counts["joint"] = steps
        case "alternate":
            rounds, rest = divmod(steps, schedule.n_phi + schedule.n_theta)
            counts["inference"] = rounds * schedule.n_phi + min(rest, schedule.n_phi)
            counts["generator"] = steps - counts["inference"]
        case "two_phase":
            counts["inference"], counts["generator"] = schedule.n_phi, schedule.n_theta
        case "inference_only":
            counts["inference"] = steps
        case "generator_only":
            counts["generator"] = steps
    return counts


def _warm_start(config: Config) -> StepKind:
    return "imitation" if config.schedule.warm_start == "persona" else "best_of_k"


def check_micro_batches(shapes: Shapes) -> None:
    """Raises UserError if the users do not divide evenly into micro-batches and devices, or the rows are too few."""
    config, devices = shapes.config, sharding.row_shards(shapes.mesh)
    users, count = shapes.users, config.train.accumulation_inference
    if users % (count * devices):
        raise UserError(
            f"config.train.accumulation_inference is {count}: {users} users (config.train.users_per_step, padded)"
            f" cannot be split evenly into {count} micro-batches over mesh.data x mesh.fsdp = {devices} devices;"
            " change one of these settings"
        )
    count, kinds = config.train.accumulation_generator, step_kinds(config)
    for kind in sorted(kinds):
        k, queries = shapes.learned(kind), shapes.queries(kind)
        if count > users * k * queries:
            raise UserError(
                f"config.train.accumulation_generator is {count}, more than the {users * k * queries} rows of a step:"
                f" {users} users (config.train.users_per_step, padded) x {k} summaries x {queries} queries; lower it"
            )
