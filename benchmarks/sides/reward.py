"""The reward of a summary, as users of TRL or Tunix would write it. The two differ only in how they score.

numpy and a transformers tokenizer only, because both environments import this module.
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
    """pi_theta as the reward sees it: log-probabilities of both responses under a prompt.

    The reference is the untrained model, which reads the question alone.
    """

    def __init__(self, rows: dict[str, Any], tokenizer: Any):
        self.tokenizer, self.users, self.mark = tokenizer, rows["popi"], rows["mark"]
        self.beta = rows["sizes"]["beta"]
        self.pairs: list[dict[str, Any]] = []  # From the last call of `rewards`, for the DPO step after it.
        self.reward_s = 0.0
        self.ref_Ux2 = self.logps([self.pair_ids(user["bare_message"], user) for user in self.users])

    def logps(self, pairs: Sequence[dict[str, Any]]) -> np.ndarray:
        """Summed log-probabilities of y+ and y-, [pairs, 2]."""
        raise NotImplementedError

    def pair_ids(self, message: str, user: dict[str, Any]) -> dict[str, Any]:
        """Token ids of a prompt and of both responses."""
        texts = {"prompt_ids": render(self.tokenizer, message)}
        texts |= {f"{part}_ids": user[part] + self.tokenizer.eos_token for part in ("chosen", "rejected")}
        return {name: self.tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}

    def told(self, summary: str, user: dict[str, Any]) -> dict[str, Any]:
        """The user's pair with a summary in the prompt."""
        return self.pair_ids(user["query_message"].replace(self.mark, summary.strip()), user)

    def rewards(self, completions: Sequence[str], user: Sequence[int], **_: Any) -> list[float]:
        """The generator's negative loss given each summary; the reward function of both peers' trainers."""
        started = time.perf_counter()
        self.pairs = [self.told(text, self.users[u]) for u, text in zip(user, completions, strict=True)]
        ref_Rx2 = self.ref_Ux2[np.asarray(user)]
        h_R = (self.logps(self.pairs) - ref_Rx2) @ np.array([1.0, -1.0])
        for pair, (chosen, rejected) in zip(self.pairs, ref_Rx2.tolist(), strict=True):
            pair |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.reward_s = time.perf_counter() - started
        return (-np.logaddexp(0, -self.beta * h_R) / self.beta).tolist()

    def persona_rewards(self) -> list[float]:
        """The reward of each user's persona as a summary, for the check."""
        return self.rewards([user["persona"] for user in self.users], range(len(self.users)))
