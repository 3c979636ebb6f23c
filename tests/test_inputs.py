"""A cache, a checkpoint and a finished row are used only with the inputs that they were made from."""

import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments import results_table
from popi_jax import checkpoint
from popi_jax.config import changed, local_path, parse
from popi_jax.configs import quickstart
from popi_jax.configs import users as users_config
from popi_jax.data import files, prepared
from popi_jax.data.layouts import Told
from popi_jax.data.schema import Query
from popi_jax.errors import UserError
from popi_jax.evaluation import evaluate, final
from popi_jax.model import hub
from popi_jax.modes import runfiles, setup, train
from popi_jax.rollout.pairs import Item
from popi_jax.rollout.references import References
from popi_jax.training import batches


@pytest.mark.parametrize("changes", [{"rope_theta": 100.0}, {"rms_norm_eps": 1e-3}, {"tie_word_embeddings": False}])
def test_a_model_is_its_weights_and_its_config(tmp_path, changes):
    shutil.copytree(hub.STYLEBOOK, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config, before = json.loads(path.read_text()), hub.fingerprint(hub.STYLEBOOK)
    path.write_text(json.dumps(config | {"transformers_version": "9"}))  # It means nothing to the model.
    assert hub.fingerprint(tmp_path / "m") == before
    path.write_text(json.dumps(config | changes))
    assert hub.fingerprint(tmp_path / "m") != before


def test_the_inputs_of_a_table_are_those_of_its_runs():
    config = parse(quickstart.get_config("runlocal"))
    examples = prepared.load_examples(config.data)
    found = setup.read_inputs(config, examples)
    assert found == setup.load(config).inputs(examples) and set(found) == {"model", "tokenizer", "train", "test"}
    fewer = prepared.load_examples(changed(config, {"data.test_users": 5}).data)
    differing = {name for name, value in setup.read_inputs(config, fewer).items() if value != found[name]}
    assert differing == {"test"}


class Scorer:
    """Counts the pairs that it scores; a pair's value is its prompt's length."""

    scored = 0

    def logps(self, _, items, **__):
        self.scored += len(items)
        return np.array([[len(item.query.prompt), 0.0] for item in items])


ITEMS = [Item(Query("p" * i, "y", "n"), None) for i in (1, 2)]


def cached(folder, identity="a"):
    """Returns how many pairs had to be scored, and their values."""
    scorer = Scorer()
    references = References(scorer, folder, identity)
    references.remember(ITEMS)
    return scorer.scored, references.lookup(ITEMS)[:, 0].tolist()


def test_references_are_of_one_model(tmp_path, caplog):
    assert cached(tmp_path) == (2, [1, 2]) and cached(tmp_path) == (0, [1, 2]) and not caplog.text
    assert cached(tmp_path, "b") == (2, [1, 2])
    assert caplog.text.count("is of another model, tokenizer, instruction or precision") == 1
    first, second = sorted(tmp_path.glob("*.npz"))
    shutil.copy(first, second)  # The name alone does not identify them.
    assert cached(tmp_path)[0] + cached(tmp_path, "b")[0] == 2
    assert caplog.text.count("it holds other values") == 1


@pytest.mark.parametrize("damage", [lambda raw: raw[:-30], lambda raw: b"", lambda raw: flip(raw, b"logps.npy")])
def test_damaged_references_are_taken_again(tmp_path, caplog, damage):
    cached(tmp_path)
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    assert cached(tmp_path) == (2, [1, 2]) and "is damaged" in caplog.text
    assert cached(tmp_path) == (0, [1, 2])


def test_pairs_that_differ_have_different_references(tmp_path):
    """A text may contain any character, so none separates the fields."""
    queries = [Query("a", "b\1c", "d"), Query("a\1b", "c", "d"), Query("a", "b", "c\1d"), Query("a", "b", "c")]
    told = [None, *map(Told, ("", "\0", "d")), Told("d", raw_signals=True)]
    items = [Item(query, own) for query in queries for own in told]
    scorer = Scorer()
    References(scorer, tmp_path, "x").remember(items)
    assert scorer.scored == len(items)


def flip(raw, after):
    """Changes a bit of the array that follows this name."""
    place = raw.index(after) + len(after) + 140
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


def entries(*steps):
    return [{"user": f"u{i}", "summary": f"likes {i}", "finished": True, "step": step} for i, step in enumerate(steps)]


def test_written_summaries_are_those_of_the_checkpoint(tmp_path):
    path = tmp_path / "written.jsonl"
    files.write_jsonl(path, entries(3, 3, 4, 5))
    digest = batches.WrittenSummaries(path, 4).digest()
    assert files.read_jsonl(path) == entries(3, 3)  # The later ones are drawn again, whatever they were drawn with.
    batches.WrittenSummaries(path, 4, digest)
    with path.open("ab") as file:
        file.write('{"user": "日'.encode()[:-1])  # A full disk.
    batches.WrittenSummaries(path, 4, digest)
    assert files.read_jsonl(path) == entries(3, 3)
    for damaged in (entries(3), entries(3, 3, 3), [entries(3)[0], entries(3, 3)[1] | {"summary": "likes 2"}]):
        files.write_jsonl(path, damaged)
        with pytest.raises(UserError, match=r"written.jsonl: .*not the summaries that the checkpoint of step 4"):
            batches.WrittenSummaries(path, 4, digest)


@pytest.mark.parametrize(
    ("field", "value"), [("user", ["u0"]), ("summary", None), ("finished", 1), ("step", "4"), ("step", True)]
)
def test_a_damaged_line_of_written_summaries_is_told(field, value, tmp_path):
    path = tmp_path / "written.jsonl"
    files.write_jsonl(path, [entries(3)[0], entries(3, 3)[1] | {field: value}])
    with pytest.raises(UserError, match=rf"written.jsonl:2: damaged, .*: {field} is {re.escape(repr(value))};"):
        batches.WrittenSummaries(path)


def test_a_checkpoint_has_a_fingerprint(tmp_path):
    assert checkpoint.fingerprint(tmp_path / "none") is None
    for folder, value in (("a", 1.0), ("b", 2.0)):
        with checkpoint.Writer(tmp_path / folder, keep=2, after=0) as writer:
            writer.save(1, {"x": jnp.full(5, value)}, {})
    found = [checkpoint.fingerprint(tmp_path / folder, 1) for folder in "ab"]
    assert None not in found and found[0] != found[1] and found[0] == checkpoint.fingerprint(tmp_path / "a")


@pytest.mark.parametrize("name", ["lr=[1e-6]", "a*", "what?", "lr=1e-6,b@2 50% {a} #"])
def test_any_name_of_a_folder_keeps_its_checkpoints(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for after in (0, 2):  # A second run finds the first one's.
        with checkpoint.Writer(name, keep=2, after=after) as writer:
            for step in (after + 1, after + 2):
                writer.save(step, {"x": jnp.full(5, float(step))}, {})
    assert checkpoint.steps(name) == [3, 4] and checkpoint.fingerprint(tmp_path / name) is not None
    found = checkpoint.restore(tmp_path / name, {"x": jax.ShapeDtypeStruct((5,), jnp.float32)})
    assert found.step == 4 and found.state["x"].tolist() == [4.0] * 5
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    if "#" not in name:  # Processes would not share the link.
        with pytest.raises(UserError, match=r"several processes cannot write checkpoints to a path with \*, \? or \["):
            train.train(parse(quickstart.get_config("runlocal")), tmp_path / name / "run")


def test_a_folder_that_cannot_hold_a_run_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nowhere/at all")
    for taken in ("file", "file/run", "broken"):
        with pytest.raises(UserError, match=r"--workdir=.*(file|broken) is not a folder; choose another --workdir"):
            train.train(parse(quickstart.get_config("runlocal")), tmp_path / taken)


def test_a_folder_that_loses_data_is_told_at_the_first_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_plain", lambda folder: epath.Path(folder).resolve())  # Orbax loses these.
    with (
        pytest.raises(UserError, match=r"1 is not what was written \(.*\); choose a --workdir on another file system"),
        checkpoint.Writer(tmp_path / "[x]", keep=1, after=0) as writer,
    ):
        writer.save(1, {"x": jnp.ones(5)}, {})


@pytest.mark.parametrize("key", ["model.path", "model.tokenizer", "data.path", "data.prepared_dir"])
def test_a_path_is_a_local_one(key, monkeypatch):
    config = parse(quickstart.get_config("runlocal"))
    for text, said in [
        ("None", "'None'; leave it out"),
        ("gs://bucket/x", "only local paths"),
        ("s3:/bucket", "only local paths"),
        ("~no-such-user/x", "not a valid path"),
        ("a\udcff", "UTF-8"),
        (" ", "give a path"),
    ]:
        with pytest.raises(UserError, match=rf"^config\.{key} is .*{said}"):
            changed(config, {key: text})
    monkeypatch.setenv("HOME", "/nowhere/someone")
    section, name = key.split(".")
    assert getattr(getattr(changed(config, {key: "~/x"}), section), name) == "/nowhere/someone/x"
    assert getattr(getattr(changed(config, {key: "./C:/x [1]"}), section), name) == "./C:/x [1]"
    with pytest.raises(UserError, match="--workdir is empty"):
        local_path("", "--workdir")


@pytest.fixture
def small_table(tmp_path, monkeypatch):
    """A table of the untrained model, without its evaluation, which is counted."""
    path = tmp_path / "users.jsonl"
    shutil.copy(users_config.EXAMPLE, path)
    config = changed(parse(users_config.get_config("runlocal")), {"data.path": str(path)})
    runs = []

    def evaluated(own, workdir, shared):
        runs.append(own.method)
        inputs = setup.read_inputs(own, prepared.load_examples(own.data))
        runfiles.claim(workdir, own, inputs)
        evaluate.write_records(workdir / "eval_records.jsonl", [])
        row = {"method": own.method, "seed": own.seed, "n": 1, "accuracy": 0.5, "accuracy_ci95": [0.4, 0.6]}
        row |= {"loss": 1.0, "context_tokens_mean": 0.0, "summary_tokens_mean": 0.0}
        final.write_results(workdir, own, [row], final.checksum(workdir, [row]))
        return row

    monkeypatch.setattr(train, "train", evaluated)
    make = lambda: results_table.make_table(config, tmp_path / "table", ["base"], [0])  # noqa: E731
    return types.SimpleNamespace(make=make, path=path, runs=runs, folder=tmp_path / "table" / "base_seed0")


def test_a_row_of_other_data_is_run_again(small_table, capsys):
    small_table.make()
    small_table.make()
    assert small_table.runs == ["base"]
    lines = small_table.path.read_text().splitlines(keepends=True)
    small_table.path.write_text("".join(lines[2:]))
    small_table.make()
    assert small_table.runs == ["base"] * 2 and "its inputs changed (test, train)" in capsys.readouterr().out
    small_table.path.write_text("broken\n")
    with pytest.raises(UserError, match=r"users.jsonl:1: not JSON"):
        small_table.make()


def test_a_missing_report_is_written(small_table):
    """The run was killed between results.json and report.html."""
    small_table.make()
    assert not (small_table.folder / "report.html").exists()
    small_table.make()
    assert (small_table.folder / "report.html").exists() and small_table.runs == ["base"]
