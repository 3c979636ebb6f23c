"""The rows that both sides work on. One file has them as texts for the peers and as examples for our side.

They come from P-Soups if its file is given, else they are random words of the same lengths. No text leaves the work
folder.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.cases import Sizes
from popi_jax import config
from popi_jax.configs import psoups_smollm2
from popi_jax.data.builders import psoups
from popi_jax.data.encoding import Encoder
from popi_jax.data.layouts import PLAIN, Told
from popi_jax.data.schema import Example, Query, Signal
from popi_jax.errors import UserError
from popi_jax.model import hub
from popi_jax.model.tokenizer import Tokenizer

# Tunix 0.1.7's Llama3 rotates with this base, whatever its config says.
TUNIX_ROPE_THETA = 1_000_000.0
MARK = "\ue000summary\ue000"  # A peer replaces it with the summary.
WORDS = (
    "time people water light story answer little reason simple number world morning often because every paper music "
    "garden window letter small bright under across mountain river always clear quiet science method between children "
    "winter market perhaps careful history evening question station island yellow common thought measure second whole"
).split()


def make_config(model: str, sizes: Sizes) -> config.Config:
    """The experiment to measure: configs/psoups_smollm2.py with the sizes' lengths."""
    c = psoups_smollm2.get_config()
    c.name = "benchmark"
    c.model.path = model
    c.model.remat = "dots"  # Takes less memory than "none" and no more time: fewer arrays are written and read.
    c.lora.rank = 0
    c.lora.targets = sizes.lora_targets
    c.data.signals_per_user = sizes.signals_per_user
    c.limits.signals, c.limits.prompt = sizes.limit_signals, sizes.limit_prompt
    c.limits.response, c.limits.bin = sizes.limit_response, sizes.limit_bin
    c.limits.buckets = ()  # Chosen from the rows.
    c.limits.summary = sizes.summary
    # Left out, because the peers would have to imitate them.
    c.prompts.summary_start = c.prompts.summary_stop = ""
    c.sampling.k, c.sampling.k_generator, c.sampling.temperature = sizes.k, 0, 1.0
    c.objective.kl_coef, c.objective.beta = sizes.kl_coef, sizes.beta
    c.schedule.name, c.schedule.steps = "joint", 1000
    c.optim.schedule, c.optim.warmup_steps = "constant", 0
    c.optim.lr_inference = c.optim.lr_generator = sizes.learning_rate
    c.train.users_per_step = sizes.pairs
    c.eval.users_per_batch = sizes.evaluation_batch
    return config.parse(c)


