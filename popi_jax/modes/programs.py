"""Every compiled program of a run, with its shardings and donation. --mode=compile compiles the same programs."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from popi_jax.config import Config, StepKind
from popi_jax.data import shapes
from popi_jax.model import sharding
from popi_jax.model.policy import Policy
from popi_jax.model.weights import Tree
from popi_jax.rollout import sampler
from popi_jax.training import metrics, optim, schedule, scoring, steps

mean_and_std = jax.jit(metrics.mean_and_std)


@functools.cache
def sample(policy: Policy) -> Callable[..., sampler.Samples]:
    """Returns `sampler.draw`(base, delta, prompt_BxT, prompt_length_B, key, *, ...), jitted with static options."""
    static = ("branches", "max_tokens", "temperature", "top_p", "stop_ids", "pad_id")
    return _jit(functools.partial(sampler.draw, policy=policy), policy, static_argnames=static)


@functools.cache
def score(policy: Policy, reduction: str) -> Callable[..., jax.Array]:
    """Returns the jitted function (base, theta, bins) -> `scoring.response_logps`, [R, 2], replicated."""

    def response_logps(base: Tree, theta: Tree | None, bins: Any) -> jax.Array:
        return scoring.response_logps(policy.bind(base, theta), bins, reduction)

    everywhere = None if policy.mesh is None else sharding.replicated(policy.mesh)
    return _jit(response_logps, policy, out_shardings=everywhere)


def _jit(fn: Callable, policy: Policy, **options: Any) -> Any:
    return jax.jit(fn, compiler_options=sharding.compiler_options(policy.mesh), **options)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of a run with this policy, on its mesh, and these settings of the train steps."""

    policy: Policy
    settings: steps.Settings

    @property
    def mesh(self) -> Mesh:
        """The mesh that all arrays are placed on."""
        assert self.policy.mesh is not None
        return self.policy.mesh

    @property
    def sample(self) -> Callable[..., sampler.Samples]:
        """Draws text, see `sample`."""
        return sample(self.policy)

    @property
    def score(self) -> Callable[..., jax.Array]:
        """Scores pairs, see `score`."""
        return score(self.policy, self.settings.logp_reduction)

    @functools.cached_property
    def train_steps(self) -> dict[StepKind, steps.Step]:
        """The train steps, (state, base, batch) -> (state, metrics). The old state is donated."""
        out_shardings = (self.state_shardings, sharding.replicated(self.mesh))
        return {
            kind: _jit(
                functools.partial(step, settings=self.settings),
                self.policy,
                donate_argnums=0,
                out_shardings=out_shardings,
            )
            for kind, step in steps.STEPS.items()
        }

    def init_state(self, key: jax.Array, base: Tree) -> steps.TrainState:
        """Returns the state before the first step, created sharded."""
        init = functools.partial(steps.init_state, settings=self.settings)
        return jax.jit(init, out_shardings=self.state_shardings)(key, base)

    @functools.cached_property
    def state_shardings(self) -> steps.TrainState:
        """A NamedSharding for every leaf of the state: moments like their parameters, scalars replicated."""
        delta, everywhere = self.policy.delta_shardings(self.mesh), sharding.replicated(self.mesh)

        def optimizer(tx: Any) -> Any:
            if tx is None:
                return None
            return sharding.optimizer_shardings(tx, self.policy.abstract_delta(), delta, self.mesh)

        return steps.TrainState(
            step=everywhere,
            phi=None if self.settings.tx_phi is None else delta,
            theta=delta,
            opt_phi=optimizer(self.settings.tx_phi),
            opt_theta=optimizer(self.settings.tx_theta),
            baseline=everywhere,
        )

    def abstract_state(self) -> steps.TrainState:
        """Returns the shapes, types and shardings of the state, which a checkpoint is restored onto."""
        abstract = jax.eval_shape(
            lambda base: steps.init_state(jax.random.key(0), base, self.settings), self.policy.abstract_base()
        )
        return shapes.placed(abstract, self.state_shardings)

    def abstract_base(self) -> Tree:
        """Returns the shapes, types and shardings of the frozen weights."""
        return shapes.placed(self.policy.abstract_base(), self.policy.base_shardings(self.mesh))


def make_settings(config: Config, policy: Policy) -> steps.Settings:
    """Returns the static settings of the train steps."""
    n_phi, n_theta = schedule.update_counts(config)
    tx_phi = None
    if config.method == "popi":
        tx_phi = optim.make_optimizer(config.optim, config.optim.lr_inference, config.optim.clip_inference, n_phi)
    return steps.Settings(
        policy=policy,
        tx_phi=tx_phi,
        tx_theta=optim.make_optimizer(config.optim, config.optim.lr_generator, config.optim.clip_generator, n_theta),
        loss=config.objective.loss,
        beta=config.objective.beta,
        logp_reduction=config.objective.logp_reduction,
        advantage=config.objective.advantage,
        baseline_decay=config.objective.baseline_decay,
        kl=config.objective.kl,
        kl_coef=config.objective.kl_coef,
        kl_decay=config.objective.kl_decay,
        total_steps=schedule.total_steps(config),
        # Relative to a generator that is told nothing, a summary to imitate must help.
        least_reward=0.0 if config.objective.relative_reward else -math.inf,
        temperature=config.sampling.temperature,
        seed=config.seed,
    )
