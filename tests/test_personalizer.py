"""A trained pair in use: what it writes depends on its own input alone, and an export gives the same texts."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from popi_jax import Personalizer
from popi_jax.config import changed, parse
from popi_jax.configs import quickstart
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Query
from popi_jax.data.users import parse_users
from popi_jax.errors import UserError
from popi_jax.modes import export, exported, personalize, setup
from popi_jax.rollout import text
from popi_jax.rollout.pairs import Item
from popi_jax.training.rng import stream_key
from tests import tiny

PEOPLE = [
    {"user": f"u{i}", "signals": [{"kind": "profile", "text": f"She likes {' and '.join(words)}."}]}
    for i, words in enumerate(
        [["lists"], ["lists", "prose", "jokes"], ["examples", "plain words"], ["rigour"], ["haste"]]
    )
]


@pytest.fixture(scope="module")
def run():
    config = parse(quickstart.get_config("runlocal"))
    return setup.load(changed(config, {"lora.rank": 4, "eval.users_per_batch": 2}))


@pytest.fixture(scope="module")
def state(run):
    start = run.initial_state()
    phi, theta = tiny.perturbed(start.phi, 1, 0.03), tiny.perturbed(start.theta, 2, 0.03)
    return dataclasses.replace(start, phi=phi, theta=theta)


@pytest.fixture(scope="module")
def pair(run, state):
    return Personalizer(run, state.phi, state.theta, 6, "weights", has_reference=True)


def texts(found):
    return [one.text for one in found]


def test_a_text_depends_on_its_own_input_alone(pair):
    whole = texts(pair.summarize(PEOPLE, temperature=1.0))
    assert len(set(whole)) > 2
    assert texts(pair.summarize(PEOPLE[::-1], temperature=1.0)) == whole[::-1]
    assert [pair.summarize([person], temperature=1.0)[0].text for person in PEOPLE] == whole
    assert texts(pair.summarize(PEOPLE, temperature=1.0, seed=1)) != whole
    prompts, summaries = ["Why?", "How do I bake?", "What now?"], ["Likes lists.", None, "Likes prose."]
    whole = texts(pair.generate(prompts, summaries, temperature=1.0))
    assert texts(pair.generate(prompts[::-1], summaries[::-1], temperature=1.0)) == whole[::-1]


def test_greedy_texts_are_those_of_the_sampler(pair, run, state):
    examples = parse_users(PEOPLE)
    sampling = text.Sampling(0.0, 1.0, 5)
    drawn = run.sampler.summaries(state.phi, examples, stream_key(0, "personalize", 0), sampling, k=1)
    found = pair.summarize(PEOPLE, temperature=0.0)
    assert texts(found) == [own[0] for own in drawn.texts_UxK]
    assert [one.user for one in found] == [person["user"] for person in PEOPLE]
    assert [one.finished for one in found] == drawn.finished_UxK[:, 0].tolist()
    assert [one.signal_tokens for one in found] == drawn.prefix_length_B[:5].tolist()
    assert [one.tokens for one in found] == [run.encoder.cost(one.text) for one in found]


def test_several_samples_and_limits(pair):
    found = pair.summarize(PEOPLE[:2], temperature=1.0, n=3)
    assert [one.user for one in found] == ["u0"] * 3 + ["u1"] * 3 and len(set(texts(found[:3]))) == 3
    [short] = pair.generate(["Why?"], "Likes lists.", max_tokens=2)
    assert short.tokens == 2 and not short.finished


def test_scores_are_the_implicit_rewards_of_the_pairs(pair, run, state):
    responses, told = ["Because it is so.", "No.", "Think of a river."], Told("Likes prose.")
    found = pair.score("Why?", responses, "Likes prose.")
    for i, j in ((0, 1), (1, 2)):
        query = Query("Why?", responses[i], responses[j])
        logps = run.scorer.logps(state.theta, [Item(query, told)])[0]
        reference = run.scorer.logps(None, [Item(query, None)])[0]
        np.testing.assert_allclose([found[i].logp, found[j].logp], logps, rtol=1e-5)
        rewards = run.config.objective.beta * (logps - reference)
        np.testing.assert_allclose([found[i].reward, found[j].reward], rewards, atol=1e-4)
    assert pair.score("Why?", []) == []


@pytest.mark.parametrize("which", ["summary", "signals"])
def test_the_reference_of_a_reward_reads_what_it_read_in_training(which, run, state):
    values = {"lora.rank": 4, "objective.reference_context": which}
    other = dataclasses.replace(run, config=changed(run.config, values))
    [found] = Personalizer(other, state.phi, state.theta, 6, "weights", has_reference=True).score(
        "Why?", ["No."], "Prose."
    )
    if which == "signals":  # They are not given.
        assert found.reward is None
        return
    item = Item(Query("Why?", "No.", "No."), Told("Prose."))
    logp, reference = (run.scorer.logps(theta, [item])[0, 0] for theta in (state.theta, None))
    np.testing.assert_allclose(found.reward, run.config.objective.beta * (logp - reference), atol=1e-4)


def test_a_run_of_before_adapters_could_start_a_role_is_still_read(run):
    lora = run.identity["config"]["lora"]
    assert lora == {"rank": 4, "alpha": run.config.lora.alpha, "targets": list(run.config.lora.targets)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pair: pair.summarize(PEOPLE[0]), "users is a single user; give a list of them"),
        (lambda pair: pair.summarize([{"user": "u"}]), r"users\[0\]: field 'signals' is missing"),
        (lambda pair: pair.summarize(["u"]), r"users\[0\]: expected an object"),
        (lambda pair: pair.summarize(PEOPLE, temperature=-1.0), "temperature is -1.0; give 0 or at least 1e-6"),
        (lambda pair: pair.summarize(PEOPLE, top_p=0.0), "top_p is 0.0; give a number above 0"),
        (lambda pair: pair.summarize(PEOPLE, n=0), "n is 0; give 1 to 1023"),
        (lambda pair: pair.generate("Why?"), "prompts is a single text; give a list"),
        (lambda pair: pair.generate(["Why?"], ["a", "b"]), "there are 1 prompts and 2 summaries"),
        (lambda pair: pair.generate(["Why? " * 500]), "limits.prompt is"),
        (lambda pair: pair.score("Why?", ["So. " * 500]), "limits.response is"),
    ],
)
def test_a_mistake_is_one_line(pair, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(pair)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def exports(run, state, tmp_path_factory):
    """The three kinds of export, written by --mode=export."""
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trained", lambda *_: (run, state, {}))
        for form in ("hub", "peft", "orbax"):
            export.export(run.config, folder / "workdir", folder / form, None, form)
    return folder


def test_an_export_gives_the_same_texts_and_scores(pair, exports):
    loaded = Personalizer.load(exports / "hub")
    assert texts(loaded.summarize(PEOPLE, temperature=0.0)) == texts(pair.summarize(PEOPLE, temperature=0.0))
    asked = ["Why?", "How do I bake?"], "Likes prose."
    assert texts(loaded.generate(*asked, temperature=0.0)) == texts(pair.generate(*asked, temperature=0.0))
    [one] = loaded.score("Why?", ["No."], "Likes prose.")
    assert one.reward is None and abs(one.logp - pair.score("Why?", ["No."], "Likes prose.")[0].logp) < 1e-3
    for name in ("prompts", "limits", "eval", "objective"):
        theirs, ours = (getattr(one.config, name).model_dump() for one in (loaded, pair))
        assert theirs | {"layout": None} == ours | {"layout": None}, name


def test_popi_json_has_all_of_both_prompts(run, exports):
    for role in exported.ROLES:
        described = json.loads((exports / "hub" / role / "popi.json").read_text())
        ids = run.encoder.tokenizer.render(described["example"]["messages"])
        start = described["prompts"]["summary_start"] if role == "inference" else ""
        assert [*ids, *run.encoder.tokenizer.encode_start(start)] == exported.example_prompt(role, run.encoder)
        assert set(run.encoder.tokenizer.stop_ids) <= set(described["stop_ids"])
        assert described["layout"] == run.encoder.layout.model_dump(mode="json")
        assert "data" not in described  # Nothing of the machine that trained.


def test_orbax_alone_reads_the_arrays(run, state, exports):
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(exports / "orbax" / "generator" / "params")
    expected = jax.device_get(run.programs.policy.fuse(run.base, state.theta))
    chex.assert_trees_all_equal(read, expected)


def test_an_adapter_starts_a_role(run, state, exports):
    folders = {f"lora.init_{role}": str(exports / "peft" / role) for role in exported.ROLES}
    start = setup.load(changed(run.config, folders)).initial_state()
    chex.assert_trees_all_equal((start.phi, start.theta), (state.phi, state.theta))
    assert setup.adapters(changed(run.config, folders)).keys() == {"init_inference", "init_generator"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nothing", "neither a run .config.json. nor an export"),
        ("a half", "generator/popi.json: no such file; export the run again"),
        ("another run", "its two models are of different runs"),
        ("an adapter", "is an adapter or Orbax export"),
        ("a value", "config.limits.summary is -1"),
        ("a layout", "popi.json: the layout: pair must have"),
    ],
)
def test_a_damaged_export_is_one_line(how, message, exports, tmp_path):
    folder = tmp_path / "out"
    if how != "nothing":
        shutil.copytree(exports / ("peft" if how == "an adapter" else "hub"), folder)
    if how == "a half":
        shutil.rmtree(folder / "generator")
    for role in exported.ROLES if how in ("a value", "a layout") else ["generator"] if how == "another run" else []:
        described = json.loads((folder / role / "popi.json").read_text())
        if how == "a layout":
            described["layout"]["pair"] = "nothing"
        else:
            described["limits"]["summary"] = -1
        (folder / role / "popi.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=message) as error:
        Personalizer.load(folder)
    assert "\n" not in str(error.value)


def test_the_modes_write_what_the_personalizer_writes(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(personalize.Personalizer, "of_run", lambda *_: pair)
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(person) + "\n" for person in PEOPLE))
    flags = personalize.Flags(tmp_path / "users.jsonl", tmp_path / "summaries.jsonl", drawing={"temperature": 0.7})
    personalize.summarize(pair.config, tmp_path, flags)
    lines = [json.loads(line) for line in flags.output.read_text().splitlines()]
    found = pair.summarize(PEOPLE, temperature=0.7)
    assert [(line["user"], line["summary"]) for line in lines] == [(one.user, one.text) for one in found]
    whole = flags.output.read_bytes()
    more = [*PEOPLE[:4], PEOPLE[4] | {"signals": [{"kind": "profile", "text": "Another taste."}]}]
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(person) + "\n" for person in more[::-1]))
    personalize.summarize(pair.config, tmp_path, flags)
    again = flags.output.read_bytes().splitlines()
    assert again[:0:-1] == whole.splitlines()[:4] and again[0] != whole.splitlines()[4]
    assert "1 summaries are of inputs that changed" in capsys.readouterr().out
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "Why?", "user": "u1"}\n{"prompt": "How?", "summary": "Prose."}\n'
    )
    flags = personalize.Flags(
        tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl", drawing={"n": 2, "max_tokens": 3}
    )
    personalize.generate(pair.config, tmp_path, flags)
    lines = [json.loads(line) for line in flags.output.read_text().splitlines()]
    found = pair.generate(["Why?", "How?"], [lines[0]["summary"], "Prose."], n=2, max_tokens=3)
    assert [line["response"] for line in lines] == texts(found)
    assert [(line["row"], line["sample"]) for line in lines] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert "4 of 4 responses were cut at 3 tokens; --max_tokens allows more" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.parametrize("form", ["hub", "peft"])
@pytest.mark.parametrize("role", exported.ROLES)
def test_the_lines_of_the_card_repeat_our_greedy_text(role, form, pair, exports):
    for name in ("torch", "peft"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the card's lines need {name}: pip install -e '.[torch]'")
    folder = exports / form / role
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    example = json.loads((folder / "popi.json").read_text())["example"]
    if role == "inference":
        [own] = pair.summarize([{"user": "u", "signals": example["signals"]}], temperature=0.0)
    else:
        [own] = pair.generate([example["prompt"]], example["summary"], temperature=0.0)
    assert done.stdout.strip() == own.text
