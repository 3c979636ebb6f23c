"""What a trained run is used for: summaries of users, personalized responses, another evaluation, hub folders."""

import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import rich.progress

from popi_jax import rollout, steps, train
from popi_jax import system as system_lib
from popi_jax.data import prepared, users
from popi_jax.data.schema import Example
from popi_jax.errors import UserError
from popi_jax.model import hub
from popi_jax.rollout import References
from popi_jax.system import System


def trained(config, workdir: pathlib.Path, step: int | None) -> tuple[System, steps.TrainState]:
    """Loads the newest checkpoint of the workdir (or that of `step`); UserError if there is none."""
    system = system_lib.load(config)
    restored = train.restore(system, workdir, step)
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint; train first with --mode=train")
    return system, restored[0]


def evaluate_checkpoint(config, workdir: pathlib.Path, step: int | None) -> None:
    """Evaluates a checkpoint on all test users and writes the run's results again."""
    system, state = trained(config, workdir, step)
    sources = prepared.from_config(config, workdir)
    references = References(system, workdir / "cache", config.eval.users_per_batch * config.eval.summaries_per_user)
    row = train.finish(system, workdir, state, list(sources["test"]), references, int(state.step))
    print(json.dumps(row, indent=2))


def summarize(
    config, workdir: pathlib.Path, input_path: pathlib.Path, output_path: pathlib.Path, step: int | None
) -> None:
    """Writes one summary per user of a users.jsonl; goes on where an earlier call was cut off.

    A line of the output: {"user", "summary", "summary_tokens", "signal_tokens", "finished"}.
    """
    examples = users.read_users(input_path, require_queries=False)
    system, state = trained(config, workdir, step)

    def lines(part: Sequence[Example], batch: int) -> Iterator[dict[str, Any]]:
        drawn = rollout.draw_summaries(
            system,
            state.phi,
            part,
            system_lib.stream_key(config.seed, "personalize", batch),
            k=1,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            rows=config.eval.users_per_batch,
        )
        for i, example in enumerate(part):
            yield {
                "user": example.user,
                "summary": drawn.texts_UxK[i][0],
                "summary_tokens": rollout.context_tokens(system, drawn.texts_UxK[i][0]),
                "signal_tokens": len(drawn.prefixes_U[i]),
                "finished": bool(drawn.samples.finished_BxN[i, 0]),
            }

    _resumable(output_path, examples, lambda e: e.user, lines, config.eval.users_per_batch, "summaries")


def generate(
    config, workdir: pathlib.Path, input_path: pathlib.Path, output_path: pathlib.Path, step: int | None
) -> None:
    """Answers prompts as their user would like.

    A line of the input: {"prompt"} with "summary", a text, or "user", whose summary is in summaries.jsonl beside it.
    A line of the output adds "response", "response_tokens" and "finished".
    """
    prompts = _read_prompts(input_path)
    system, state = trained(config, workdir, step)

    def lines(part: Sequence[dict[str, Any]], batch: int) -> Iterator[dict[str, Any]]:
        encoded = [rollout.encode_prompt(system, entry["prompt"], entry["summary"]) for entry in part]
        texts, samples = rollout.draw_text(
            system,
            state.theta,
            encoded,
            system_lib.stream_key(config.seed, "respond", batch),
            branches=1,
            max_tokens=config.eval.response_tokens,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            rows=config.eval.users_per_batch,
        )
        for i, entry in enumerate(part):
            tokens, finished = int(samples.length_BxN[i, 0]), bool(samples.finished_BxN[i, 0])
            yield entry | {"response": texts[i][0], "response_tokens": tokens, "finished": finished}

    _resumable(output_path, prompts, lambda entry: entry["row"], lines, config.eval.users_per_batch, "responses")


def export(config, workdir: pathlib.Path, output: pathlib.Path, step: int | None) -> None:
    """Writes <output>/inference and <output>/generator: hub folders that transformers and vLLM load."""
    system, state = trained(config, workdir, step)
    for role, delta in (("inference", state.phi), ("generator", state.theta)):
        weights = jax.device_get(system.policy.fuse(system.base, delta))
        hub.save(output / role, system.policy.config, weights, system.tokenizer_path)
        print(f"wrote {output / role}")


def _resumable(
    output: pathlib.Path,
    entries: Sequence[Any],
    name: Callable[[Any], Any],
    lines: Callable[[Sequence[Any], int], Iterator[dict[str, Any]]],
    size: int,
    what: str,
) -> None:
    """Writes lines batch by batch, whole batches only: a batch that is there already is not drawn again."""
    present = output.read_text().splitlines() if output.exists() else []
    whole = len(present) // size * size if len(present) < len(entries) else len(entries)
    key = "user" if what == "summaries" else "row"
    for number, (line, wanted) in enumerate(zip(present[:whole], entries, strict=False), start=1):
        if json.loads(line)[key] != name(wanted):
            raise UserError(
                f"{output}:{number}: {key} is not {name(wanted)!r}, as the input has it; choose another --output"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(line + "\n" for line in present[:whole]))
    with output.open("a") as file:
        for start in rich.progress.track(range(whole, len(entries), size), description=what):
            for entry in lines(entries[start : start + size], start // size):
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(entries)} {what} in {output}")


def _read_prompts(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    summaries: dict[str, str] = {}
    beside = path.parent / "summaries.jsonl"
    if beside.exists():
        summaries = {entry["user"]: entry["summary"] for entry in map(json.loads, beside.read_text().splitlines())}
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); one object a line") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
            raise UserError(f'{path}:{number}: field "prompt" is missing or empty')
        unknown = sorted(entry.keys() - {"prompt", "summary", "user"})
        if unknown:
            raise UserError(f"{path}:{number}: unknown field {unknown[0]!r}; prompt, and summary or user")
        if "summary" in entry:
            summary = entry["summary"]
        elif "user" in entry and entry["user"] in summaries:
            summary = summaries[entry["user"]]
        else:
            raise UserError(f'{path}:{number}: needs "summary", or a "user" of {beside}, which --mode=summarize writes')
        if not isinstance(summary, str) or not summary.strip():
            raise UserError(f'{path}:{number}: field "summary" is empty')
        entries.append({"row": number} | entry | {"summary": summary})
    if not entries:
        raise UserError(f"{path}: no prompts")
    return entries