def words(rng: np.random.Generator, tokenizer: Tokenizer, tokens: int) -> str:
    """Random words of about this many tokens."""
    text: list[str] = []
    # In a few strides, because the tokens of a word depend on the tokenizer.
    while (missing := tokens - len(tokenizer.encode(" ".join(text)))) > 0:
        text += [str(word) for word in rng.choice(WORDS, max(1, missing // 4))]
    return " ".join(text)


def synthetic(tokenizer: Tokenizer, sizes: Sizes, count: int, seed: int = 0) -> list[Example]:
    """Users with signals and one query each, of random words. Lengths vary by half around the sizes' averages."""
    rng = np.random.default_rng(seed)

    def text(average: int) -> str:
        return words(rng, tokenizer, max(2, round(average * rng.uniform(0.5, 1.5))))

    def example(i: int) -> Example:
        signals = tuple(
            Signal("pair", text(sizes.question), text(sizes.response), text(sizes.response))
            for _ in range(sizes.signals_per_user)
        )
        query = Query(text(sizes.question), text(sizes.response), text(sizes.response), provenance=f"synthetic#{i}")
        return Example(f"synthetic#{i}", "train", signals, (query,), persona=words(rng, tokenizer, 14))

    return [example(i) for i in range(count)]


def long_signals(model: str, sizes: Sizes, tokens: int) -> Example:
    """A user whose signals fill a prompt of at most `tokens`, to the nearest word."""
    tokenizer, prompts = Tokenizer.load(hub.resolve(model)), make_config(model, sizes).prompts
    rng = np.random.default_rng(tokens)
    query = Query(words(rng, tokenizer, 16), words(rng, tokenizer, 32), words(rng, tokenizer, 32))
    text = words(rng, tokenizer, tokens).split()
    while True:
        signals = (Signal("profile", text=" ".join(text)),)
        messages = PLAIN.inference_messages(signals, prompts.inference_instruction, prompts.pair_fields)
        if len(text) == 1 or len(tokenizer.render(messages)) <= tokens:
            return Example("long", "train", signals, (query,))
        text.pop()


def nearest(examples: Sequence[Example], length: Callable[[Example], int], target: int, count: int) -> list[Example]:
    """The `count` examples whose lengths are nearest to the target, in their order."""
    order = sorted(range(len(examples)), key=lambda i: (abs(length(examples[i]) - target), i))
    return [examples[i] for i in sorted(order[:count])]


def build(model: str, sizes: Sizes, data: pathlib.Path | None) -> dict[str, Any]:
    """All rows of all cases; JSON."""
    settings = make_config(model, sizes)
    folder = hub.resolve(model)
    tokenizer = Tokenizer.load(folder)
    encoder = Encoder(tokenizer, settings.prompts, settings.limits)
    if data is None:
        examples = synthetic(tokenizer, sizes, 4 * sizes.evaluation_pairs)
    else:
        splits = psoups.read_psoups(data, signals_per_user=sizes.signals_per_user, train_draws=2)
        examples = splits["train"] + splits["test"]
    examples = [example for example in examples if fits(encoder, example)]
    most = max(sizes.pairs, sizes.evaluation_pairs, sizes.sampling_users, sizes.popi_users)
    if len(examples) < most:
        raise UserError(f"--data={data}: {len(examples)} rows within the benchmark's limits; {most} are needed")

    def pair_tokens(example: Example) -> int:
        prompt, *responses = encoder.pair(example.queries[0], encoder.raw_signals(example))
        return len(prompt) + max(map(len, responses))

    def signal_tokens(example: Example) -> int:
        return len(encoder.signals(example))

    chosen = {
        "dpo": nearest(examples, pair_tokens, sizes.pair_tokens, sizes.pairs),
        "evaluation": nearest(examples, pair_tokens, sizes.pair_tokens, sizes.evaluation_pairs),
        "sampling": nearest(examples, signal_tokens, sizes.sampling_signals, sizes.sampling_users),
        "popi": nearest(examples, signal_tokens, sizes.popi_signals, sizes.popi_users),
    }
    summaries = [peer_pair(encoder, e, Told(e.persona)) for e in chosen["dpo"]]
    return {
        "model": str(folder.resolve()),
        "data": "synthetic" if data is None else "P-Soups",
        "sizes": dataclasses.asdict(sizes),
        "stop_ids": list(tokenizer.stop_ids),
        "pad_id": tokenizer.pad_id,
        "mark": MARK,
        "dpo_signals": [peer_pair(encoder, e, encoder.raw_signals(e)) for e in chosen["dpo"]],
        "dpo_summaries": summaries,
        "evaluation": [peer_pair(encoder, e, encoder.raw_signals(e)) for e in chosen["evaluation"]],
        "sampling": [peer_user(encoder, e) for e in chosen["sampling"]],
        "popi": [peer_user(encoder, e) for e in chosen["popi"]],
        "examples": {name: [dataclasses.asdict(e) for e in own] for name, own in chosen.items()},
        "lengths": {
            "pair_tokens": _mean(map(pair_tokens, chosen["dpo"])),
            "summary_pair_tokens": _mean(len(pair["prompt_ids"]) for pair in summaries),
            "evaluation_pair_tokens": _mean(map(pair_tokens, chosen["evaluation"])),
            "sampling_prompt_tokens": _mean(map(signal_tokens, chosen["sampling"])),
            "popi_prompt_tokens": _mean(map(signal_tokens, chosen["popi"])),
        },
    }


def fits(encoder: Encoder, example: Example) -> bool:
    """Whether all signals of the example are within the limits, because the peers read all of them."""
    try:
        encoder.signals(example)
        encoder.check(example.queries[0], encoder.raw_signals(example))
    except UserError:
        return False
    return not any(encoder.overflow.of(example.user, f"limits.{limit}") for limit in ("signals", "prompt"))


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 1)


def peer_pair(encoder: Encoder, example: Example, told: Told) -> dict[str, Any]:
    """A preference pair for a peer: texts that it renders and tokenises itself, and the ids that must result."""
    query = example.queries[0]
    prompt, chosen, rejected = encoder.pair(query, told)
    (message,) = encoder.layout.generator_messages(query.prompt, told, encoder.prompts.generator_instruction)
    return {
        "message": message["content"],
        "chosen": query.chosen,
        "rejected": query.rejected,
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
    }


def peer_user(encoder: Encoder, example: Example) -> dict[str, Any]:
    """A user for a peer: the prompt of the inference model, and the query with a place for the summary."""
    query, prompts, layout = example.queries[0], encoder.prompts, encoder.layout
    (signals,) = layout.inference_messages(example.signals, prompts.inference_instruction, prompts.pair_fields)
    (informed,) = layout.generator_messages(query.prompt, Told(MARK), prompts.generator_instruction)
    (bare,) = layout.generator_messages(query.prompt, None, prompts.generator_instruction)
    return {
        "message": signals["content"],
        "prompt_ids": encoder.signals(example),
        "query_message": informed["content"],
        "bare_message": bare["content"],
        "chosen": query.chosen,
        "rejected": query.rejected,
        "persona": example.persona,
    }


def read_examples(rows: dict[str, Any], name: str) -> list[Example]:
    """The examples that `build` chose."""
    return [
        Example(
            signals=tuple(Signal(**signal) for signal in fields["signals"]),
            queries=tuple(Query(**query) for query in fields["queries"]),
            **{key: fields[key] for key in ("user", "split", "persona")},
        )
        for fields in rows["examples"][name]
    ]


def write(work: pathlib.Path, rows: dict[str, Any]) -> None:
    """Writes the rows where the workers read them."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def write_tunix_rows(work: pathlib.Path, rows: dict[str, Any]) -> None:
    """Writes the same rows into another folder, with a copy of the model whose rotary base is TUNIX_ROPE_THETA.

    No time depends on the base, but losses and tokens agree only if both sides have the same model.
    """
    given, model = pathlib.Path(rows["model"]), work / "model"
    shutil.rmtree(model, ignore_errors=True)  # --work may have been used before.
    model.mkdir(parents=True)
    for path in given.iterdir():
        if path.name != "config.json":
            (model / path.name).symlink_to(path)
    told = json.loads((given / "config.json").read_text(encoding="utf-8"))
    told |= {"rope_theta": TUNIX_ROPE_THETA, "rope_scaling": None, "rope_parameters": None}
    (model / "config.json").write_text(json.dumps(told), encoding="utf-8")
    write(work, rows | {"model": str(model)})
