"""--mode=summarize and --mode=generate: writes summaries of users and personalized responses with a trained run."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.progress

from popi_jax.config import Config
from popi_jax.data import files, prompts, users
from popi_jax.data.schema import Example
from popi_jax.errors import UserError
from popi_jax.modes import runfiles
from popi_jax.modes.evaluate import trained
from popi_jax.rollout import text
from popi_jax.training.rng import stream_key


def summarize(
    config: Config, workdir: pathlib.Path, input_path: pathlib.Path, output_path: pathlib.Path, step: int | None
) -> None:
    """Writes one summary per user of a users.jsonl. Resumes an earlier call that was interrupted.

    A line of the output has the fields "user", "summary", "summary_tokens", "signal_tokens", "signals_dropped" (to fit
    limits.signals, with on_overflow = "drop"), "finished", "step" (the checkpoint's), "sampling" (temperature and
    top_p) and "signals" (a digest of the signals that the model read).
    """
    runfiles.one_process("summarize")
    examples = users.read_users(input_path, require_queries=False)
    run, state = trained(config, workdir, step)
    encoder, sampler, sampling = run.encoder, run.sampler, text.in_use(config)
    for example in examples:  # Reports an exceeded limit before the first summary is drawn.
        encoder.signals(example)

    def identity(example: Example) -> dict[str, Any]:
        digest = hashlib.sha256(str(encoder.signals(example)).encode()).hexdigest()[:12]
        return {"user": example.user, "step": int(state.step), "sampling": _shown(sampling), "signals": digest}

    def lines(part: Sequence[Example], batch: int) -> Iterator[dict[str, Any]]:
        key = stream_key(config.seed, "personalize", batch)
        drawn = sampler.summaries(state.phi, part, key, sampling, k=1)
        for i, example in enumerate(part):
            yield {
                "user": example.user,
                "summary": drawn.texts_UxK[i][0],
                "summary_tokens": encoder.cost(drawn.texts_UxK[i][0]),
                "signal_tokens": int(drawn.prefix_length_B[i]),
                "signals_dropped": encoder.overflow.of(example.user, "limits.signals"),
                "finished": bool(drawn.finished_UxK[i, 0]),
                **identity(example),
            }

    _resumable(output_path, examples, identity, lines, sampling.batch_size, "summaries")
    print(encoder.overflow)


def generate(
    config: Config, workdir: pathlib.Path, input_path: pathlib.Path, output_path: pathlib.Path, step: int | None
) -> None:
    """Writes one personalized response per prompt.

    A line of the input has "prompt", and either "summary" or a "user" of the summaries.jsonl in the same folder.
    A line of the output adds "response", "response_tokens", "finished", "step" (the checkpoint's) and "sampling".
    """
    runfiles.one_process("generate")
    entries = prompts.read_prompts(input_path)
    run, state = trained(config, workdir, step)
    encoder, sampler, sampling = run.encoder, run.sampler, text.in_use(config)
    for entry in entries:
        encoder.check_prompt(entry["prompt"], entry["summary"])

    def identity(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | {"step": int(state.step), "sampling": _shown(sampling)}

    def lines(part: Sequence[dict[str, Any]], batch: int) -> Iterator[dict[str, Any]]:
        drawn = sampler.draw(
            state.theta,
            [encoder.prompt(entry["prompt"], entry["summary"]) for entry in part],
            stream_key(config.seed, "respond", batch),
            sampling,
            branches=1,
            max_tokens=config.eval.response_tokens,
        )
        for i, entry in enumerate(part):
            tokens, finished = int(drawn.samples.length_BxN[i, 0]), bool(drawn.finished_UxK[i, 0])
            response = {"response": drawn.texts_UxK[i][0], "response_tokens": tokens, "finished": finished}
            yield identity(entry) | response

    _resumable(output_path, entries, identity, lines, sampling.batch_size, "responses")


def _shown(sampling: text.Sampling) -> str:
    return f"temperature {sampling.temperature}, top_p {sampling.top_p}"


def _resumable(
    output: pathlib.Path,
    entries: Sequence[Any],
    identity: Callable[[Any], dict[str, Any]],
    lines: Callable[[Sequence[Any], int], Iterator[dict[str, Any]]],
    size: int,
    what: str,
) -> None:
    """Writes the lines of whole batches, and skips the batches that the output already has.

    The existing lines must have the fields of `identity`, which say what a line was made from.
    """
    if output.exists():  # Drops an incomplete last line.
        there = output.read_text(encoding="utf-8")
        files.write_text(output, there[: there.rfind("\n") + 1])
    present = files.read_jsonl(output, "choose another --output")
    if len(present) > len(entries):
        raise UserError(f"{output}: has {len(present)} lines, but the input {len(entries)}; choose another --output")
    whole = len(present) // size * size if len(present) < len(entries) else len(entries)
    for number, (line, entry) in enumerate(zip(present[:whole], entries, strict=False), start=1):
        for field, value in identity(entry).items():
            if line.get(field) != value:
                raise UserError(
                    f"{output}:{number}: field {field!r} is {line.get(field)!r}, but input and checkpoint give"
                    f" {value!r}; choose another --output"
                )
    files.write_jsonl(output, present[:whole])
    with output.open("a", encoding="utf-8") as file:
        for start in rich.progress.track(range(whole, len(entries), size), description=what):
            for entry in lines(entries[start : start + size], start // size):
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(entries)} {what} in {output}")
