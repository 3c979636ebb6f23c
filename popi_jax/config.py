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

from popi_jax.errors import UserError, first_line, shown

Dtype = Literal["float32", "bfloat16"]
Method = Literal["popi", "base", "population", "raw_signals", "zero_shot_summary", "oracle"]
StepKind = Literal["joint", "inference", "generator", "generator_warmup", "best_of_k", "imitation"]

# The bounds catch typos. They are far above what any machine can run, and numbers within them are finite in float32.
Count = Annotated[int, Field(ge=0, le=10**8)]
Positive = Annotated[int, Field(ge=1, le=10**8)]
Users = Annotated[int, Field(ge=0, le=10**6)]
Draws = Annotated[int, Field(ge=1, le=10**4)]
Few = Annotated[int, Field(ge=1, le=4096)]
Tokens = Annotated[int, Field(ge=1, le=2**20)]
Rate = Annotated[float, Field(ge=0, le=10**6, allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=1e-6, le=10**6, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # jax.random.key uses 32 bits: 2**32 would be the same as 0.
Decay = Annotated[float, Field(ge=0, le=1 - 1e-6, allow_inf_nan=False)]  # A larger one could round to 1 in float32.
Devices = Annotated[int, Field(ge=-1, le=2**20)]
Text = Annotated[str, Field(max_length=10**5)]
Name = Annotated[str, Field(max_length=200, pattern=r"^\P{Cc}*$")]

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
        raise UserError(f"{name} is {text!r}, not a valid path ({error}); give another path") from None


def _path(text: str, info: pydantic.ValidationInfo) -> str:
    """Checks a key that is a path or "", and replaces "~"."""
    try:
        path = local_path(text, f"config.{info.field_name}") if text else None
        return str(path) if text.startswith("~") else text
    except UserError as error:
        raise ValueError(str(error)) from None


def _source(text: str, info: pydantic.ValidationInfo) -> str:
    """Checks a key that is a path, "", or a data set of the hub."""
    if text.startswith(HUB) and not re.fullmatch(r"[\w.-]+/[\w.-]+", text.removeprefix(HUB)):
        raise ValueError(f"config.{info.field_name} is {text!r}; a data set of the hub is {HUB}OWNER/NAME")
    return text if text.startswith(HUB) else _path(text, info)


HUB = "hf://datasets/"
Path = Annotated[str, Field(max_length=4096, pattern=r"^\P{Cc}*$"), pydantic.AfterValidator(_path)]
Source = Annotated[str, Field(max_length=4096, pattern=r"^\P{Cc}*$"), pydantic.AfterValidator(_source)]


_PROTOCOLS = {"disjoint": "disjoint", "shipped": "published"}  # Of data.signals, the key's name in older runs.


class Section(pydantic.BaseModel):
    """A group of settings. It is immutable, and refuses unknown keys and values of another type.

    Only keys that were added later have a default here: the value that does what runs did before. So the config.json of
    an older run stays valid. The defaults of an experiment are in configs/base.py.
    """

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
    alpha: Scale
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...]
    init_inference: Path = ""
    init_generator: Path = ""


class Data(Section):
    """config.data."""

    dataset: Literal["stylebook", "psoups", "users", "elix", "review", "roleplay", "alignx", "prefeval", "traits"]
    path: Source
    test_path: Source
    prepared_dir: Path
    seed: Seed
    test_fraction: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    protocol: Literal["disjoint", "published"]
    on_null: Literal["error", "drop"] = "error"
    variant: Literal["DEMO", "UGC", "PAIR", "arbitrary"] = "arbitrary"
    unseen: Literal["users", "topics"] = "users"
    traits_per_user: tuple[Annotated[int, Field(ge=1, le=8)], ...] = (2,)
    signals_per_user: Few
    train_users: Users
    test_users: Users
    train_draws: Draws
    test_draws: Draws
    queries_per_user: Few
    test_queries_per_user: Few

    @pydantic.model_validator(mode="before")
    @classmethod
    def _of_older_runs(cls, tree: Any) -> Any:
        """Reads the config.json of a run from before `signals` became `protocol`."""
        if isinstance(tree, dict) and tree.get("signals") in tuple(_PROTOCOLS):
            return {key: value for key, value in tree.items() if key != "signals"} | {
                "protocol": _PROTOCOLS[tree["signals"]]
            }
        return tree


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

    inference_instruction: Text
    summary_start: Text
    summary_stop: Text
    pair_fields: tuple[Literal["prompt", "chosen", "rejected"], ...]
    generator_instruction: Text
    layout: Annotated[Path, Field(min_length=1)] = "plain"


class Sampling(Section):
    """config.sampling."""

    k: Annotated[int, Field(ge=1, le=1023)]  # A line has at most attention.ROW - 1 branches.
    k_generator: Annotated[int, Field(ge=0, le=1023)]
    k_warm_start: Annotated[int, Field(ge=0, le=1023)] = 0
    temperature: Scale  # Not 0: REINFORCE needs samples.


class Objective(Section):
    """config.objective."""

    loss: Literal["dpo", "ipo"]
    beta: Scale
    logp_reduction: Literal["sum", "mean"]
    reference_context: Literal["prompt", "summary", "signals"]
    advantage: Literal["rloo", "reinforce", "group_mean", "grpo"]
    baseline_decay: Decay
    kl: Literal["exact", "k1_reward", "k3_loss"]
    kl_coef: Rate
    kl_decay: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    reward_signals: Annotated[int, Field(ge=0, le=4096)] = 0
    relative_reward: bool = False
    length_penalty: Rate = 0.0
    copy_penalty: Rate = 0.0


class Schedule(Section):
    """config.schedule."""

    name: Literal["joint", "alternate", "two_phase", "inference_only", "generator_only"]
    steps: Count
    n_phi: Count
    n_theta: Count
    n_generator_warmup: Count = 0
    generator_warmup: Literal["persona", "raw_signals"] = "persona"
    n_warm_start: Count = 0
    warm_start: Literal["best_of_k", "persona"] = "best_of_k"


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
    users: Users
    users_per_batch: Annotated[int, Field(ge=1, le=2**16)]
    summaries_per_user: Annotated[int, Field(ge=1, le=1023)]
    temperature: Rate
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    samples: Annotated[int, Field(ge=0, le=2**16)]
    response_tokens: Tokens
    bootstrap: Annotated[int, Field(ge=1, le=10**5)]

    @property
    def rows(self) -> int:
        """The number of pairs scored at once: one per user of a batch and summary."""
        return self.users_per_batch * self.summaries_per_user


class Table(Section):
    """config.table."""

    methods: tuple[Name, ...]
    seeds: tuple[Seed, ...]


class Mesh(Section):
    """config.mesh; sharding.make_mesh checks the sizes against the devices."""

    data: Devices
    fsdp: Devices
    tensor: Devices


class Config(Section):
    """All settings of a run; configs/base.py documents each of them."""

    name: Name
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
        return self.method == "popi" and (self.schedule.name != "generator_only" or self.schedule.n_warm_start > 0)

    @property
    def k_of_warm_start(self) -> int:
        """The summaries that a user has in a step of the warm start best_of_k."""
        return self.sampling.k_warm_start or self.sampling.k

    @pydantic.model_validator(mode="after")
    def _fields_agree(self) -> Self:
        schedule, sampling = self.schedule, self.sampling
        profiled = self.train.profile_steps
        if profiled and (len(profiled) != 2 or profiled[0] > profiled[1]):
            raise ValueError(f"config.train.profile_steps is {shown(profiled)}; give (first, last) or ()")
        if len(self.limits.buckets) > 64:
            raise ValueError(f"config.limits.buckets has {len(self.limits.buckets)} lengths; give at most 64")
        for key, values in (
            ("lora.targets", self.lora.targets),
            ("data.traits_per_user", self.data.traits_per_user),
            ("table.methods", self.table.methods),
            ("table.seeds", self.table.seeds),
        ):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"config.{key} is {shown(values)}; give at least one value, and each only once")
        for key in ("init_inference", "init_generator"):
            if getattr(self.lora, key) and not self.lora.rank:
                raise ValueError(f"config.lora.{key} is an adapter, but config.lora.rank is 0; set it to the adapter's")
        if 0 < self.eval.temperature < 1e-6:
            raise ValueError(f"config.eval.temperature is {self.eval.temperature}; it must be 0 or at least 1e-06")
        if schedule.name in ("alternate", "two_phase") and schedule.n_phi + schedule.n_theta < 1:
            raise ValueError("config.schedule.n_phi and .n_theta are both 0, so nothing is trained; raise one of them")
        if "chosen" not in self.prompts.pair_fields:
            raise ValueError(
                f"config.prompts.pair_fields is {shown(self.prompts.pair_fields)}; it must have 'chosen' and may have"
                " 'prompt' and 'rejected'"
            )
        if sampling.k_generator > sampling.k:
            raise ValueError(
                f"config.sampling.k_generator is {sampling.k_generator}; it must be between 0 (all) and"
                f" config.sampling.k = {sampling.k}"
            )
        if (
            self.method == "popi"
            and schedule.n_warm_start
            and schedule.warm_start == "best_of_k"
            and self.k_of_warm_start < 2
        ):
            raise ValueError(
                f"config.sampling.k_warm_start is {sampling.k_warm_start} and .k is {sampling.k}; the warm start"
                " best_of_k chooses among a user's summaries and needs at least 2"
            )
        if self.trains_inference and self.objective.advantage != "reinforce" and sampling.k < 2:
            raise ValueError(
                f"config.sampling.k is {sampling.k}; advantage {self.objective.advantage} compares a user's summaries"
                " and needs at least 2"
            )
        return self


