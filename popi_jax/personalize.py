"""What a trained run is used for: summaries of users, personalized responses, another evaluation, hub folders."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import rich.progress

from popi_jax import preflight, rollout, runfiles, steps, train
from popi_jax import system as system_lib
from popi_jax.data import prepared, prompts, users
from popi_jax.data.schema import Example
from popi_jax.errors import UserError
from popi_jax.model import hub
from popi_jax.rollout import References
from popi_jax.system import System


def trained(config, workdir: pathlib.Path, step: int | None) -> tuple[System, steps.TrainState]:
    """Loads the newest checkpoint of the workdir (or that of `step`); UserError if there is none, or of another run."""
    runfiles.check_use(workdir, config)
    system = system_lib.load(config)
    restored = train.restore(system, workdir, step)
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint; train first with --mode=train")
    return system, restored[0]


def evaluate_checkpoint(config, workdir: pathlib.Path, output: pathlib.Path | None, step: int | None) -> None:
    """Evaluates a checkpoint on all test users, of other data too; the results go beside the run's own.

    Args:
        config: the run's, but for what `runfiles.check_use` leaves free.
        workdir: the run.
        output: the folder for results, samples and report; by default <workdir>/evaluation_step<N>.
        step: the checkpoint; None: the newest.
    """
    system, state = trained(config, workdir, step)
    sources = {"test": prepared.from_config(config, workdir)["test"]}
    preflight.check_examples(system, sources)
    references = References(system, workdir / "cache", config.eval.users_per_batch * config.eval.summaries_per_user)
    folder = workdir / f"evaluation_step{int(state.step)}" if output is None else output
    runfiles.describe(folder, config)
    row = train.finish(system, folder, state, list(sources["test"]), references, int(state.step))
    print(json.dumps(row, indent=2))


def summarize(
    config, workdir: pathlib.Path, input_path: pathlib.Path, output_path: pathlib.Path, step: int | None
) -> None:
    """Writes one summary per user of a users.jsonl; goes on where an earlier call was cut off.

    A line of the output: {"user", "summary", "summary_tokens", "signal_tokens", "finished", "step", "signals"}: the
    checkpoint's step, and a digest of what it read.
    """
    examples = users.read_users(input_path, require_queries=False)
    system, state = trained(config, workdir, step)

    def identity(example: Example) -> dict[str, Any]:
        digest = hashlib.sha256(str(rollout.encode_signals(system, example)).encode()).hexdigest()[:12]
        return {"user": example.user, "step": int(state.step), "signals": digest}

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
                **identity(example),
            }

    _resumable(output_path, examples, identity, lines, config.eval.users_per_batch, "summaries")


def generate(
    config, workdir: pathlib.Path, input_path: pathlib.Path, output_path: pathlib.Path, step: int | None
) -> None:
    """Answers prompts as their user would like.

    A line of the input: {"prompt"} with "summary", a text, or "user", whose summary is in summaries.jsonl beside it.
    A line of the output adds "response", "response_tokens", "finished" and the checkpoint's "step".
    """
    entries = prompts.read_prompts(input_path)
    system, state = trained(config, workdir, step)

    def identity(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | {"step": int(state.step)}

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
            yield identity(entry) | {"response": texts[i][0], "response_tokens": tokens, "finished": finished}

    _resumable(output_path, entries, identity, lines, config.eval.users_per_batch, "responses")


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
    identity: Callable[[Any], dict[str, Any]],
    lines: Callable[[Sequence[Any], int], Iterator[dict[str, Any]]],
    size: int,
    what: str,
) -> None:
    """Writes lines batch by batch, whole batches only: a batch that is there already is not drawn again.

    What is there must be of the same entries, by `identity`: the fields of a line that tell what it was made from.
    """
    if output.exists():  # A last line without its end was cut off.
        text = output.read_text(encoding="utf-8")
        runfiles.write_text(output, text[: text.rfind("\n") + 1])
    present = runfiles.read_jsonl(output)
    whole = len(present) // size * size if len(present) < len(entries) else len(entries)
    for number, (line, entry) in enumerate(zip(present[:whole], entries, strict=False), start=1):
        for field, value in identity(entry).items():
            if line.get(field) != value:
                raise UserError(
                    f"{output}:{number}: field {field!r} is {line.get(field)!r}, not {value!r}, as input and checkpoint"
                    " have it; choose another --output"
                )
    runfiles.write_jsonl(output, present[:whole])
    with output.open("a", encoding="utf-8") as file:
        for start in rich.progress.track(range(whole, len(entries), size), description=what):
            for entry in lines(entries[start : start + size], start // size):
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(entries)} {what} in {output}")
