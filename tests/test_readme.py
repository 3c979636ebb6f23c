"""README.md tells the truth: what it names is there, and its commands run (in the experiments' smallest form)."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from configs import base
from popi_jax import main
from popi_jax.data import stylebook, users

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  # ")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
PYTHON = [command for command in COMMANDS if ".venv/bin/python" in command]


def table(first_header: str) -> list[str]:
    """First cells of the table whose first header is this one."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_header} "))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append(line.split("|")[1])
    return rows


def test_every_command_is_one_that_we_know():
    assert len(PYTHON) >= 7
    for command in COMMANDS:
        assert command in PYTHON or command.startswith("make "), command


def test_make_targets_exist():
    targets = re.findall(r"make ([a-z0-9]+)", " ".join(COMMANDS) + " ".join(re.findall(r"`(make [^`]+)`", README)))
    assert {"quickstart", "test", "smollm2", "help", "setup"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE), target


def test_every_file_named_exists():
    names = re.findall(r"`((?:popi_jax|configs|experiments|constraints|data|model)/[\w/.]*)", README)
    assert len(names) > 20
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "popi_jax" / name).exists(), name


def test_modes_are_mains():
    assert [re.findall(r"`(\w+)`", cell)[0] for cell in table("`--mode=`")] == list(main.MODES)


def test_methods_are_the_results_tables():
    named = {name for cell in table("method") for name in re.findall(r"`(\w+)`", cell)}
    assert set(base.get_config().table.methods) <= named


def test_config_keys_exist():
    config = base.get_config()
    for cell in table("key"):
        section = ""
        for name in re.findall(r"`([\w.*]+)`", cell):
            section = name.split(".")[0] or section
            key = name.split(".")[1]
            assert key == "*" or key in config[section], name


def test_the_example_of_own_data_is_read(tmp_path):
    user, prompt = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (tmp_path / "users.jsonl").write_text(user)
    (example,) = users.read_users(tmp_path / "users.jsonl")
    assert [signal.kind for signal in example.signals] == ["pair", "comment", "profile"]
    assert json.loads(prompt)["user"] == example.user


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: users and prompts are there, what one command leaves the next one finds."""
    folder = tmp_path_factory.mktemp("readme")
    examples = [stylebook.draw_example(0, "test", i, 3, 1) for i in range(12)]
    users.write_users(folder / "users.jsonl", examples)
    prompts = [{"prompt": e.queries[0].prompt, "user": e.user} for e in examples[:2]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return folder


# Without jit a run takes minutes.
NO_TPU_COMPILER = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
MARKS = {"JAX_DISABLE_JIT": pytest.mark.slow, "--topology=": NO_TPU_COMPILER}


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[m for word, m in MARKS.items() if word in c]) for c in PYTHON]
)
def test_command_runs(command, folder):
    command = re.sub(r"(configs/\w+\.py)(?!:)", r"\1:runlocal", command)
    command = re.sub(r"(?<==)(runs/|\w+\.jsonl)", rf"{folder}/\1", command)
    words = [sys.executable if word == ".venv/bin/python" else word for word in shlex.split(command)]
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = [word for word in words if word.split("=", 1)[0] not in settings]
    environment = os.environ | {"XLA_FLAGS": ""} | settings  # One device, as a newcomer has.
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [pathlib.Path(word.split("=", 1)[1]) for word in words if word.startswith("--output=")]
    assert all(output.exists() for output in outputs)
    if not outputs:
        (workdir,) = (pathlib.Path(word.split("=", 1)[1]) for word in words if word.startswith("--workdir="))
        assert (workdir / "report.html").exists()
        assert json.loads((workdir / "results.json").read_text())["rows"]
