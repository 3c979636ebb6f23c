"""One POPI iteration as a user of TRL would compose it: RLOOTrainer for q_phi, rewarded by a frozen generator, then
DPOTrainer for pi_theta on the pairs with the summaries that were drawn. Both trainers are made once.
"""

import time
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
import trl

from benchmarks.peer_reward import Generator, render
from benchmarks.protocol import Channel
from benchmarks.trl_peer import STEPS, Job, TakeTurns


class TorchGenerator(Generator):
    """Scores with the model of transformers."""

    def __init__(self, job: Job):
        self.model = job.load_model().eval()
        self.batch = 2 * job.sizes.micro_pairs
        super().__init__(job.rows, job.tokenizer)

    @torch.inference_mode()
    def logps(self, pairs: Sequence[dict[str, Any]]) -> np.ndarray:
        """As the class above; logits of the responses' positions alone."""
        sequences = [(pair["prompt_ids"], pair[part]) for pair in pairs for part in ("chosen_ids", "rejected_ids")]
        out = []
        for start in range(0, len(sequences), self.batch):
            some = sequences[start : start + self.batch]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + r) for p, r in some], batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p + r)) for p, r in some], batch_first=True)
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            row = torch.cat([torch.full((len(r),), i) for i, (_, r) in enumerate(some)])
            place = torch.cat([torch.arange(len(p), len(p) + len(r)) for p, r in some])
            logits = self.model.lm_head(hidden[row, place - 1])
            logp = -torch.nn.functional.cross_entropy(logits, ids[row, place], reduction="none")
            out.append(torch.zeros(len(some)).index_add(0, row, logp))
        return torch.cat(out).reshape(-1, 2).numpy()


class Iteration(TakeTurns):
    """After each RLOO step, a DPO step on the same summaries; one measurement is both."""

    def __init__(self, channel: Channel, job: Job, generator: TorchGenerator, dpo: trl.DPOTrainer):
        super().__init__(channel, job)
        self.generator, self.dpo = generator, dpo

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The generator's update."""
        rloo_s = time.perf_counter() - self.began
        started = time.perf_counter()
        self.dpo.model.train()
        self.dpo.train_dataset = datasets.Dataset.from_list(self.generator.pairs)
        self.dpo.train()
        self.generator.model.eval()
        dpo_s = time.perf_counter() - started
        self.extra = {"rloo_s": rloo_s, "reward_s": self.generator.reward_s, "dpo_s": dpo_s}
        super().on_step_end(args, state, control, **kwargs)


def dpo_trainer(job: Job, generator: TorchGenerator, **micro: int) -> trl.DPOTrainer:
    """The trainer of the generator's model."""
    rows = [
        {
            "prompt": render(job.tokenizer, user["query_message"].replace(generator.mark, "")),
            **{part: user[part] for part in ("chosen", "rejected")},
        }
        for user in generator.users
    ]
    return trl.DPOTrainer(
        model=generator.model,
        ref_model=None,
        args=trl.DPOConfig(
            **job.arguments(max_steps=1, max_grad_norm=10.0, beta=job.sizes.beta, max_length=None, **micro),
            precompute_ref_log_probs=job.variant == "trl_precomputed",
            model_init_kwargs=None,
        ),
        # To begin with; every iteration has pairs of its own.
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=job.tokenizer,
    )


def popi_iteration(job: Job, channel: Channel) -> None:
    """RLOOTrainer.train, with a DPO step at the end of each of its steps."""
    sizes, generator = job.sizes, TorchGenerator(job)
    steps = sizes.popi_users * sizes.k // sizes.micro_pairs
    micro = {"per_device_train_batch_size": sizes.micro_pairs, "gradient_accumulation_steps": steps}
    turns = Iteration(channel, job, generator, dpo_trainer(job, generator, **micro))
    job.tokenizer.padding_side = "left"
    prompts = [{"prompt": render(job.tokenizer, user["message"]), "user": i} for i, user in enumerate(generator.users)]
    rloo = trl.RLOOTrainer(
        model=job.rows["model"],
        reward_funcs=generator.rewards,
        args=trl.RLOOConfig(
            **job.arguments(**micro, max_grad_norm=1.0, beta=sizes.kl_coef, model_init_kwargs={"dtype": "float32"}),
            num_generations=sizes.k,
            max_completion_length=sizes.summary,
            temperature=1.0,
            shuffle_dataset=False,
        ),
        train_dataset=datasets.Dataset.from_list(prompts * min(STEPS, 100)),
        processing_class=job.tokenizer,
        callbacks=[turns],
    )
    rloo.train()
