"""The training schedule: which step updates which model."""

from popi_jax.config import Config, StepKind
from popi_jax.data.shapes import Shapes
from popi_jax.errors import UserError
from popi_jax.model import sharding


def step_kind(config: Config, step: int) -> StepKind:
    """Returns the kind of the 0-based `step`."""
    if config.method != "popi":
        return "generator"
    schedule = config.schedule
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
    if config.method == "base":
        return 0
    if config.method == "popi" and config.schedule.name == "two_phase":
        return config.schedule.n_phi + config.schedule.n_theta
    return config.schedule.steps


def update_counts(config: Config) -> tuple[int, int]:
    """Returns the number of updates of phi and of theta in the whole run."""
    total, schedule = total_steps(config), config.schedule
    if config.method != "popi":
        return 0, total
    match schedule.name:
        case "joint":
            return total, total
        case "alternate":
            rounds, rest = divmod(total, schedule.n_phi + schedule.n_theta)
            phi = rounds * schedule.n_phi + min(rest, schedule.n_phi)
            return phi, total - phi
        case "two_phase":
            return schedule.n_phi, schedule.n_theta
        case "inference_only":
            return total, 0
        case "generator_only":
            return 0, total


def step_kinds(config: Config) -> set[StepKind]:
    """Returns the kinds of steps that the run takes."""
    if config.method == "popi" and config.schedule.name == "joint":
        return {"joint"} if total_steps(config) else set()
    n_phi, n_theta = update_counts(config)
    kinds: dict[StepKind, int] = {"inference": n_phi, "generator": n_theta}
    return {kind for kind, count in kinds.items() if count}


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
    count, queries = config.train.accumulation_generator, config.data.queries_per_user
    kinds = step_kinds(config)
    if "joint" in kinds:
        kinds |= {"generator"}
    k = min(map(shapes.summaries, kinds), default=0)
    if k and count > users * k * queries:
        raise UserError(
            f"config.train.accumulation_generator is {count}, more than the {users * k * queries} rows of a step:"
            f" {users} users (config.train.users_per_step, padded) x {k} summaries x {queries} queries; lower it"
        )
