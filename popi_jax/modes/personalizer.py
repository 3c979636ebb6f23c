"""A trained pair in use: `Personalizer` writes summaries of users, answers prompts for them, and scores responses."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from popi_jax import config as config_lib
from popi_jax.config import Config
from popi_jax.configs import recorded
from popi_jax.data import users
from popi_jax.data.encoding import Encoder
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Example, Query
from popi_jax.errors import UserError
from popi_jax.model.weights import Tree
from popi_jax.modes import exported, setup
from popi_jax.modes.evaluate import trained
from popi_jax.modes.setup import Run
from popi_jax.rollout import text
from popi_jax.rollout.pairs import Item
from popi_jax.rollout.references import reference_item
from popi_jax.training.rng import stream_key


@dataclasses.dataclass(frozen=True)
class Summary:
    """A summary of one user.

    Attributes:
        user: the user's name.
        text: what the inference model wrote.
        tokens: of the text, as the generator reads it.
        signal_tokens: of the prompt with the user's signals.
        signals_dropped: the oldest signals, which did not fit limits.signals.
        finished: False if the limit on its tokens cut it short.
    """

    user: str
    text: str
    tokens: int
    signal_tokens: int
    signals_dropped: int
    finished: bool


@dataclasses.dataclass(frozen=True)
class Response:
    """A response: its text, the tokens that were drawn, and whether the model ended it before the limit."""

    text: str
    tokens: int
    finished: bool


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a response is.

    Attributes:
        logp: log pi_theta(y|x, z) in nats, the end token included; the mean over tokens with logp_reduction = "mean".
        reward: beta (logp - log pi_ref), the implicit reward of DPO (POPI section 2), which ranks responses. The
            reference reads what objective.reference_context says. None if there is no such reward: for an export, which
            does not have the reference model; for method base; and where the reference reads the user's signals.
    """

    logp: float
    reward: float | None


@dataclasses.dataclass(frozen=True)
class Use:
    """How text is drawn.

    Attributes:
        temperature: 0 always takes the most likely token.
        top_p: nucleus sampling, in (0, 1].
        max_tokens: the longest text, in tokens.
        n: texts per user or prompt.
        seed: repeats the same draws.
    """

    temperature: float
    top_p: float
    max_tokens: int
    n: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid, remedy in (
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "give 0 or at least 1e-6"),
            ("top_p", 0 < self.top_p <= 1, "give a number above 0 and at most 1"),
            ("max_tokens", 1 <= self.max_tokens <= 2**20, "give at least 1"),
            ("n", 1 <= self.n <= 1023, "give 1 to 1023"),
            ("seed", 0 <= self.seed < 2**32, "give a whole number from 0 to 4294967295"),
        ):
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)}; {remedy}")


