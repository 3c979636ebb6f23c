"""One POPI iteration as a user of Tunix would compose it: GRPOLearner with leave-one-out advantages for q_phi, rewarded
by a frozen generator, then DPOTrainer for pi_theta on the pairs with the summaries that were drawn. Both are made once.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from tunix.rl import rl_cluster as cluster_lib
from tunix.rl.grpo import grpo_learner as grpo_lib
from tunix.rl.rollout import base_rollout
from tunix.sft import utils
from tunix.sft.dpo import dpo_trainer as dpo_lib

from benchmarks.peer_reward import Generator, render
from benchmarks.protocol import Channel
from benchmarks.tunix_peer import STEPS, WARMUP, Job, adamw, batches


class NnxGenerator(Generator):
    """Scores with the model that its DPOTrainer trains."""

    def __init__(self, job: Job):
        self.job, sizes = job, job.sizes
        config = dpo_lib.DPOTrainingConfig(
            eval_every_n_steps=STEPS,
            beta=sizes.beta,
            gradient_accumulation_steps=sizes.popi_users * sizes.k // sizes.micro_pairs,
        )
        self.trainer = dpo_lib.DPOTrainer(job.load_model(), job.load_model(), adamw(job, 10.0), config)
        self.trainer.is_managed_externally = True  # It would end with its first `train` otherwise.
        self.width = 0
        super().__init__(job.rows, job.load_tokenizer())
        # Of all iterations, for each width is compiled; a summary's text may take more tokens than it was drawn in.
        self.width = max(len(self.told("", user)["prompt_ids"]) for user in self.users) + sizes.summary

    def batches(self, pairs: Sequence[dict[str, Any]]) -> list[dpo_lib.TrainingInput]:
        """The pairs in micro-batches, as wide as any before."""
        self.width = max(self.width, *(len(pair["prompt_ids"]) for pair in pairs))
        return batches(pairs, self.job.sizes.micro_pairs, self.width)

    def logps(self, pairs: Sequence[dict[str, Any]]) -> np.ndarray:
        """As the class above, by Tunix's own function."""
        out = []
        for batch in self.batches(pairs):
            responses = np.concatenate([batch.chosen_ids, batch.rejected_ids])
            response_mask = np.concatenate([batch.chosen_mask, batch.rejected_mask])
            ids = np.concatenate([np.tile(batch.prompt_ids, (2, 1)), responses], 1)
            mask = jax.numpy.asarray(np.concatenate([np.tile(batch.prompt_mask, (2, 1)), response_mask], 1))
            where = utils.build_positions_from_mask(mask), utils.make_causal_attn_mask(mask)
            both = dpo_lib.compute_logps(self.trainer.model, ids, *where, responses.shape[1], response_mask)
            out.append(np.stack(both, 1))
        return np.concatenate(out)

    def step(self) -> None:
        """The DPO step on the pairs of the last rewards, to its end."""
        self.trainer.train(self.batches(self.pairs))
        jax.block_until_ready(nnx.state(self.trainer.model))


class Iteration:
    """GRPO steps of the learner, each with a DPO step on the same summaries after it; one measurement is both."""

    def __init__(self, channel: Channel, job: Job):
        self.channel, self.job = channel, job
        self.generator = NnxGenerator(job)
        self.learner = self._learner()

    def _learner(self) -> grpo_lib.GRPOLearner:
        job, sizes = self.job, self.job.sizes
        mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))
        roles = (cluster_lib.Role.ACTOR, cluster_lib.Role.REFERENCE, cluster_lib.Role.ROLLOUT)
        longest = max(len(user["prompt_ids"]) for user in self.generator.users)
        # Sizes are in prompts, of which each has K summaries.
        micro = max(1, sizes.micro_pairs // sizes.k)
        config = cluster_lib.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=cluster_lib.RLTrainingConfig(
                actor_optimizer=adamw(job, 1.0),
                eval_every_n_steps=STEPS,
                max_steps=STEPS,
                mini_batch_size=sizes.popi_users,
                train_micro_batch_size=micro,
                rollout_micro_batch_size=sizes.popi_users,
                compute_logps_micro_batch_size=micro,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=sizes.summary,
                max_prompt_length=longest,
                kv_cache_size=longest + sizes.summary,
                temperature=1.0,
                eos_tokens=job.rows["stop_ids"],
            ),
        )
        models = {"actor": job.load_model(), "reference": job.load_model()}
        cluster = cluster_lib.RLCluster(**models, tokenizer=self.generator.tokenizer, cluster_config=config)
        algorithm = grpo_lib.GRPOConfig(advantage_estimator="rloo", num_generations=sizes.k, beta=sizes.kl_coef)
        return grpo_lib.GRPOLearner(cluster, algorithm, self.generator.rewards)

    def turns(self) -> Iterator[dict[str, Any]]:
        """The same users for every step, each when the driver wants it.

        The learner asks for a batch when its step on the one before is done; the generator's step is taken then.
        """
        texts = [render(self.generator.tokenizer, user["message"]) for user in self.generator.users]
        batch = {"prompts": texts, "user": np.arange(len(texts))}
        load_s = time.perf_counter() - self.job.started
        started = time.perf_counter()
        for _ in range(WARMUP):
            yield batch
            self.generator.step()
        self.channel.ready(load_s=load_s, warmup_s=time.perf_counter() - started, width=self.generator.width)
        while self.channel.wait():
            started = time.perf_counter()
            yield batch
            jax.block_until_ready(nnx.state(self.learner.rl_cluster.actor_trainer.model))
            grpo_s = time.perf_counter() - started
            self.generator.step()
            taken = time.perf_counter() - started
            # A turn that is wider than the one before holds compiling.
            extra = {"reward_s": self.generator.reward_s, "width": self.generator.width}
            self.channel.done(taken, grpo_s=grpo_s, dpo_s=taken - grpo_s, **extra)


def popi_iteration(job: Job, channel: Channel) -> None:
    """GRPOLearner.train, with a DPO step at the end of each of its steps."""
    iteration = Iteration(channel, job)
    iteration.learner.train(iteration.turns())
