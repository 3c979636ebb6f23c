"""Whatever a file or a flag holds, its reader returns or refuses it in one line: no other exception, no hang.

HYPOTHESIS_PROFILE=nightly tries 10,000 inputs of each kind instead of 200.
"""

import copy
import gzip
import json
import os
import pathlib
import shutil
import sys

import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

from popi_jax import config
from popi_jax.configs import base, recorded
from popi_jax.data import prompts, users
from popi_jax.data.builders import psoups
from popi_jax.errors import UserError
from popi_jax.evaluation import evaluate, stored
from popi_jax.model import hub
from popi_jax.model.tokenizer import Tokenizer
from popi_jax.modes import cli
from popi_jax.training import metrics

COMMON = {"deadline": 20_000, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", settings(max_examples=200, **COMMON))
settings.register_profile("nightly", settings(max_examples=10_000, **COMMON | {"derandomize": False}))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER = {
    "user": "u",
    "signals": [{"kind": "pair", **PAIR}, {"kind": "comment", "prompt": "p", "text": "t"}],
    "queries": [PAIR],
    "persona": "x",
}
ROW = PAIR | {psoups.PERSONA: "x", psoups.FEEDBACK: [PAIR | {"prompt": "q"}]}
RECORD = evaluate.Record(0, "u", "g", "x", "f:1", None, 3, True, 7, 0.5, -0.5)
RESULTS = {"config": "c", "dataset": "d", "split": "s", "rows": [{"method": "popi", "accuracy": 0.5, "n": 3}]}
HUB = json.loads((hub.resolve("stylebook") / "config.json").read_text(encoding="utf-8"))
SETTINGS = config.parse(base.get_config()).model_dump(mode="json")

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", " ", "u", "\0", "\ud800", "\u2028", "a\nb", "[/b]", "{{x}}", "None", "inf", "x" * 5000]),
)
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**400, 1e308, 1e-320, 0.5])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=6,
)


def places(value, path=()):
    """The paths of all values within a value, the value's own first."""
    found = [path]
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(inner, (*path, key))
    return found


@st.composite
def changed(draw, value):
    """The value with up to three of its parts replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            continue
        *outer, last = path
        inside = value
        for key in outer:
            inside = inside[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "add", "again"])):
            case "replace":
                inside[last] = draw(VALUES)
            case "remove":
                del inside[last]
            case "add" if isinstance(inside, dict):
                inside[draw(TEXTS)] = draw(VALUES)
            case "again" if isinstance(inside, list):
                inside.append(copy.deepcopy(inside[last]))
    return value


def written(value):
    """JSON, or "null" for a value that has none, such as a number of 5,000 digits."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except ValueError:
        return "9" * 5000


@st.composite
def stored_bytes(draw, values, lines):
    """The bytes of a file of JSON, mostly as they should be, otherwise damaged or of another kind."""
    records = [written(value) for value in draw(values)]
    text = "\n".join(records) + "\n" if lines else "".join(records)
    kind = draw(st.sampled_from(["plain"] * 6 + ["cut", "junk", "twice", "crlf", "list", "deep", "digits", "encoded"]))
    place = draw(st.integers(0, len(text)))
    match kind:
        case "cut":
            text = text[:place]
        case "twice":
            text += text
        case "crlf":
            text = text.replace("\n", "\r\n")
        case "list":
            text = f"[{','.join(records)}]"
        case "deep":
            text = text[:place] + draw(st.sampled_from("[{")) * 20_000 + text[place:]
        case "digits":
            text = text[:place] + "9" * 5000 + text[place:]
    data = text.encode("utf-8", "surrogatepass")
    if kind == "junk":
        data = data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place:]
    if kind == "encoded":
        encoding = draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "gzip"]))
        data = gzip.compress(data) if encoding == "gzip" else text.encode(encoding, "replace")
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    (path / "run").mkdir()
    yield path
    shutil.rmtree(path)


def check(read, path: pathlib.Path, data: bytes):
    """Reads the file. Returns what was read, or None if it was refused in one line that names the file."""
    path.write_bytes(data)
    try:
        return read()
    except UserError as error:
        message = str(error)
        assert str(path) in message and len(message.splitlines()) == 1 and len(message) < 2000, message
        return None


def jsonl(*values):
    return stored_bytes(st.tuples(*map(changed, values)), lines=True)


