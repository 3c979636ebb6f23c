"""Trains the tiny base model of stylebook, popi_jax/assets/stylebook, from scratch: the tokenizer, then the weights.

    python experiments/pretrain_stylebook.py

It plays the part of a public instruct checkpoint: it writes English, follows a summary, and reads signals imprecisely.
All training examples come from training users, never from a held-out combination of tastes. The tasks:
  remark: one comment or profile -> a note of tastes that it states;
  pair: one pair of responses -> a note of tastes in which the preferred response differs;
  note: all of a user's signals -> a note of 1 to 6 random tastes;
  compare: summary and question -> a response that fits the summary, preferred over one that does not;
  follow: summary and question -> a response that fits each taste in the summary with probability FITS;
  bare: question -> a response of random style (the prompt that the reference reads);
  raw: signals and question -> a response that fits each of the user's tastes with probability RAW_FITS.
In the last lessons each taste in a note is correct only with probability RIGHT. The base model's summaries therefore
carry little information, but more accurate and complete ones are within its reach, and POPI can find them.
"""

import argparse
import dataclasses
import functools
import operator
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
import tokenizers
from transformers import PreTrainedTokenizerFast

from popi_jax.configs import quickstart
from popi_jax.data.builders import stylebook
from popi_jax.data.builders import stylebook_text as text
from popi_jax.data.builders.stylebook_exact import difference
from popi_jax.data.layouts import PLAIN, Told
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError
from popi_jax.model import folders, hub
from popi_jax.model.config import ModelConfig
from popi_jax.model.decoder import Decoder
from popi_jax.model.policy import Policy
from popi_jax.model.tokenizer import Tokenizer
from popi_jax.training import scoring

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RIGHT, FITS, RAW_FITS = 0.7, 0.9, 0.85
SURE, RANK_WEIGHT = 0.95, 3.0  # For compare: the target, and the weight relative to the nats per token.
SIGNALS = 5
# task -> (answers per prefix, tokens of a prefix, tokens of an answer).
SHAPES = {
    "remark": (4, 64, 22),
    "pair": (4, 104, 22),
    "note": (6, 240, 22),
    "compare": (4, 56, 32),
    "follow": (4, 56, 32),
    "bare": (8, 24, 32),
    "raw": (8, 256, 32),
}


@dataclasses.dataclass(frozen=True)
class Lessons:
    """One stage of the training.

    Attributes:
        updates: the number of updates.
        rows: the number of prefixes of each task in one update.
        right: the probability that a taste in a note is correct.
        rate: the peak learning rate.
    """

    updates: int
    rows: dict[str, int]
    right: float
    rate: float


_ALL = {"remark": 6, "pair": 4, "note": 10, "compare": 24, "bare": 2, "raw": 2}
_LAST = {"remark": 6, "pair": 4, "note": 8, "follow": 40, "bare": 4, "raw": 2}
# Short texts come first. A model that reads one signal and tells which response fits learns the rest quickly.
LESSONS = (
    Lessons(500, {"remark": 24, "pair": 12, "compare": 32, "bare": 2}, 1.0, 3.5e-3),
    Lessons(500, _ALL, 1.0, 3e-3),
    Lessons(100, _ALL, RIGHT, 1.5e-3),
    Lessons(250, _LAST, RIGHT, 2e-3),
)


def model_config(vocab_size: int) -> ModelConfig:
    """Returns the shape of the model, with about 0.2 million weights."""
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=64,
        n_layers=3,
        n_heads=2,
        n_kv_heads=2,
        head_dim=32,
        d_ff=192,
        tie_embeddings=True,
        max_length=1024,
    )


