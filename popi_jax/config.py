"""The settings of a run: parses a ConfigDict into typed, frozen, validated sections. No other code reads a ConfigDict.

`configs/base.py` has the default and the meaning of every key. This module has their types and bounds.
"""

import functools
import operator
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import ml_collections
import pydantic
from pydantic import Field

from popi_jax.errors import UserError

Dtype = Literal["float32", "bfloat16"]
Method = Literal["popi", "base", "population", "raw_signals", "zero_shot_summary", "oracle"]
StepKind = Literal["joint", "inference", "generator"]

# The bounds catch typos. They are far above what any machine can run.
Count = Annotated[int, Field(ge=0, le=10**8)]
Positive = Annotated[int, Field(ge=1, le=10**8)]
Tokens = Annotated[int, Field(ge=1, le=2**20)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # jax.random.key uses 32 bits: 2**32 would be the same as 0.
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

SUMMARIZED = ("popi", "zero_shot_summary")  # The methods whose contexts are written by a model.


def local_path(text: str, name: str) -> pathlib.Path:
    """Returns the path that a flag or a key names, with "~" replaced; UserError unless it can be a local one."""
    if not text.strip():
        raise UserError(f"{name} is empty; give a path")
    if text in ("None", "none", "null"):
        raise UserError(f"{name} is {text!r}; leave it out, or give ./{text} if a file or folder has this name")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise UserError(f"{name} is {text!r}; only local paths are supported: mount the bucket, or copy it")
    try:
        text.encode()  # Orbax and tensorstore take UTF-8 alone.
        return pathlib.Path(text).expanduser()
    except (UnicodeError, RuntimeError) as error:
        raise UserError(f"{name} is {text!r}, which is no path here: {error}; give another path") from None


def _path(text: str, info: pydantic.ValidationInfo) -> str:
    """Checks a key that is a path or "", and replaces "~"."""
    try:
        path = local_path(text, f"config.{info.field_name}") if text else None
        return str(path) if text.startswith("~") else text
    except UserError as error:
        raise ValueError(str(error)) from None


Path = Annotated[str, pydantic.AfterValidator(_path)]


class Section(pydantic.BaseModel):
    """A group of settings. It is immutable, and refuses unknown keys and values of another type."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Model(Section):
    """config.model."""

    path: Annotated[Path, Field(min_length=1)]
    compute_dtype: Dtype
    frozen_dtype: Dtype
    trained_dtype: Dtype
    remat: Literal["none", "dots", "full"]
    attention: Literal["auto", "xla", "splash", "cudnn"]
    tokenizer: Path
    shape: Path


class Lora(Section):
    """config.lora."""

    rank: Annotated[int, Field(ge=0, le=2**16)]
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...]


class Data(Section):
    """config.data."""

    dataset: Literal["stylebook", "psoups", "users"]
    path: Path
    test_path: Path
    prepared_dir: Path
    seed: Seed
    test_fraction: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    signals: Literal["disjoint", "shipped"]
    signals_per_user: Positive
    train_users: Count
    test_users: Count
    train_draws: Positive
    test_draws: Positive
    queries_per_user: Annotated[int, Field(ge=1, le=4096)]
    test_queries_per_user: Annotated[int, Field(ge=1, le=4096)]


class Limits(Section):
    """config.limits, in tokens."""

    signals: Tokens
    prompt: Tokens
    response: Tokens
    summary: Tokens
    bin: Tokens
    on_overflow: Literal["error", "drop"]
    buckets: tuple[Tokens, ...]


class Prompts(Section):
    """config.prompts."""

    inference_instruction: str
    summary_start: str
    summary_stop: str
    pair_fields: tuple[Literal["prompt", "chosen", "rejected"], ...]
    generator_instruction: str


class Sampling(Section):
    """config.sampling."""

    k: Annotated[int, Field(ge=1, le=1023)]  # A line has at most attention.ROW - 1 branches.
    k_generator: Annotated[int, Field(ge=0, le=1023)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # REINFORCE needs samples.


class Objective(Section):
    """config.objective."""

    loss: Literal["dpo", "ipo"]
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    logp_reduction: Literal["sum", "mean"]
    reference_context: Literal["prompt", "summary", "signals"]
    advantage: Literal["rloo", "reinforce", "group_mean", "grpo"]
    baseline_decay: Decay
    kl: Literal["exact", "k1_reward", "k3_loss"]
    kl_coef: Rate


class Schedule(Section):
    """config.schedule."""

    name: Literal["joint", "alternate", "two_phase", "inference_only", "generator_only"]
    steps: Count
    n_phi: Count
    n_theta: Count


class Optim(Section):
    """config.optim."""

    lr_inference: Rate
    lr_generator: Rate
    schedule: Literal["cosine", "constant"]
    warmup_steps: Count
    b1: Decay
    b2: Decay
    weight_decay: Rate
    clip_inference: Rate
    clip_generator: Rate


class Train(Section):
    """config.train."""

    users_per_step: Annotated[int, Field(ge=1, le=2**16)]
    accumulation_inference: Annotated[int, Field(ge=1, le=2**16)]
    accumulation_generator: Annotated[int, Field(ge=1, le=2**16)]
    checkpoint_every: Positive
    checkpoints_kept: Positive
    profile_steps: tuple[Count, ...]


class Eval(Section):
    """config.eval."""

    every: Count
    users: Count
    users_per_batch: Annotated[int, Field(ge=1, le=2**16)]
    summaries_per_user: Annotated[int, Field(ge=1, le=1023)]
    temperature: Rate
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    samples: Annotated[int, Field(ge=0, le=2**16)]
    response_tokens: Tokens
    bootstrap: Annotated[int, Field(ge=1, le=10**6)]

    @property
    def rows(self) -> int:
        """The number of pairs scored at once: one per user of a batch and summary."""
        return self.users_per_batch * self.summaries_per_user


class Table(Section):
    """config.table."""

    methods: tuple[str, ...]
    seeds: tuple[Seed, ...]


class Mesh(Section):
    """config.mesh; sharding.make_mesh checks the sizes against the devices."""

    data: Annotated[int, Field(ge=-1)]
    fsdp: Annotated[int, Field(ge=-1)]
    tensor: Annotated[int, Field(ge=-1)]


class Config(Section):
    """All settings of a run; configs/base.py documents each of them."""

    name: str
    seed: Seed
    model: Model
    lora: Lora
    data: Data
    limits: Limits
    prompts: Prompts
    sampling: Sampling
    objective: Objective
    schedule: Schedule
    method: Method
    optim: Optim
    train: Train
    eval: Eval
    table: Table
    mesh: Mesh

    @property
    def trains_inference(self) -> bool:
        """Whether the run updates q_phi."""
        return self.method == "popi" and self.schedule.name != "generator_only"

    @pydantic.model_validator(mode="after")
    def _fields_agree(self) -> Self:
        schedule, sampling = self.schedule, self.sampling
        if len(self.train.profile_steps) not in (0, 2):
            raise ValueError(f"config.train.profile_steps is {self.train.profile_steps}; give (first, last) or ()")
        if schedule.name in ("alternate", "two_phase") and schedule.n_phi + schedule.n_theta < 1:
            raise ValueError("config.schedule.n_phi and .n_theta are both 0, so nothing is trained; raise one of them")
        if "chosen" not in self.prompts.pair_fields:
            raise ValueError(
                f"config.prompts.pair_fields is {self.prompts.pair_fields}; it must have 'chosen' and may have 'prompt'"
                " and 'rejected'"
            )
        if sampling.k_generator > sampling.k:
            raise ValueError(
                f"config.sampling.k_generator is {sampling.k_generator}; it must be between 0 (all) and"
                f" config.sampling.k = {sampling.k}"
            )
        if self.trains_inference and self.objective.advantage != "reinforce" and sampling.k < 2:
            raise ValueError(
                f"config.sampling.k is {sampling.k}; advantage {self.objective.advantage} compares a user's summaries"
                " and needs at least 2"
            )
        return self


def parse(config: ml_collections.ConfigDict) -> Config:
    """Returns the settings; UserError names the first invalid key, its value and the remedy."""
    return _validated(config.to_dict())


def _validated(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise UserError(_one_line(error.errors()[0])) from None


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the settings with new values for some keys (such as "schedule.steps"); UserError as for `parse`."""
    tree = config.model_dump()
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(operator.getitem, sections, tree)[name] = value
    return _validated(tree)


_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def _one_line(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":  # Raised by the validators above, whose messages name the keys.
        section = "".join(f"{part}." for part in error["loc"][:-1])
        return str(context["error"]).replace("config.", f"config.{section}", 1)
    key, value = ".".join(map(str, ("config", *error["loc"]))), repr(error["input"])
    if kind == "extra_forbidden":
        return f"{key} is not a setting; configs/base.py has all of them"
    if kind == "missing":
        return f"{key} is missing; start from configs/base.py, which has every key"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"{key} is {value}; it must be {words} {context[bound]}"
    if kind == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("'", "")
        return f"{key} is {value}; choose one of {choices}"
    message = error["msg"]
    return f"{key} is {value}; it {message.removeprefix('Input ')}"