class Personalizer:
    """A trained inference model and generator.

        pair = popi_jax.Personalizer.load("runs/mine")
        [summary] = pair.summarize([{"user": "ann", "signals": [{"kind": "profile", "text": "I like short answers."}]}])
        [response] = pair.generate(["What is gravity?"], summary.text)

    A text depends on its own input, the settings and the seed: not on the order of the inputs, and on those beside it
    only as far as the shape of a batch changes rounding. Prompts of similar length are drawn together.

    Attributes:
        config: the settings of the run. For an export, those that matter in use; the others have their defaults.
        encoder: makes the token sequences that the models read.
        step: the training steps of the pair.
        fingerprint: identifies the trained weights.
    """

    def __init__(
        self, run: Run, phi: Tree | None, theta: Tree | None, step: int, fingerprint: str, *, has_reference: bool
    ):
        """Use load()."""
        self._run, self._phi, self._theta, self._has_reference = run, phi, theta, has_reference
        self.config: Config = run.config
        self.encoder: Encoder = run.encoder
        self.step, self.fingerprint = step, fingerprint

    @classmethod
    def load(
        cls, folder: str | pathlib.Path, *, step: int | None = None, settings: Mapping[str, Any] | None = None
    ) -> "Personalizer":
        """Loads a run's workdir, or a folder that --mode=export wrote.

        Args:
            folder: the workdir, or the folder with `inference` and `generator`.
            step: the step of the run's checkpoint; None means the newest.
            settings: keys of the config with other values, such as {"limits.signals": 4096, "mesh.fsdp": 4}.

        Raises:
            UserError: the folder is neither, or a setting does not fit it.
        """
        path = config_lib.local_path(str(folder), "the folder of a Personalizer")
        if exported.is_export(path):
            if step is not None:
                raise UserError(f"{path}: an export has a single step; leave step out")
            return cls._of_export(path, settings or {})
        if not (path / "config.json").is_file():
            raise UserError(f"{path}: neither a run (config.json) nor an export (inference/popi.json); give one")
        config = config_lib.parse(recorded.get_config(str(path / "config.json")))
        return cls.of_run(config_lib.changed(config, settings or {}), path, step)

    @classmethod
    def of_run(cls, config: Config, workdir: pathlib.Path, step: int | None = None) -> "Personalizer":
        """Loads a run with these settings; UserError if it was trained with other ones, or has no checkpoint."""
        run, state, record = trained(config, workdir, step)
        lasting = {name: value for name, value in record.items() if name not in ("wall_s", "iterator")}
        fingerprint = json.dumps(lasting, sort_keys=True)
        return cls(run, state.phi, state.theta, int(state.step), fingerprint, has_reference=True)

    @classmethod
    def _of_export(cls, folder: pathlib.Path, settings: Mapping[str, Any]) -> "Personalizer":
        config = config_lib.changed(exported.read_config(folder), settings)
        run = setup.load(config)
        # Without adapters, the weights of a role replace the base.
        theta = run.other_weights(folder / exported.GENERATOR)
        return cls(run, run.base, theta, exported.step(folder), run.model_fingerprint, has_reference=False)

    def use(self, *, responses: bool, **given: Any) -> Use:
        """Returns how summaries or responses are drawn: as config.eval says, up to the length of training.

        Args:
            responses: whether these are responses.
            given: fields of `Use` with other values; None means the default.

        Raises:
            UserError: a value is out of bounds.
        """
        limits, evaluation = self.config.limits, self.config.eval
        longest = limits.response if responses else limits.summary
        fields = {"temperature": evaluation.temperature, "top_p": evaluation.top_p, "max_tokens": longest}
        return Use(**fields | {"seed": self.config.seed} | {k: v for k, v in given.items() if v is not None})

    def summarize(self, people: Sequence[Example | Mapping[str, Any]], **given: Any) -> list[Summary]:
        """Writes a summary of each user, z ~ q_phi(.|s). A run without an inference model uses the untrained q_0.

        Args:
            people: users as in users.jsonl: {"user": ..., "signals": [...]}. Other fields are not read.
            given: temperature, top_p, max_tokens, n and seed, see `Use`.

        Returns:
            The summaries in the order of the users; with n > 1, the n of the first user come first.

        Raises:
            UserError: a user's field is missing or of another type, or the signals exceed limits.signals.
        """
        examples = users.parse_users(people)
        use = self.use(responses=False, **given)
        found: dict[int, list[Summary]] = {}
        for rows in self.batches([self.encoder.signals(example) for example in examples]):
            own = self.draw_summaries([examples[row] for row in rows], use)
            found |= dict(zip(rows, own, strict=True))
        return [summary for row in range(len(examples)) for summary in found[row]]

    def generate(
        self, prompts: Sequence[str], summaries: str | Sequence[str | None] | None = None, **given: Any
    ) -> list[Response]:
        """Answers each prompt as the summarized user would like, y ~ pi_theta(.|x, z).

        Args:
            prompts: the questions, x.
            summaries: one for each prompt, or one for all; None: nothing is known of the user.
            given: temperature, top_p, max_tokens, n and seed, see `Use`.

        Returns:
            The responses in the order of the prompts; with n > 1, the n of the first prompt come first.

        Raises:
            UserError: a prompt with its summary exceeds limits.prompt, or the summaries are not as many as the prompts.
        """
        asked = list(zip(prompts, _one_each(prompts, summaries), strict=True))
        use = self.use(responses=True, **given)
        for prompt, told in asked:
            self.encoder.check_prompt(prompt, told)
        found: dict[int, list[Response]] = {}
        for rows in self.batches([self.encoder.prompt(prompt, told) for prompt, told in asked]):
            own = self.draw_responses([asked[row] for row in rows], use)
            found |= dict(zip(rows, own, strict=True))
        return [response for row in range(len(asked)) for response in found[row]]

    def score(self, prompt: str, responses: Sequence[str], summary: str | None = None) -> list[Score]:
        """Scores responses to a prompt for the user of this summary; the largest reward is the response to show.

        Args:
            prompt: the question, x.
            responses: the candidates, y.
            summary: of the user, z; None: nothing is known.

        Raises:
            UserError: a text exceeds its limit.
        """
        if not responses:
            return []
        # Scored in pairs, as in training; the last one twice if their number is odd.
        pairs = [(responses[i], responses[min(i + 1, len(responses) - 1)]) for i in range(0, len(responses), 2)]
        told = None if summary is None else Told(summary)
        items = [Item(Query(prompt, *pair), told) for pair in pairs]
        self.encoder.check_prompt(prompt, told)
        for response in responses:
            self.encoder.check_response(response)
        logps = self._run.scorer.logps(self._theta, items).ravel()[: len(responses)]
        which = self.config.objective.reference_context
        if not self._has_reference or self.config.method == "base" or which == "signals":
            return [Score(float(logp), None) for logp in logps]
        asked = [reference_item(which, item, None) for item in items]
        references = self._run.scorer.logps(None, asked).ravel()[: len(responses)]
        beta = self.config.objective.beta
        return [Score(float(logp), float(beta * (logp - ref))) for logp, ref in zip(logps, references, strict=True)]

    def batches(self, prefixes: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yields the rows of each batch: at most eval.users_per_batch prompts, of similar length.

        The same prompts give the same batches in any order.
        """
        order = sorted(range(len(prefixes)), key=lambda row: (-len(prefixes[row]), prefixes[row]))
        most = self.config.eval.users_per_batch
        for start in range(0, len(order), most):
            yield order[start : start + most]

    def draw_summaries(self, examples: Sequence[Example], use: Use) -> list[list[Summary]]:
        """Draws `use.n` summaries of each user of one batch."""
        encoder = self.encoder
        prefixes = [encoder.signals(example) for example in examples]
        start, stop = encoder.prompts.summary_start, encoder.summary_stop()
        drawn = self._draw(self._phi, prefixes, use, "personalize", start=start, more_stop_ids=stop)
        return [
            [
                Summary(
                    user=example.user,
                    text=own,
                    tokens=encoder.cost(own),
                    signal_tokens=len(prefixes[i]),
                    signals_dropped=encoder.overflow.of(example.user, "limits.signals"),
                    finished=bool(drawn.finished_UxK[i, k]),
                )
                for k, own in enumerate(drawn.texts_UxK[i])
            ]
            for i, example in enumerate(examples)
        ]

    def draw_responses(self, asked: Sequence[tuple[str, Told | None]], use: Use) -> list[list[Response]]:
        """Draws `use.n` responses to each prompt of one batch, given what the generator is told."""
        drawn = self._draw(self._theta, [self.encoder.prompt(*one) for one in asked], use, "respond")
        length_BxN = drawn.samples.length_BxN
        return [
            [
                Response(own, int(length_BxN[i, k]), bool(drawn.finished_UxK[i, k]))
                for k, own in enumerate(drawn.texts_UxK[i])
            ]
            for i in range(len(asked))
        ]

    def _draw(
        self, delta: Tree | None, prefixes: Sequence[list[int]], use: Use, stream: str, **options: Any
    ) -> text.Drawn:
        # Rounded up to a power of two, so that a single user is not padded to a whole batch, and shapes stay few.
        size = min(1 << (len(prefixes) - 1).bit_length(), self.config.eval.users_per_batch)
        return self._run.sampler.draw(
            delta,
            prefixes,
            _keys(stream_key(use.seed, stream, 0), prefixes),
            text.Sampling(use.temperature, use.top_p, size),
            branches=use.n,
            max_tokens=use.max_tokens,
            **options,
        )


def _keys(key: jax.Array, prefixes: Sequence[Sequence[int]]) -> jax.Array:
    """Returns a key for each prompt, made of the prompt's tokens, [len(prefixes)]."""
    digests = [hashlib.sha256(np.asarray(prefix, np.int32).tobytes()).digest() for prefix in prefixes]
    words_Bx2 = np.array([np.frombuffer(digest[:8], "<u4") for digest in digests], np.uint32)
    return jax.vmap(lambda words: jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1]))(words_Bx2)


def _one_each(prompts: Sequence[str], summaries: str | Sequence[str | None] | None) -> list[Told | None]:
    if isinstance(prompts, str):
        raise UserError("prompts is a single text; give a list of texts")
    if summaries is None or isinstance(summaries, str):
        summaries = [summaries] * len(prompts)
    if len(summaries) != len(prompts):
        raise UserError(f"there are {len(prompts)} prompts and {len(summaries)} summaries; give one for each, or one")
    return [None if summary is None else Told(summary) for summary in summaries]
