"""--mode=summarize and --mode=generate: writes summaries of users and personalized responses with a trained run."""

import fcntl
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.progress

from popi_jax.config import Config
from popi_jax.data import files, prompts, users
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example
from popi_jax.errors import UserError
from popi_jax.modes import runfiles
from popi_jax.modes.evaluate import trained
from popi_jax.rollout import text
from popi_jax.training.rng import stream_key
from popi_jax.training.steps import TrainState

_ELSEWHERE = "choose another --output"
# The fields that a model's text adds to those of the input, by the name of the text.
_MADE = {
    "summaries": ("summary", "summary_tokens", "signal_tokens", "signals_dropped", "finished"),
    "responses": ("response", "response_tokens", "finished"),
}


def summarize(
    config: Config, workdir: pathlib.Path, input_path: pathlib.Path, output_path: pathlib.Path, step: int | None
) -> None:
    """Writes one summary per user of a users.jsonl. Resumes an earlier call that was interrupted.

    A line of the output has the fields "user", "summary", "summary_tokens", "signal_tokens", "signals_dropped" (to fit
    limits.signals, with on_overflow = "drop"), "finished", "run" (a digest of the checkpoint and the settings), "step"
    (the checkpoint's), "sampling" (temperature and top_p) and "signals" (a digest of those that the model read).
    """
    _check_paths("summarize", output_path, input_path)
    examples = users.read_users(input_path, require_queries=False)
    run, state, record = trained(config, workdir, step)
    encoder, sampler, sampling = run.encoder, run.sampler, text.in_use(config)
    source = _source(config, state, record)
    for example in examples:  # Reports an exceeded limit before the first summary is drawn.
        encoder.signals(example)

    def identity(example: Example) -> dict[str, Any]:
        return {"user": example.user} | source | {"signals": _digest(str(encoder.signals(example)))}

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
    A line of the output adds "run", "step" and "sampling", as for `summarize`, "response", "response_tokens" and
    "finished".
    """
    _check_paths("generate", output_path, input_path, prompts.summaries_beside(input_path))
    entries = prompts.read_prompts(input_path)
    run, state, record = trained(config, workdir, step)
    encoder, sampler, sampling = run.encoder, run.sampler, text.in_use(config)
    source = _source(config, state, record)
    for entry in entries:
        encoder.check_prompt(entry["prompt"], Told(entry["summary"]))

    def identity(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | source

    def lines(part: Sequence[dict[str, Any]], batch: int) -> Iterator[dict[str, Any]]:
        drawn = sampler.draw(
            state.theta,
            [encoder.prompt(entry["prompt"], Told(entry["summary"])) for entry in part],
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


def _check_paths(mode: str, output: pathlib.Path, *inputs: pathlib.Path) -> None:
    """Refuses what --output must not be before anything is loaded."""
    runfiles.one_process(mode)
    files.check_output(output)
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise UserError(f"--output={output} is {path}, which this command reads; choose another --output")


def _source(config: Config, state: TrainState, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that say which run and settings a text comes from, beside its own input."""
    lasting = {name: value for name, value in record.items() if name not in ("wall_s", "iterator")}
    settings = [lasting, config.seed, config.prompts.model_dump(), config.limits.summary, config.eval.response_tokens]
    sampling = f"temperature {config.eval.temperature}, top_p {config.eval.top_p}"
    return {"run": _digest(json.dumps(settings, sort_keys=True)), "step": int(state.step), "sampling": sampling}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _resumable(
    output: pathlib.Path,
    entries: Sequence[Any],
    identity: Callable[[Any], dict[str, Any]],
    lines: Callable[[Sequence[Any], int], Iterator[dict[str, Any]]],
    size: int,
    what: str,
) -> None:
    """Appends the lines that the output lacks, batch by batch. Lines that it has stay as they are.

    A line has the fields of `identity`, which say what it was made from, and those of `_MADE`.
    """
    with output.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another process writes this file; wait until it ends") from None
        except OSError:  # The file system has no locks.
            pass
        file.seek(0)
        *present, cut = file.read().split(b"\n")
        ends = _parsed(cut) is not None  # Only the line's end is missing.
        present += [cut] if ends else []
        expected = [identity(entry) for entry in entries]
        _check_lines(output, present, expected, _MADE[what])
        if ends:
            files.append(output, b"\n")
        elif cut:
            if len(present) == len(entries) or not _begins(cut, expected[len(present)], what):
                raise UserError(f"{output}:{len(present) + 1}: this command did not write this line; {_ELSEWHERE}")
            file.truncate(file.tell() - len(cut))
        for start in rich.progress.track(range(len(present) // size * size, len(entries), size), description=what):
            # A batch is drawn as a whole, so that its lines do not depend on where an earlier call was interrupted.
            drawn = list(lines(entries[start : start + size], start // size))
            files.append_jsonl(output, drawn[max(len(present) - start, 0) :])
    print(f"{len(entries)} {what} in {output}")


def _parsed(line: bytes) -> Any:
    """Returns the JSON value of a line, None if it is not JSON."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def _check_lines(
    output: pathlib.Path, present: Sequence[bytes], expected: Sequence[Mapping[str, Any]], made: Sequence[str]
) -> None:
    """Raises UserError unless this command wrote every line of the output."""
    if len(present) > len(expected):
        raise UserError(f"{output}: has {len(present)} lines, but the input {len(expected)}; {_ELSEWHERE}")
    for number, (written, fields) in enumerate(zip(present, expected, strict=False), start=1):
        where, line = f"{output}:{number}", _parsed(written)
        if not isinstance(line, dict):
            raise UserError(f"{where}: this command did not write this line; {_ELSEWHERE}")
        for field, value in fields.items():
            if line.get(field) != value:
                raise UserError(
                    f"{where}: field {field!r} is {line.get(field)!r:.80}, but input and checkpoint give {value!r:.80};"
                    f" {_ELSEWHERE}"
                )
        if line.keys() != {*fields, *made}:
            raise UserError(f"{where}: has other fields than this command writes; {_ELSEWHERE}")


def _begins(cut: bytes, fields: Mapping[str, Any], what: str) -> bool:
    """Whether an incomplete line begins like the one with these fields that this command writes."""
    first = {"user": fields["user"]} if what == "summaries" else fields
    start = json.dumps({**first, _MADE[what][0]: ""}, ensure_ascii=False)[:-2].encode()
    return start.startswith(cut) or cut.startswith(start)
