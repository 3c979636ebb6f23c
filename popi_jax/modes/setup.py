"""Builds everything that a mode needs from its config: mesh, weights, tokenizer, programs; restores checkpoints."""

import collections
import dataclasses
import logging
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from popi_jax import checkpoint
from popi_jax.config import Config
from popi_jax.data import layouts, prepared
from popi_jax.data.encoding import Encoder
from popi_jax.data.schema import Example
from popi_jax.data.shapes import Shapes
from popi_jax.errors import UserError
from popi_jax.evaluation.evaluate import Evaluator
from popi_jax.model import hub, kernels, peft, sharding
from popi_jax.model.config import LoraConfig, ModelConfig
from popi_jax.model.policy import Policy
from popi_jax.model.tokenizer import Tokenizer
from popi_jax.model.weights import Tree
from popi_jax.modes import programs
from popi_jax.modes.programs import Programs
from popi_jax.rollout import limits
from popi_jax.rollout.pairs import Packer, PairScorer
from popi_jax.rollout.references import References
from popi_jax.rollout.text import TextSampler
from popi_jax.training import schedule, steps
from popi_jax.training.rng import stream_key

_MOST_REPEATS = 1000  # The times that a batch could hold all examples. A typo is far beyond.


@dataclasses.dataclass(frozen=True)
class Run:
    """A loaded run.

    Attributes:
        config: the run's settings.
        programs: its compiled programs, which hold the mesh.
        base: the frozen checkpoint: both reference models, and with LoRA also the weights under the adapters.
        model_fingerprint: identifies the weights and what config.json says of them.
        encoder: makes the token sequences that the models read. Its `overflow` counts what the limits dropped so far.
        tokenizer_path: the tokenizer's folder.
        buckets: the lengths that prompts and bins are padded to, see `fitted`.
    """

    config: Config
    programs: Programs
    base: Tree
    model_fingerprint: str
    encoder: Encoder
    tokenizer_path: str
    buckets: tuple[int, ...]

    def usable(
        self, examples: Mapping[str, Sequence[Example]], dropped: collections.Counter[str] | None = None
    ) -> dict[str, limits.Kept]:
        """Returns the examples without users and queries that exceed config.limits, see `limits.usable`.

        Args:
            examples: the examples of each split.
            dropped: updated with what was dropped; a warning says it, too.
        """
        own: collections.Counter[str] = collections.Counter()
        kept = {split: limits.usable(self.encoder, split, part, own) for split, part in examples.items()}
        for reason, count in own.items():
            logging.warning("data: dropped %d %s", count, reason)
        if dropped is not None:
            dropped.update(own)
        for split, part in kept.items():
            if not part:
                raise UserError(f"config.limits: no user of the {split} split fits; raise them")
        return kept

    def fitted(self, sources: Mapping[str, Collection[Example]]) -> "Run":
        """Returns the run with buckets that fit these examples.

        UserError if one of them exceeds a limit, or if they are few for the config's batches.
        """
        train, evaluation = self.config.train, self.config.eval
        for split, key, size in (
            ("train", "train.users_per_step", train.users_per_step),
            ("test", "eval.users_per_batch", evaluation.users_per_batch),
        ):
            if split in sources and size > _MOST_REPEATS * len(sources[split]):
                raise UserError(
                    f"config.{key} is {size}, but there are only {len(sources[split])} {split} examples; lower it"
                )
        return dataclasses.replace(self, buckets=limits.buckets(self.config, self.encoder, sources))

    @property
    def shapes(self) -> Shapes:
        """The shapes of the run's arrays."""
        return Shapes(self.config, self.programs.mesh, self.buckets)

    @property
    def sampler(self) -> TextSampler:
        """The sampler of summaries and responses."""
        return TextSampler(self.programs.sample, self.base, self.encoder, self.shapes)

    @property
    def scorer(self) -> PairScorer:
        """The scorer of preference pairs."""
        return PairScorer(self.programs.score, self.base, Packer(self.encoder, self.shapes))

    def references(self, folder: pathlib.Path) -> References:
        """Returns the reference log-probabilities cached in this folder."""
        config = self.config
        identity = (
            f"{self.model_fingerprint}|{self.encoder.tokenizer.fingerprint}|{config.prompts.generator_instruction}"
            f"|{layouts.fingerprint(config.prompts.layout)}|{config.objective.logp_reduction}|{config.model.compute_dtype}|{config.model.frozen_dtype}"
        )
        return References(self.scorer, folder, identity)

    def evaluator(self, references: References) -> Evaluator:
        """Returns the evaluator that uses these references."""
        return Evaluator(self.config, self.sampler, self.scorer, references)

    def other_weights(self, path: pathlib.Path) -> Tree:
        """Loads the weights of another hub folder; UserError if its model has another shape."""
        other = hub.load(path, mesh=self.programs.mesh, **model_options(self.config, self.programs.mesh))
        model = self.programs.policy.config
        if dataclasses.replace(other.config, n_tokens=model.n_tokens) != model:
            raise UserError(f"{path}: its model has another shape than {self.config.model.path}; export both again")
        return other.params

    def initial_state(self) -> steps.TrainState:
        """Returns the state before the first step; UserError if an adapter that a role starts from does not fit."""
        state = self.programs.init_state(stream_key(self.config.seed, "init", 0), self.base)
        given, shardings = self.config.lora, self.programs.state_shardings
        if given.init_inference and state.phi is not None:
            state = dataclasses.replace(state, phi=self._adapter(given.init_inference, state.phi, shardings.phi))
        if given.init_generator:
            state = dataclasses.replace(state, theta=self._adapter(given.init_generator, state.theta, shardings.theta))
        return state

    def _adapter(self, folder: str, fresh: Tree, shardings: Any) -> Tree:
        lora = self.programs.policy.lora
        assert lora is not None
        host = peft.load(pathlib.Path(folder), fresh, lora)
        return jax.tree.map(lambda x, like, place: jax.device_put(x.astype(like.dtype), place), host, fresh, shardings)

    @property
    def identity(self) -> dict[str, Any]:
        """The entries by which a checkpoint's record must match this model."""
        # Where the adapters started does not change what they are, and older checkpoints do not have these keys.
        lora = self.config.lora.model_dump(mode="json", exclude={"init_inference", "init_generator"})
        # The LoRA settings are compared by key. A comparison of shapes alone would report dozens of missing weights.
        return {
            "model": self.model_fingerprint,
            "tokenizer": self.encoder.tokenizer.fingerprint,
            "config": {"lora": lora},
            **_own_layout(self.config),
        }

    def inputs(self, examples: Mapping[str, Sequence[Example]]) -> dict[str, str]:
        """Returns the fingerprint of everything that a run with these examples reads, see `read_inputs`."""
        return _inputs(self.config, self.model_fingerprint, self.encoder.tokenizer.fingerprint, examples)

    def restore(self, workdir: pathlib.Path, step: int | None = None) -> tuple[steps.TrainState, dict[str, Any]] | None:
        """Restores the newest (or given) checkpoint of the workdir, with its record; None if there is none."""
        # Orbax gets plain dicts, whose paths do not depend on the class.
        fields = vars(self.programs.abstract_state())
        restored = checkpoint.restore(workdir / "checkpoints", fields, step=step, expect=self.identity)
        return None if restored is None else (steps.TrainState(**restored.state), restored.meta)