def train_tokenizer(folder: str, texts: list[str]) -> Tokenizer:
    """Trains a byte-level BPE with a ChatML template on `texts` and saves it in the hub's format."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    backend = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>")
    backend.chat_template = CHAT_TEMPLATE
    backend.save_pretrained(folder)
    return Tokenizer.load(folder)


def corpus(prompts: ml_collections.ConfigDict, users: int) -> list[str]:
    """Returns samples of all texts that the models read or write."""
    texts = []
    for i in range(users):
        example = stylebook.draw_example(0, "train", i, 6, 1)
        query = example.queries[0]
        texts += [
            PLAIN.inference_messages(example.signals, prompts.inference_instruction)[0]["content"],
            PLAIN.generator_messages(query.prompt, Told(example.persona), prompts.generator_instruction)[0]["content"],
            f"user\n{query.chosen}",
            f"assistant\n{example.persona}",
        ]
    return texts


Document = tuple[list[int], Callable[[], str]]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Writes the documents of the tasks: the tokens of a prompt, and a function that draws an answer to it."""

    tokenizer: Tokenizer
    prompts: ml_collections.ConfigDict
    right: float

    def remark(self, rng: np.random.Generator, example: Example) -> Document:
        """One comment or profile -> a note of the tastes that it states."""
        signal = next(signal for signal in example.signals if signal.kind != "pair")
        return self._note(rng, (signal,), text.read_statements(signal.text), 1.0)

    def pair(self, rng: np.random.Generator, example: Example) -> Document:
        """One pair -> a note of the tastes in which the preferred response differs."""
        signal = next(signal for signal in example.signals if signal.kind == "pair")
        gap_6 = difference(Query(signal.prompt, signal.chosen, signal.rejected))
        return self._note(rng, (signal,), {taste: int(gap) for taste, gap in enumerate(gap_6) if gap}, 1.0)

    def note(self, rng: np.random.Generator, example: Example) -> Document:
        """All signals -> a note of the user's tastes."""
        return self._note(rng, example.signals, dict(enumerate(_tastes(example))), self.right)

    def _note(
        self, rng: np.random.Generator, signals: Sequence[Signal], known: dict[int, int], right: float
    ) -> Document:
        messages = PLAIN.inference_messages(signals, self.prompts.inference_instruction)
        return self.tokenizer.render(messages), lambda: text.summary(_blur(rng, _some(rng, known), right))

    def compare(self, rng: np.random.Generator, example: Example) -> Document:
        """Summary and question -> alternately a response that fits, and one with 1 to 3 of the named tastes flipped."""
        named = _some(rng, dict(enumerate(_tastes(example))))
        topic, prompt = text.question(rng)
        messages = PLAIN.generator_messages(prompt, Told(text.summary(named)), self.prompts.generator_instruction)
        waiting: list[str] = []

        def respond() -> str:
            if not waiting:
                style = _style(rng, named)
                flipped = rng.permutation(list(named))[: rng.choice(stylebook.DIFFERING)]
                other = [-value if taste in flipped else value for taste, value in enumerate(style)]
                words = int(rng.integers(2**31))  # Both responses use the same choice of phrases.
                waiting.extend(text.response(np.random.default_rng(words), topic, s) for s in (other, style))
            return waiting.pop()

        return self.tokenizer.render(messages), respond

    def follow(self, rng: np.random.Generator, example: Example) -> Document:
        """Summary and question -> a response that mostly fits."""
        named = _some(rng, dict(enumerate(_tastes(example))))
        return self._answer(rng, Told(text.summary(named)), named, FITS)

    def bare(self, rng: np.random.Generator, example: Example) -> Document:
        """Question -> any response."""
        return self._answer(rng, None, {}, 0.5)

    def raw(self, rng: np.random.Generator, example: Example) -> Document:
        """Signals and question -> a response that mostly fits the user."""
        return self._answer(
            rng,
            Told(PLAIN.signals_text(example.signals), raw_signals=True),
            dict(enumerate(_tastes(example))),
            RAW_FITS,
        )

    def _answer(self, rng: np.random.Generator, told: Told | None, wanted: dict[int, int], fits: float) -> Document:
        topic, prompt = text.question(rng)
        messages = PLAIN.generator_messages(prompt, told, self.prompts.generator_instruction)

        def respond() -> str:
            return text.response(rng, topic, _style(rng, _blur(rng, wanted, fits)))

        return self.tokenizer.render(messages), respond


def _tastes(example: Example) -> np.ndarray:
    named = text.read_summary(example.persona)
    return np.array([named[taste] for taste in range(text.N_TASTES)])


def _some(rng: np.random.Generator, known: dict[int, int]) -> dict[int, int]:
    """Draws a random number of the known tastes, at least one."""
    tastes = rng.permutation(list(known))[: rng.integers(1, len(known) + 1)]
    return {int(taste): int(known[taste]) for taste in sorted(tastes)}


def _style(rng: np.random.Generator, wanted: dict[int, int]) -> list[int]:
    """Returns the wanted values, and random ones for the other tastes."""
    return [wanted[taste] if taste in wanted else int(rng.choice((1, -1))) for taste in range(text.N_TASTES)]


def _blur(rng: np.random.Generator, statements: dict[int, int], right: float) -> dict[int, int]:
    return {taste: value if rng.random() < right else -value for taste, value in statements.items()}


