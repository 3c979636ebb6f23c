"""--mode=summarize and --mode=generate: a file of summaries or responses, written with a `Personalizer`."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from popi_jax.config import Config
from popi_jax.data import files, lines, prompts, users
from popi_jax.data.layouts import Told
from popi_jax.errors import UserError
from popi_jax.modes import runfiles
from popi_jax.modes.personalizer import Personalizer, Use

EXAMPLES = pathlib.Path(__file__).parents[1] / "assets" / "examples"
_MADE_SUMMARY = ("summary", "summary_tokens", "signal_tokens", "signals_dropped", "finished")
_MADE_RESPONSE = ("response", "response_tokens", "finished")


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of both modes. None stands for what the run's config says, see `Personalizer.use`.

    Attributes:
        input: the file to read.
        output: the file to write.
        step: the checkpoint's step; None: the newest.
        drawing: the fields of `Use` that are given.
        summaries: generate: the file with the users' summaries; None: summaries.jsonl beside the input.
    """

    input: pathlib.Path
    output: pathlib.Path
    step: int | None = None
    drawing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    summaries: pathlib.Path | None = None


def summarize(config: Config, workdir: pathlib.Path, flags: Flags) -> None:
    """Writes the summaries of the users of a users.jsonl. Resumes an earlier call that was interrupted.

    A line of the output has the fields "user", "sample" (with n > 1), "summary", "summary_tokens", "signal_tokens",
    "signals_dropped" (to fit limits.signals, with on_overflow = "drop"), "finished", "run" (a digest of the checkpoint
    and the settings), "step" (the checkpoint's), "sampling" (temperature and top_p) and "signals" (a digest of those
    that the model read). A user whose signals have changed since an earlier call is summarized again.
    """
    _check_paths("summarize", flags.output, flags.input)
    examples = users.read_users(flags.input, require_queries=False)
    pair = Personalizer.of_run(config, workdir, flags.step)
    use = pair.use(responses=False, **flags.drawing)
    prefixes = [pair.encoder.signals(example) for example in examples]  # Reports an exceeded limit before drawing.
    source = _source(pair, use)
    entries = [
        {"user": example.user, **_sample(use, k), **source, "signals": _digest(str(prefix))}
        for example, prefix in zip(examples, prefixes, strict=True)
        for k in range(use.n)
    ]

    def make(batch: Sequence[int]) -> list[dict[str, Any]]:
        drawn = pair.draw_summaries([examples[place // use.n] for place in batch[:: use.n]], use)
        return [
            {
                "summary": summary.text,
                "summary_tokens": summary.tokens,
                "signal_tokens": summary.signal_tokens,
                "signals_dropped": summary.signals_dropped,
                "finished": summary.finished,
            }
            for own in drawn
            for summary in own
        ]

    key = ("user", *_sample(use, 0))
    plan = lines.Plan(entries, key=key, changeable=("signals",), made=_MADE_SUMMARY, head=key, what="summaries")
    lines.write(flags.output, plan, _batches(pair, prefixes, use), make)
    print(pair.encoder.overflow)
    _tell_cut(flags.output, "summaries", use)


def generate(config: Config, workdir: pathlib.Path, flags: Flags) -> None:
    """Writes the personalized responses to the prompts of a prompts.jsonl. Resumes an earlier call.

    A line of the input has "prompt", and either "summary" or a "user" of the summaries. A line of the output adds
    "run", "step" and "sampling", as for `summarize`, "response", "response_tokens" and "finished".
    """
    summaries = flags.summaries or prompts.summaries_beside(flags.input)
    _check_paths("generate", flags.output, flags.input, summaries)
    asked = prompts.read_prompts(flags.input, summaries)
    pair = Personalizer.of_run(config, workdir, flags.step)
    use = pair.use(responses=True, **flags.drawing)
    for entry in asked:
        pair.encoder.check_prompt(entry["prompt"], Told(entry["summary"]))
    prefixes = [pair.encoder.prompt(entry["prompt"], Told(entry["summary"])) for entry in asked]
    source = _source(pair, use)
    entries = [{**entry, **_sample(use, k), **source} for entry in asked for k in range(use.n)]

    def make(batch: Sequence[int]) -> list[dict[str, Any]]:
        chosen = [asked[place // use.n] for place in batch[:: use.n]]
        drawn = pair.draw_responses([(entry["prompt"], Told(entry["summary"])) for entry in chosen], use)
        return [
            {"response": response.text, "response_tokens": response.tokens, "finished": response.finished}
            for own in drawn
            for response in own
        ]

    plan = lines.Plan(
        entries,
        key=("row", *_sample(use, 0)),
        changeable=("prompt", "summary", "user"),
        made=_MADE_RESPONSE,
        head=list(entries[0]),
        what="responses",
    )
    lines.write(flags.output, plan, _batches(pair, prefixes, use), make)
    _tell_cut(flags.output, "responses", use)


def _check_paths(mode: str, output: pathlib.Path, *inputs: pathlib.Path) -> None:
    """Refuses what --output must not be before anything is loaded."""
    runfiles.one_process(mode)
    files.check_output(output)
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise UserError(f"--output={output} is {path}, which this command reads; choose another --output")


def _sample(use: Use, k: int) -> dict[str, int]:
    return {"sample": k} if use.n > 1 else {}


def _batches(pair: Personalizer, prefixes: Sequence[Sequence[int]], use: Use) -> list[list[int]]:
    """Returns the lines of each batch: all samples of the prompts that are drawn together."""
    return [[row * use.n + k for row in rows for k in range(use.n)] for rows in pair.batches(prefixes)]


def _source(pair: Personalizer, use: Use) -> dict[str, Any]:
    """Returns the fields that say which run and settings a text comes from, beside its own input."""
    settings = [pair.fingerprint, pair.config.prompts.model_dump(), use.max_tokens, use.n, use.seed]
    sampling = f"temperature {use.temperature}, top_p {use.top_p}"
    return {"run": _digest(json.dumps(settings, sort_keys=True)), "step": pair.step, "sampling": sampling}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _tell_cut(output: pathlib.Path, what: str, use: Use) -> None:
    """Says how many texts the limit cut short."""
    written = files.read_jsonl(output)
    if cut := sum(not line["finished"] for line in written):
        print(f"{cut} of {len(written)} {what} were cut at {use.max_tokens} tokens; --max_tokens allows more")
