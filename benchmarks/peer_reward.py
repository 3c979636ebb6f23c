"""The reward of a summary as users of the peers would write it, for either of them: they differ in how they score.

numpy and a tokenizer of transformers alone: workers of both environments read it.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np


def render(tokenizer: Any, message: str) -> str:
    """The prompt of one user turn."""
    messages = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class Generator:
    """pi_theta as the reward sees it: log-probabilities of both responses under a prompt."""

    def __init__(self, rows: dict[str, Any], tokenizer: Any):
        """Scores the reference, which reads the question alone: the model as it is before any step."""
        self.tokenizer, self.users, self.mark = tokenizer, rows["popi"], rows["mark"]
        self.beta = rows["sizes"]["beta"]
        self.pairs: list[dict[str, Any]] = []  # Those of the last rewards, for the step that follows.
        self.reward_s = 0.0
        self.ref_Ux2 = self.logps([self.pair_ids(user["bare_message"], user) for user in self.users])

    def logps(self, pairs: Sequence[dict[str, Any]]) -> np.ndarray:
        """Summed log-probabilities of y+ and y-, [pairs, 2]."""
        raise NotImplementedError

    def pair_ids(self, message: str, user: dict[str, Any]) -> dict[str, Any]:
        """Ids of a prompt and of both responses."""
        texts = {"prompt_ids": render(self.tokenizer, message)}
        texts |= {f"{part}_ids": user[part] + self.tokenizer.eos_token for part in ("chosen", "rejected")}
        return {name: self.tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}

    def told(self, summary: str, user: dict[str, Any]) -> dict[str, Any]:
        """The pair of a user under a summary."""
        return self.pair_ids(user["query_message"].replace(self.mark, summary.strip()), user)

    def rewards(self, completions: Sequence[str], user: Sequence[int], **_: Any) -> list[float]:
        """-loss of the generator that is told this summary; the reward function of both peers' trainers."""
        started = time.perf_counter()
        self.pairs = [self.told(text, self.users[u]) for u, text in zip(user, completions, strict=True)]
        ref_Rx2 = self.ref_Ux2[np.asarray(user)]
        h_R = (self.logps(self.pairs) - ref_Rx2) @ np.array([1.0, -1.0])
        for pair, (chosen, rejected) in zip(self.pairs, ref_Rx2.tolist(), strict=True):
            pair |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.reward_s = time.perf_counter() - started
        return (-np.logaddexp(0, -self.beta * h_R) / self.beta).tolist()

    def check(self) -> dict[str, Any]:
        """The rewards of summaries that are given, for the other side to agree with."""
        return {"rewards": self.rewards([user["persona"] for user in self.users], range(len(self.users)))}
