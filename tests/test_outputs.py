"""Files and folders that a command writes: whole or not at all, and never in the place of what it did not write."""

import contextlib
import json
import os
import pathlib
import resource
import stat
import subprocess
import sys
import types
from unittest import mock

import jax
import numpy as np
import pytest

from popi_jax.data import files, lines
from popi_jax.errors import UserError
from popi_jax.model import hub
from popi_jax.model.tokenizer import Tokenizer
from popi_jax.modes import compile as compile_lib
from popi_jax.modes import evaluate, export, personalize

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"


@contextlib.contextmanager
def small_disk(size):
    """No file can grow beyond `size` bytes: a write is cut there, at any byte, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def content(folder):
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


WRITES = {
    "text": lambda path: files.write_text(path, "é" * 5000),
    "json": lambda path: files.write_json(path, {"a": "é" * 5000}),
    "jsonl": lambda path: files.write_jsonl(path, [{"a": "é" * 5000}]),
    "npz": lambda path: files.write_npz(path, a=np.arange(5000)),
    "append": lambda path: files.append_jsonl(path, [{"a": 1}, {"a": "é" * 5000}]),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_full_disk_leaves_the_old_file(kind, tmp_path):
    path = tmp_path / "out"
    path.write_text("before\n")
    with small_disk(4097), pytest.raises(UserError, match=f"{path}: cannot be written .*free space"):
        WRITES[kind](path)
    assert content(tmp_path) == {"out": b"before\n"}
    WRITES[kind](path)
    assert path.stat().st_size > 5000


def test_modes_are_those_of_the_umask_and_of_the_replaced_file(tmp_path):
    for mask, expected in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        with umask(mask):
            files.write_text(tmp_path / str(mask), "new")
            files.append_jsonl(tmp_path / f"{mask}.jsonl", [{}])
        assert mode(tmp_path / str(mask)) == mode(tmp_path / f"{mask}.jsonl") == expected
    (tmp_path / "18").chmod(0o640)
    files.write_text(tmp_path / "18", "newer")
    assert mode(tmp_path / "18") == 0o640


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "after"


# Lines of --mode=summarize and --mode=generate, drawn without a model.

ENTRIES = [{"row": i, "user": f"名前 {i}"} for i in range(1, 6)]


SUMMARY = ("summary", "summary_tokens", "signal_tokens", "signals_dropped", "finished")


def made(batch, what="summaries"):
    for place in batch:
        if what == "summaries":
            yield dict(zip(SUMMARY, (f"é {place}", 3, 9, 0, True), strict=True))
        else:
            yield {"response": f"é {place}", "response_tokens": 3, "finished": True}


def plan(what="summaries", entries=ENTRIES, signals="s", **changes):
    if what == "summaries":
        source = {"run": "0a1b", "step": 3, "signals": signals} | changes
        own = [{"user": entry["user"], **source} for entry in entries]
        return lines.Plan(own, key=("user",), changeable=("signals",), made=SUMMARY, head=("user",), what=what)
    own = [entry | {"run": "0a1b"} | changes for entry in entries]
    fields = ("response", "response_tokens", "finished")
    return lines.Plan(own, key=("row",), changeable=("prompt",), made=fields, head=list(own[0]), what=what)


def write(path, what="summaries", entries=ENTRIES, batches=((4, 1), (0, 2), (3,)), make=made, **changes):
    own = [[place for place in batch if place < len(entries)] for batch in batches]
    lines.write(path, plan(what, entries, **changes), own, lambda batch: list(make(batch, what)))


@pytest.mark.parametrize("what", ["summaries", "responses"])
def test_a_file_cut_at_any_byte_is_completed_in_the_order_of_the_input(what, tmp_path, monkeypatch):
    monkeypatch.setattr(lines.rich.progress, "Progress", lambda *columns: mock.MagicMock())
    path, kept = tmp_path / "out.jsonl", []
    write(path, what)
    whole = path.read_bytes()
    assert [json.loads(line)["user"] for line in whole.splitlines()] == [entry["user"] for entry in ENTRIES]
    path.unlink()
    monkeypatch.setattr(lines.files, "write_jsonl", lambda path, rows: kept.append(path.read_bytes()))
    write(path, what)
    monkeypatch.undo()
    monkeypatch.setattr(lines.rich.progress, "Progress", lambda *columns: mock.MagicMock())
    for data in (whole, kept[-1]):  # In order, and as it was written, batch by batch.
        for size in range(len(data) + 1):
            path.write_bytes(data[:size])
            write(path, what)
            assert path.read_bytes() == whole, size


def test_lines_that_are_there_are_not_drawn_again(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, entries=ENTRIES[:3])
    kept = path.read_bytes().replace("é 0".encode(), b"as drawn before")
    path.write_bytes(kept)
    write(path)
    assert path.read_bytes().startswith(kept) and path.read_bytes().count(b"\n") == 5


def test_only_inputs_that_changed_are_drawn_again(tmp_path, capsys):
    path, batches = tmp_path / "out.jsonl", []

    def make(batch, what):
        batches.append(batch)
        return made(batch, what)

    write(path)
    before = path.read_bytes().splitlines()
    changed = plan()
    changed.entries[1]["signals"] = "new"
    lines.write(path, changed, [[0, 1], [2, 3, 4]], lambda batch: list(make(batch, "summaries")))
    after = path.read_bytes().splitlines()
    assert batches == [[0, 1]] and json.loads(after[1])["signals"] == "new"
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True, True]
    assert "1 summaries are of inputs that changed since" in capsys.readouterr().out


def line(**changes):
    own = plan().line(0, next(made([0])))
    return (json.dumps(own | changes, ensure_ascii=False) + "\n").encode()


FOREIGN = {
    "a text": b"first line\nlast line",
    "a word": b"notes",
    "other JSON lines": b'{"my": "data"}\n{"my": "other"}\n{"my": "third"}',
    "one JSON line": b'{"my": "data"}',
    "an input": b'{"user": "\xe5\x90\x8d\xe5\x89\x8d 1", "signals": []}',
    "an input, cut": b'{"user": "\xe5\x90\x8d\xe5\x89\x8d 1", "signals": [{"ki',
    "a written summary": b'{"user": "\xe5\x90\x8d\xe5\x89\x8d 1", "summary": "my own"}',
    "indented JSON": b'{\n  "a": 1\n}\n',
    "blank lines": b"\n\n",
    "half a character": b"\xe5\x90",
    "Latin-1": b'{"user": "\xe9"}\n',
    "another user": line(user="u"),
    "another run": line(run="ffff"),
    "a field more": line(note="mine"),
    "a number": b"17",
    "nested too deeply": b"[" * 100_000,
    "a second line of another user": line() + line(),
    "a cut line of another user": line() + b'{"user": "u',
    "a line beyond the input": line() * 6,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_the_command_did_not_write_is_refused(name, tmp_path):
    path = tmp_path / "out"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(UserError, match="choose another --output") as caught:
        write(path)
    assert "\n" not in str(caught.value) and content(tmp_path) == {"out": FOREIGN[name]}


def test_a_cut_line_after_the_last_entry_is_refused(tmp_path):
    path = tmp_path / "out"
    write(path)
    more = path.read_bytes() + b'{"us'
    path.write_bytes(more)
    with pytest.raises(UserError, match="out:6: this command did not write this line"):
        write(path)
    assert path.read_bytes() == more


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "out"
    write(path)
    whole = path.read_bytes()
    path.unlink()
    with small_disk(len(whole) - 200), pytest.raises(UserError, match="cannot be written"):
        write(path)
    assert set(path.read_bytes().splitlines()) < set(whole.splitlines()) and path.read_bytes().endswith(b"\n")
    write(path)
    assert path.read_bytes() == whole


def test_two_processes_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "out"

    def second(batch, what):
        with pytest.raises(UserError, match="another process writes this file"):
            write(path)
        yield from made(batch, what)

    write(path, make=second)
    assert path.read_bytes().count(b"\n") == 5


@pytest.mark.parametrize("how", ["same", "relative", "symlink", "hard link", "folder", "no folder", "device"])
def test_impossible_outputs_are_refused_before_anything_is_loaded(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = tmp_path / "users.jsonl"
    given.write_bytes(b'{"user": "u0", "signals": [{"kind": "profile", "text": "Likes novels."}]}')
    (tmp_path / "symlink").symlink_to(given)
    os.link(given, tmp_path / "hard link")
    before = content(tmp_path)
    output = {
        "same": given,
        "relative": "./users.jsonl",
        "folder": tmp_path,
        "no folder": "no/out",
        "device": "/dev/null",
    }
    with pytest.raises(UserError, match="choose another --output"):
        personalize.summarize(None, None, personalize.Flags(given, pathlib.Path(output.get(how, how))))
    assert content(tmp_path) == before


def test_generate_does_not_write_over_the_summaries(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?", "user": "u"}\n')
    (tmp_path / "summaries.jsonl").write_text('{"user": "u", "summary": "Likes novels."}\n')
    with pytest.raises(UserError, match="which this command reads"):
        personalize.generate(None, None, personalize.Flags(tmp_path / "prompts.jsonl", tmp_path / "summaries.jsonl"))


# Exported folders.


def save(folder, family="qwen3", **options):
    checkpoint = hub.load(FIXTURES / family)
    hub.save(folder, checkpoint.config, checkpoint.params, FIXTURES / family, **options)


def test_an_export_replaces_all_of_an_earlier_one(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_bytes((FIXTURES / "qwen3" / name).read_bytes())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    template = (source / "chat_template.jinja").read_text()
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (source / "chat_template.jinja").unlink()
    save(tmp_path / "out", shard_bytes=60_000)
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    checkpoint = hub.load(FIXTURES / "qwen3")
    hub.save(tmp_path / "out", checkpoint.config, checkpoint.params, source)
    hub.save(tmp_path / "new", checkpoint.config, checkpoint.params, source)
    assert content(tmp_path / "out") == content(tmp_path / "new")


def test_an_export_goes_over_nothing_else(tmp_path):
    save(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "export.json").write_text("[")
    (tmp_path / "broken" / "model.safetensors").write_text("weights")
    (tmp_path / "file").write_text("a file")
    before = content(tmp_path)
    for name in ("out", "hub", "broken", "file"):
        with pytest.raises(UserError, match=f"{name}: .*choose another"):
            save(tmp_path / name)
    assert content(tmp_path) == before


def test_an_interrupted_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    save(tmp_path / "out")
    before = content(tmp_path)
    with small_disk(50_000), pytest.raises(UserError, match="out: cannot be written .*free space"):
        save(tmp_path / "out")
    assert content(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(hub.safetensors.numpy, "save_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "out")
    assert content(tmp_path) == before
    rename = pathlib.Path.rename

    def fails(path, target):
        if (
            path.name.startswith(".popi_jax_unfinished_")
            and target.name == "out"
            and (path / "config.json").exists()
            and not fails.done
        ):
            fails.done = True
            raise KeyboardInterrupt
        return rename(path, target)

    fails.done = False
    monkeypatch.setattr(pathlib.Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out")
    assert content(tmp_path) == before and fails.done


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_killed_export_left_is_put_back_or_removed(fails, tmp_path, monkeypatch):
    save(tmp_path / "out")
    before = content(tmp_path)
    (tmp_path / "out").rename(tmp_path / ".popi_jax_replaced_out")  # Killed between two renames.
    (tmp_path / ".popi_jax_unfinished_out").mkdir()
    (tmp_path / ".popi_jax_unfinished_out" / "model.safetensors").write_text("cut")
    if fails:
        monkeypatch.setattr(hub.safetensors.numpy, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(UserError, match="cannot be written"):
            save(tmp_path / "out")
    else:
        save(tmp_path / "out")
    assert content(tmp_path) == before


def test_everyone_can_read_an_export(tmp_path):
    with umask(0o022):
        save(tmp_path / "out", shard_bytes=60_000)
    assert {mode(path) for path in (tmp_path / "out").iterdir()} == {0o644} and mode(tmp_path / "out") == 0o755
    with umask(0o027):
        save(tmp_path / "out")
    assert {mode(path) for path in (tmp_path / "out").iterdir()} == {0o640}


def test_every_file_of_an_export_names_the_same_ends(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in (FIXTURES / "qwen3").glob("*"):
        (source / path.name).write_bytes(path.read_bytes())
    own = {"eos_token_id": 0, "pad_token_id": 0, "repetition_penalty": 1.1}
    (source / "generation_config.json").write_text(json.dumps(own))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<turn>"]}
    settings |= {"auto_map": {"AutoTokenizer": ["code.Slow", "code.Fast"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = hub.load(source)
    hub.save(tmp_path / "out", checkpoint.config, checkpoint.params, source)
    config, generation, tokenizer = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    # 0: generation_config.json; 2: the template's end of a turn; 3: eos_token.
    assert config["eos_token_id"] == generation["eos_token_id"] == [0, 2, 3]
    assert generation == {"eos_token_id": [0, 2, 3], "pad_token_id": 0}  # A penalty would change greedy text.
    # Version 4 of transformers knows no TokenizersBackend, no list of extra_special_tokens.
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<turn>"]
    assert not {"backend", "auto_map", "extra_special_tokens"} & tokenizer.keys()
    assert Tokenizer.load(tmp_path / "out").stop_ids == (0, 2, 3)


@pytest.fixture
def exporting(monkeypatch):
    """--mode=export of a model that is not loaded from a run."""
    checkpoint = hub.load(FIXTURES / "qwen3")
    policy = types.SimpleNamespace(config=checkpoint.config, fuse=lambda base, delta: delta)
    run = types.SimpleNamespace(
        programs=types.SimpleNamespace(policy=policy), base=None, tokenizer_path=FIXTURES / "qwen3", encoder=None
    )
    scale = iter(range(1, 100))

    def trained(*_):
        phi, theta = (jax.tree.map(lambda x, by=next(scale): x * by, checkpoint.params) for _ in range(2))
        return run, types.SimpleNamespace(phi=phi, theta=theta, step=3), {}

    monkeypatch.setattr(export, "trained", trained)
    monkeypatch.setattr(export.exported, "texts", lambda *_, **__: {"popi.json": "{}\n"})
    return lambda output: export.export(None, None, output, None)


def test_export_replaces_an_export_and_nothing_else(exporting, tmp_path):
    out = tmp_path / "deep" / "out"
    exporting(out)
    first = content(out)
    exporting(out)
    second = content(out)
    assert first.keys() == second.keys()
    for role in ("inference", "generator"):
        assert first[f"{role}/model.safetensors"] != second[f"{role}/model.safetensors"]
    (out / ".unfinished" / "inference").mkdir(parents=True)  # As a kill leaves it.
    exporting(out)
    assert content(out).keys() == first.keys() and not (out / ".unfinished").exists()
    for place in ("notes.txt", "generator/notes.txt"):
        (out / place).write_text("mine")
        before = content(out)
        with pytest.raises(UserError, match="notes.txt there is not from an export; choose another"):
            exporting(out)
        assert content(out) == before
        (out / place).unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is not a folder; choose another --output"):
        exporting(tmp_path / "file")


def test_an_interrupted_export_of_a_run_leaves_the_earlier_pair(exporting, tmp_path, monkeypatch):
    out = tmp_path / "out"
    exporting(out)
    before = content(out)
    with small_disk(50_000), pytest.raises(UserError, match="cannot be written"):
        exporting(out)
    assert content(tmp_path / "out") == before
    rename = pathlib.Path.rename

    def fails(path, target):
        if target == out / "generator" and path.name == "generator":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        exporting(out)
    assert content(out) == before


# The other modes.


def test_evaluate_goes_over_no_other_file(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    files.write_json(run / "environment.json", {"popi_jax": "0"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere" / "at all")
    (run / "checkpoints" / "1").mkdir()
    taken = (
        run,
        run / "checkpoints",
        tmp_path / "mine",
        tmp_path / "file",
        tmp_path / "file" / "x",
        tmp_path / "broken",
    )
    for output in taken:
        with pytest.raises(UserError, match="choose another --output"):
            evaluate.evaluate_checkpoint(None, None, output)
    (tmp_path / "earlier").mkdir()
    files.write_json(tmp_path / "earlier" / "environment.json", {"popi_jax": "0"})
    (tmp_path / "earlier" / "results.json").write_text("{}")
    (tmp_path / "earlier" / "notes.txt").write_text("mine")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "lock").touch()
    for output in (tmp_path / "earlier", tmp_path / "new", tmp_path / "killed"):
        evaluate._check_output(output)


def test_compile_goes_over_no_other_file(tmp_path):
    for name, text in (("config.json", '{"model_type": "llama"}'), ("notes.txt", "mine"), ("list.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="choose another --output|expected an object"):
            compile_lib.check_output(tmp_path / name)
    (tmp_path / "report.json").write_text('{"schema": 1, "topology": "here", "steps": []}')
    (tmp_path / "empty.json").write_text("")
    for name in ("report.json", "empty.json", "new.json"):
        compile_lib.check_output(tmp_path / name)


FULL = """
from absl import logging
from popi_jax.modes import cli

def entry(argv):
    try:
        raise RuntimeError("write() failed: No space left on device; writing /data/part-0")
    except RuntimeError as error:
        logging.exception("a thread failed")
        raise ValueError("the writer is closed") from error

cli.run(entry)
"""


def test_a_full_disk_is_one_line_whichever_library_finds_it():
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert (
        done.returncode == 2 and line.startswith("error: the disk is full: write() failed: ") and "/data/part-0" in line
    )
