"""One POPI iteration as a user of TRL would compose it: RLOOTrainer for q_phi, rewarded by a frozen generator, then
DPOTrainer for pi_theta on the pairs with the summaries that were drawn.

Both trainers are made once. The reference of the reward, which reads the question alone, is scored once, before.
"""

import time
from typing import Any

import datasets
import torch
import trl

from benchmarks.protocol import Channel
from benchmarks.trl_peer import STEPS, Job, TakeTurns


class Generator:
    """The generator as the reward sees it: log-probabilities of both responses under a prompt."""

    def __init__(self, job: Job, model: Any):
        self.job, self.model, self.tokenizer = job, model, job.tokenizer
        self.end = self.tokenizer.eos_token

    def pair_ids(self, message: str, user: dict[str, Any]) -> dict[str, list[int]]:
        """Ids of a prompt and of both responses."""
        texts = {"prompt_ids": self.job.render(message)}
        texts |= {f"{part}_ids": user[part] + self.end for part in ("chosen", "rejected")}
        return {name: self.tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}

    @torch.inference_mode()
    def logps(self, pairs: list[dict[str, list[int]]]) -> torch.Tensor:
        """Summed log-probabilities of y+ and y-, [rows, 2]; logits of the responses' positions alone."""
        sequences = [(pair["prompt_ids"], pair[part]) for pair in pairs for part in ("chosen_ids", "rejected_ids")]
        out = []
        batch = 2 * self.job.sizes.micro_pairs
        for start in range(0, len(sequences), batch):
            some = sequences[start : start + batch]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + r) for p, r in some], batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p + r)) for p, r in some], batch_first=True)
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            row = torch.cat([torch.full((len(r),), i) for i, (_, r) in enumerate(some)])
            place = torch.cat([torch.arange(len(p), len(p) + len(r)) for p, r in some])
            logits = self.model.lm_head(hidden[row, place - 1])
            logp = -torch.nn.functional.cross_entropy(logits, ids[row, place], reduction="none")
            out.append(torch.zeros(len(some)).index_add(0, row, logp))
        return torch.cat(out).reshape(-1, 2)


class Iteration(TakeTurns):
    """After each RLOO step, a DPO step on the same summaries; one measurement is both."""

    def __init__(self, channel: Channel, job: Job, generator: Generator, **setup: Any):
        super().__init__(channel, job, **setup)
        users = job.rows["popi"]
        self.generator, self.users = generator, users
        self.ref = generator.logps([generator.pair_ids(user["bare_message"], user) for user in users])
        self.pairs: list[dict[str, Any]] = []
        self.reward_s = 0.0
        self.dpo: trl.DPOTrainer | None = None

    def rewards(self, completions: list[str], user: list[int], **_: Any) -> list[float]:
        """-loss of the generator that is told this summary; RLOOTrainer's reward function."""
        started = time.perf_counter()
        mark = self.job.rows["mark"]
        own = [self.users[u] for u in user]
        self.pairs = [
            self.generator.pair_ids(some["query_message"].replace(mark, text.strip()), some)
            for some, text in zip(own, completions, strict=True)
        ]
        ref = self.ref[user]
        beta = self.job.sizes.beta
        h = (self.generator.logps(self.pairs) - ref) @ torch.tensor([1.0, -1.0])
        for pair, (chosen, rejected) in zip(self.pairs, ref.tolist(), strict=True):
            pair |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.reward_s = time.perf_counter() - started
        return (torch.nn.functional.logsigmoid(beta * h) / beta).tolist()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The generator's update."""
        assert self.dpo is not None
        rloo_s = time.perf_counter() - self.began
        started = time.perf_counter()
        self.dpo.model.train()
        self.dpo.train_dataset = datasets.Dataset.from_list(self.pairs)
        self.dpo.train()
        self.generator.model.eval()
        dpo_s = time.perf_counter() - started
        self.extra = {"rloo_s": rloo_s, "reward_s": self.reward_s, "dpo_s": dpo_s}
        super().on_step_end(args, state, control, **kwargs)


def popi_iteration(job: Job, channel: Channel) -> None:
    """RLOOTrainer.train, with a DPO step at the end of each of its steps."""
    sizes, users = job.sizes, job.rows["popi"]
    theta = job.load_model().eval()
    turns = Iteration(channel, job, Generator(job, theta))
    steps = sizes.popi_users * sizes.k // sizes.micro_pairs
    micro = {"per_device_train_batch_size": sizes.micro_pairs, "gradient_accumulation_steps": steps}
    precomputed = job.variant == "trl_precomputed"
    rows = [
        {
            "prompt": job.render(u["query_message"].replace(job.rows["mark"], "")),
            **{k: u[k] for k in ("chosen", "rejected")},
        }
        for u in users
    ]
    turns.dpo = trl.DPOTrainer(
        model=theta,
        ref_model=None,
        args=trl.DPOConfig(
            **job.arguments(max_steps=1, max_grad_norm=10.0, beta=sizes.beta, max_length=None, **micro),
            precompute_ref_log_probs=precomputed,
            model_init_kwargs=None,
        ),
        # To begin with; every iteration has pairs of its own.
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=job.tokenizer,
    )
    job.tokenizer.padding_side = "left"
    rloo = trl.RLOOTrainer(
        model=job.rows["model"],
        reward_funcs=turns.rewards,
        args=trl.RLOOConfig(
            **job.arguments(**micro, max_grad_norm=1.0, beta=sizes.kl_coef, model_init_kwargs={"dtype": "float32"}),
            num_generations=sizes.k,
            max_completion_length=sizes.summary,
            temperature=1.0,
            shuffle_dataset=False,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": job.render(user["message"]), "user": i} for i, user in enumerate(users)] * min(STEPS, 100)
        ),
        processing_class=job.tokenizer,
        callbacks=[turns],
    )
    rloo.train()