def batches(teacher: Teacher, rows: dict[str, int], seed: int) -> Iterator[dict[str, scoring.PrefixBatch]]:
    """Yields new batches endlessly, one PrefixBatch per task. Skips documents that exceed their shape."""
    rng = np.random.default_rng(seed)
    while True:
        step = {}
        for task, count in rows.items():
            answers, prefix_length, answer_length = SHAPES[task]
            prefix = np.zeros((count, prefix_length), np.int32)
            branches = np.zeros((count, answers, answer_length), np.int32)
            lengths, branch_lengths = np.zeros(count, np.int32), np.zeros((count, answers), np.int32)
            row = 0
            while row < count:
                example = stylebook.draw_example(seed, "train", int(rng.integers(2**31)), SIGNALS, 1)
                prompt, answer = getattr(teacher, task)(rng, example)
                drawn = [[*teacher.tokenizer.encode(answer()), teacher.tokenizer.end_id] for _ in range(answers)]
                if len(prompt) > prefix_length or max(map(len, drawn)) > answer_length:
                    continue
                prefix[row, : len(prompt)], lengths[row] = prompt, len(prompt)
                for n, ids in enumerate(drawn):
                    branches[row, n, : len(ids)], branch_lengths[row, n] = ids, len(ids)
                row += 1
            step[task] = scoring.PrefixBatch(prefix, lengths, branches, branch_lengths)
        yield step


def task_loss(decoder: Decoder, task: str, rows: scoring.PrefixBatch) -> jax.Array:
    """Returns the mean negative log-probability per answer token, in nats.

    For `compare` the mean is over the responses that fit, and a ranking loss is added: the cross-entropy of "the first
    fits better" under sigmoid(log-probability of the first - of the second). Its target is SURE, so that the odds stay
    finite.
    """
    logp_BxNxS, length_BxN = scoring.score(decoder, rows, chunk=8192).logp_BxNxS, rows.branch_length_BxN
    if task != "compare":
        return -logp_BxNxS.sum() / length_BxN.sum()
    margin_x = (logp_BxNxS[:, ::2] - logp_BxNxS[:, 1::2]).sum(-1)
    rank = SURE * jax.nn.softplus(-margin_x) + (1 - SURE) * jax.nn.softplus(margin_x)
    return -logp_BxNxS[:, ::2].sum() / length_BxN[:, ::2].sum() + RANK_WEIGHT * rank.mean()


def pretrain(params: Any, policy: Policy, batches: Iterator[Any], steps: int, lessons: Lessons) -> Any:
    """Minimises the sum of the tasks' losses; returns the new weights."""
    rate = optax.warmup_cosine_decay_schedule(0.0, lessons.rate, min(20, steps // 2), steps, 0.03 * lessons.rate)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))

    def loss(params: Any, batch: dict[str, scoring.PrefixBatch]) -> tuple[jax.Array, dict[str, jax.Array]]:
        decoder = policy.bind(params, None)
        losses = {task: task_loss(decoder, task, rows) for task, rows in batch.items()}
        return functools.reduce(operator.add, losses.values()), losses

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, opt_state: Any, batch: dict[str, scoring.PrefixBatch]) -> tuple[Any, Any, Any]:
        (_, losses), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses

    opt_state, started = tx.init(params), time.time()
    for step in range(1, steps + 1):
        params, opt_state, losses = update(params, opt_state, next(batches))
        if step % 25 == 0 or step == steps:
            shown = " ".join(f"{task} {float(value):.3f}" for task, value in losses.items())
            print(f"{step}/{steps} {time.time() - started:.0f} s, losses: {shown}", flush=True)
    return params


def main() -> None:
    """Trains the tokenizer and the weights, and writes the hub folder."""
    parser = argparse.ArgumentParser(description="Trains the tiny base model of stylebook.")
    parser.add_argument("--output", default="popi_jax/assets/stylebook", help="The hub folder to write.")
    parser.add_argument("--scale", type=float, default=1.0, help="Multiplies the number of updates.")
    parser.add_argument("--seed", type=int, default=0, help="The seed of the initial weights and the users.")
    args = parser.parse_args()
    try:
        folders.check_replaceable(pathlib.Path(args.output))  # Else hub.save would refuse it after the training.
    except UserError as error:
        parser.error(str(error))
    if not (0 < args.scale <= 1000 and 0 <= args.seed < 2**24):
        parser.error("--scale must be above 0 and at most 1000, --seed from 0 to 2**24 - 1")
    prompts = quickstart.get_config().prompts
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = train_tokenizer(scratch, corpus(prompts, 3000))
        config = model_config(tokenizer.vocab_size)
        policy = Policy(config)
        params = policy.init_base(jax.random.key(args.seed))
        for seed, lessons in enumerate(LESSONS, start=1000 + 10 * args.seed):
            steps = max(2, round(lessons.updates * args.scale))
            teacher = Teacher(tokenizer, prompts, lessons.right)
            params = pretrain(params, policy, batches(teacher, lessons.rows, seed), steps, lessons)
        hub.save(args.output, config, params, scratch)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