def one(value):
    return stored_bytes(st.tuples(changed(value)), lines=False)


@given(jsonl(USER, USER | {"user": "v"}), st.booleans())
def test_users(folder, data, require_queries):
    path = folder / "users.jsonl"
    found = check(lambda: users.read_users(path, require_queries=require_queries), path, data)
    for example in found or ():
        json.dumps(users._user_record(example), ensure_ascii=False).encode()


@given(jsonl({"prompt": "p", "summary": "s", "user": "u"}, {"prompt": "p", "user": "u"}))
def test_prompts(folder, data):
    (folder / "summaries.jsonl").write_text('{"user": "u", "summary": "s"}\n')
    path = folder / "prompts.jsonl"
    for entry in check(lambda: prompts.read_prompts(path), path, data) or ():
        json.dumps(entry, allow_nan=False, ensure_ascii=False).encode()


@given(jsonl({"user": "u", "summary": "s", "step": 3}, {"user": "v", "summary": ""}))
def test_summaries(folder, data):
    (folder / "prompts.jsonl").write_text('{"prompt": "p", "user": "u", "summary": "s"}\n')
    check(lambda: prompts.read_prompts(folder / "prompts.jsonl"), folder / "summaries.jsonl", data)
    (folder / "summaries.jsonl").unlink()


@given(one([ROW | {"prompt": str(place)} for place in range(6)]), st.sampled_from(["disjoint", "published"]))
def test_psoups(folder, data, protocol):
    path = folder / "psoups.json"
    check(lambda: psoups.read_psoups(path, protocol=protocol, signals_per_user=1), path, data)


@given(one(SETTINGS))
def test_a_recorded_config(folder, data):
    path = folder / "recorded.json"
    found = check(lambda: recorded.get_config(str(path)), path, data)
    if found is not None:
        json.dumps(config.parse(found).model_dump(mode="json"), allow_nan=False, ensure_ascii=False).encode()


@given(one(HUB))
def test_a_hub_config(folder, data):
    path = folder / "config.json"
    check(lambda: hub.read_config(path), path, data)


@settings(max_examples=max(30, settings().max_examples // 20))  # Loading a tokenizer takes longer than reading a file.
@given(one({"eos_token_id": [1, 2], "bos_token_id": 1, "temperature": 0.6}))
def test_a_generation_config(folder, data):
    path = folder / "tokenizer" / "generation_config.json"
    if not path.exists():
        shutil.copytree(hub.resolve("stylebook"), path.parent, ignore=shutil.ignore_patterns("*.safetensors"))
    check(lambda: Tokenizer.load(str(path.parent)), path, data)


@given(one(RESULTS))
def test_results(folder, data):
    check(lambda: stored.results(folder / "run"), folder / "run" / "results.json", data)


@given(jsonl({"step": 1, "loss": 0.5}, {"step": 2, "loss": None}))
def test_metrics(folder, data):
    check(lambda: metrics.read_metrics(folder / "run"), folder / "run" / metrics.METRICS_FILE, data)


@given(jsonl(vars(RECORD), vars(RECORD)))
def test_records(folder, data):
    path = folder / "run" / "eval_records.jsonl"
    check(lambda: evaluate.read_records(path), path, data)


@given(jsonl({"user": "u", "summary": "s", "logp_chosen": -1.5, "signal_tokens": 3}))
def test_samples(folder, data):
    check(lambda: stored.samples(folder / "run"), folder / "run" / "samples.jsonl", data)


KEYS = [".".join(path) for path in places(SETTINGS) if all(isinstance(part, str) for part in path)]


@given(
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from(KEYS), TEXTS),
            st.one_of(
                TEXTS, VALUES.map(lambda value: written(value)), st.sampled_from(["None", "(1,", "('a',)", "(None,)"])
            ),
        ),
        max_size=3,
    )
)
def test_overrides(overrides):
    argv = ["main", "--config=configs/quickstart.py:runlocal"]
    argv += [f"--config.{key}={value}" for key, value in overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    sys.modules.pop("config_config", None)
    try:
        cli._parse_flags(argv, values)
        found = config.parse(values.config)
    except UserError as error:
        message = str(error)
        assert "config" in message and len(message.splitlines()) == 1 and len(message) < 2000, message
        return
    json.dumps(found.model_dump(mode="json"), allow_nan=False, ensure_ascii=False).encode()
    assert config.validated(found.model_dump()) == found
