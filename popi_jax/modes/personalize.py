"""What a trained run is used for: summaries of users, personalized responses, another evaluation, hub folders."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import rich.progress

from popi_jax.data import prepared, prompts, users
from popi_jax.data.schema import Example
from popi_jax.errors import UserError
from popi_jax.model import hub
from popi_jax.modes import runfiles, train
from popi_jax.modes import setup as system_lib
from popi_jax.modes.setup import System
from popi_jax.rollout import limits as preflight
from popi_jax.rollout import text as rollout
from popi_jax.rollout.references import References
from popi_jax.training import steps


def trained(config, workdir: pathlib.Path, step: int | None) -> tuple[System, steps.TrainState]:
    """Loads the newest checkpoint of the workdir (or that of `step`); UserError if there is none, or of another run."""
    runfiles.check_use(workdir, config)
    system = system_lib.load(config)
    restored = train.restore(system, workdir, step)
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint; train first with --mode=train")
    return system, restored[0]


def evaluate_checkpoint(
    config,
    workdir: pathlib.Path,
    output: pathlib.Path | None,
    step: int | None = None,
    shared: pathlib.Path | None = None,
) -> dict[str, object]:
    """Evaluates a checkpoint on all test users, of other data too; the results go beside the run's own.

    Args:
        config: the run's, but for what `runfiles.check_use` leaves free.
        workdir: the run.
        output: the folder for results, samples and report; by default <workdir>/evaluation_step<N>.
        step: the checkpoint; None: the newest.
        shared: as for `train.train`; the run's workdir by default.

    Returns:
        The row of results.json.
    """
    system, state = trained(config, workdir, step)
    shared = workdir if shared is None else shared
    sources = {"test": prepared.from_config(config, shared)["test"]}
    system = preflight.fit(system, sources)
    references = References(system, shared / "cache", config.eval.users_per_batch * config.eval.summaries_per_user)
    folder = workdir / f"evaluation_step{int(state.step)}" if output is None else output
    runfiles.describe(folder, config)
    return train.finish(system, folder, state, list(sources["test"]), references, int(state.step))


def summarize(
    config, workdir: pathlib.Path, input_path: pathlib.Path, output_path: pathlib.Path, step: int | None
) -> None:
    """Writes one summary per user of a users.jsonl; goes on where an earlier call was cut off.

    A line of the output: {"user", "summary", "summary_tokens", "signal_tokens", "signals_dropped", "finished", "step",
    "sampling", "signals"}: what limits.signals cost (on_overflow = "drop"), the checkpoint's step, how it was drawn,
    and a digest of what was read.
    """
    _one_process("summarize")
    examples = users.read_users(input_path, require_queries=False)
    system, state = trained(config, workdir, step)
    sampling = rollout.in_use(config)
    for example in examples:  # What exceeds a limit is told before the first summary.
        system.encoder.signals(example)

    def identity(example: Example) -> dict[str, Any]:
        digest = hashlib.sha256(str(system.encoder.signals(example)).encode()).hexdigest()[:12]
        return {"user": example.user, "step": int(state.step), "sampling": _shown(sampling), "signals": digest}

    def lines(part: Sequence[Example], batch: int) -> Iterator[dict[str, Any]]:
        key = system_lib.stream_key(config.seed, "personalize", batch)
        drawn = rollout.draw_summaries(system, state.phi, part, key, sampling, k=1)
        for i, example in enumerate(part):
            yield {
                "user": example.user,
                "summary": drawn.texts_UxK[i][0],
                "summary_tokens": system.encoder.cost(drawn.texts_UxK[i][0]),
                "signal_tokens": int(drawn.prefix_length_B[i]),
                "signals_dropped": system.encoder.overflow.of(example.user, "limits.signals"),
                "finished": bool(drawn.finished_UxK[i, 0]),
                **identity(example),
            }

    _resumable(output_path, examples, identity, lines, sampling.rows, "summaries")
    print(system.encoder.overflow)


def generate(
    config, workdir: pathlib.Path, input_path: pathlib.Path, output_path: pathlib.Path, step: int | None
) -> None:
    """Answers prompts as their user would like.

    A line of the input: {"prompt"} with "summary", a text, or "user", whose summary is in summaries.jsonl beside it.
    A line of the output adds "response", "response_tokens", "finished", the checkpoint's "step" and how it was drawn.
    """
    _one_process("generate")
    entries = prompts.read_prompts(input_path)
    system, state = trained(config, workdir, step)
    sampling = rollout.in_use(config)
    for entry in entries:
        system.encoder.check_prompt(entry["prompt"], entry["summary"])

    def identity(entry: dict[str, Any]) -> dict[str, Any]:
        return entry | {"step": int(state.step), "sampling": _shown(sampling)}

    def lines(part: Sequence[dict[str, Any]], batch: int) -> Iterator[dict[str, Any]]:
        drawn = rollout.draw_text(
            system,
            state.theta,
            [system.encoder.prompt(entry["prompt"], entry["summary"]) for entry in part],
            system_lib.stream_key(config.seed, "respond", batch),
            sampling,
            branches=1,
            max_tokens=config.eval.response_tokens,
        )
        for i, entry in enumerate(part):
            tokens, finished = int(drawn.samples.length_BxN[i, 0]), bool(drawn.finished_UxK[i, 0])
            response = {"response": drawn.texts_UxK[i][0], "response_tokens": tokens, "finished": finished}
            yield identity(entry) | response

    _resumable(output_path, entries, identity, lines, sampling.rows, "responses")


def export(config, workdir: pathlib.Path, output: pathlib.Path, step: int | None) -> None:
    """Writes <output>/inference and <output>/generator: hub folders that transformers and vLLM load."""
    _one_process("export")
    system, state = trained(config, workdir, step)
    for role, delta in (("inference", state.phi), ("generator", state.theta)):
        weights = system.policy.fuse(system.base, delta)
        hub.save(output / role, system.policy.config, weights, system.tokenizer_path)
        print(f"wrote {output / role}")


def _one_process(mode: str) -> None:
    if jax.process_count() > 1:
        raise UserError(f"--mode={mode} runs in one process; leave out --distributed")


def _shown(sampling: rollout.Sampling) -> str:
    return f"temperature {sampling.temperature}, top_p {sampling.top_p}"


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
    if len(present) > len(entries):
        raise UserError(f"{output}: holds {len(present)} lines, the input {len(entries)}; choose another --output")
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