def load(config: Config) -> Run:
    """Loads everything that the config names; UserError if the settings do not fit the devices or the model."""
    mesh = make_mesh(config)
    layouts.load(config.prompts.layout)  # Called here to report a bad file early.
    checkpoint_read = hub.load(config.model.path, mesh=mesh, **model_options(config, mesh))
    tokenizer_path = config.model.tokenizer or str(checkpoint_read.tokenizer_path)
    tokenizer = Tokenizer.load(tokenizer_path)
    encoder = Encoder(tokenizer, config.prompts, config.limits)
    encoder.summary_stop()  # Called here to report a bad prompts.summary_stop early.
    model = checkpoint_read.config
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{tokenizer_path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model {config.model.path} only"
            f" {model.vocab_size}; set config.model.tokenizer to the model's tokenizer"
        )
    model = dataclasses.replace(model, n_tokens=tokenizer.vocab_size)
    return Run(
        config=config,
        programs=make_programs(config, mesh, model),
        base=checkpoint_read.params,
        model_fingerprint=checkpoint_read.fingerprint,
        encoder=encoder,
        tokenizer_path=tokenizer_path,
        buckets=config.limits.buckets,
    )


def read_inputs(config: Config, examples: Mapping[str, Sequence[Example]]) -> dict[str, str]:
    """Returns the fingerprints of a run's model, tokenizer and splits without loading the model.

    A finished run has them in environment.json: it is finished only as long as they stay the same.
    """
    folder = hub.resolve(config.model.path)
    tokenizer = Tokenizer.load(config.model.tokenizer or folder)
    return _inputs(config, hub.fingerprint(folder), tokenizer.fingerprint, examples) | adapters(config)


def _inputs(config: Config, model: str, tokenizer: str, examples: Mapping[str, Sequence[Example]]) -> dict[str, str]:
    splits = {split: prepared.fingerprint(split, part) for split, part in examples.items()}
    return {"model": model, "tokenizer": tokenizer, **splits, **_own_layout(config)}


def _own_layout(config: Config) -> dict[str, str]:
    """Returns the fingerprint of a layout in the user's own file. For those of the package, the config has the name."""
    name = config.prompts.layout
    return {} if name in layouts.NAMES else {"layout": layouts.fingerprint(name)}


def adapters(config: Config) -> dict[str, str]:
    """Returns the fingerprints of the adapters that the roles start from. Only training reads them."""
    given = {key: getattr(config.lora, key) for key in ("init_inference", "init_generator")}
    return {key: peft.fingerprint(pathlib.Path(folder)) for key, folder in given.items() if folder}


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the config's mesh over these devices (all by default); UserError if its batches do not fit the mesh."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    schedule.check_micro_batches(Shapes(config, mesh, config.limits.buckets))
    return mesh


def model_options(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Returns the ModelConfig fields that no checkpoint holds; UserError if the devices lack the attention kernel."""
    platform = mesh.devices.flat[0].platform
    return {
        "compute_dtype": config.model.compute_dtype,
        "remat": config.model.remat,
        "frozen_dtype": config.model.frozen_dtype,
        "trained_dtype": config.model.trained_dtype,
        "attention": kernels.resolve(config.model.attention, platform, config.model.compute_dtype),
    }


def make_programs(config: Config, mesh: Mesh, model: ModelConfig) -> Programs:
    """Returns the programs of a run with this model; UserError if the limits exceed its context length."""
    longest = max(config.limits.signals + config.limits.summary, config.limits.prompt + config.limits.response)
    if longest > model.max_length:
        raise UserError(
            f"config.limits: prompts and answers of {longest} tokens exceed the context of {config.model.path},"
            f" {model.max_length} tokens; lower config.limits.signals, .summary, .prompt or .response"
        )
    lora = None
    if config.lora.rank:
        lora = LoraConfig(rank=config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets)
    policy = Policy(model, lora, mesh)
    return Programs(policy, programs.make_settings(config, policy))