def parse(config: ml_collections.ConfigDict) -> Config:
    """Returns the settings; UserError names the first invalid key, its value and the remedy."""
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"--config: get_config returned {type(config).__name__}; return a ConfigDict, made by"
            " configs.base.get_config()"
        )
    try:
        tree = config.to_dict()
    except Exception as error:  # A value that is computed from others can raise anything.
        raise UserError(f"--config: a value of the config cannot be computed: {first_line(error)}") from error
    return validated(tree)


def validated(tree: dict[str, Any]) -> Config:
    """Returns the settings of nested dicts; UserError as for `parse`."""
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise UserError(_one_line(error.errors()[0])) from None


def tuples(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a config.json holds with tuples for its lists, as in a config."""
    return {
        key: {name: tuple(entry) if isinstance(entry, list) else entry for name, entry in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
    }


def upgraded(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns an older run's config.json with the keys of today; a tree that is no config stays as it is."""
    try:
        return Config.model_validate(tuples(tree)).model_dump(mode="json")
    except pydantic.ValidationError:
        return tree


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the settings with new values for some keys (such as "schedule.steps"); UserError as for `parse`."""
    tree = config.model_dump()
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(operator.getitem, sections, tree)[name] = value
    return validated(tree)


_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_REQUIRED = {
    "model_type": "be a section, with the keys of configs/base.py",
    "string_pattern_mismatch": "not have control characters",
    "string_unicode": "be text that UTF-8 can encode",
}


def _one_line(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":  # Raised by the validators above, whose messages name the keys.
        section = "".join(f"{part}." for part in error["loc"][:-1])
        return str(context["error"]).replace("config.", f"config.{section}", 1)
    key, value = ".".join(map(str, ("config", *error["loc"])))[:200], shown(error["input"])
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
    if kind in _REQUIRED:
        return f"{key} is {value}; it must {_REQUIRED[kind]}"
    return f"{key} is {value}; it {re.sub('^[A-Z][a-z]+ ', '', error['msg'])}"
