"""README and docs/: what they name exists, and their commands run (in the experiments' smallest form)."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from popi_jax import main
from popi_jax.configs import base
from popi_jax.data import users
from popi_jax.data.builders import stylebook

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")))
}
ALL = "\n".join(PAGES.values())
COMMANDS = list(
    dict.fromkeys(
        line.split("  # ")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", ALL, re.DOTALL)
        for line in block.splitlines()
        if line.strip()
    )
)
# What `make quickstart` leaves is what others read: its command, with fewer methods, comes first.
PYTHON = sorted((c for c in COMMANDS if ".venv/bin/p" in c), key=lambda c: "results_table" not in c)


def table(page: str, first_header: str) -> list[str]:
    """First cells of a page's first table whose first header is this one."""
    lines = PAGES[page].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_header} "))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append(line.split("|")[1])
    return rows


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_every_command_is_one_that_we_know():
    assert len(PYTHON) >= 7
    for command in COMMANDS:
        assert command in PYTHON or command.startswith("make "), command


def test_make_targets_exist():
    targets = re.findall(r"(?:^|[`(\s])make ([a-z0-9]+)", "\n".join([*COMMANDS, *re.findall(r"`(make [^`]+)`", ALL)]))
    assert {"quickstart", "test", "smollm2", "help", "setup", "docs", "bench"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE), target


def test_make_quickstart_is_the_command_that_runs_here():
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^quickstart:.*\n\t\$\(BIN\)/python (.*)$", makefile, re.MULTILINE)
    for name in ("CONFIG", "WORKDIR"):
        (value,) = re.findall(rf"^{name} \?= (.*)$", makefile, re.MULTILINE)
        recipe = recipe.replace(f"$({name})", value)
    assert PYTHON[0].startswith(f".venv/bin/python {recipe} --methods=")


def test_every_file_named_exists():
    folders = "popi_jax|configs|experiments|constraints|benchmarks|docs|tests|data|model"
    names = re.findall(rf"`((?:{folders})/[\w/.]*)", ALL)
    assert len(names) > 60
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "popi_jax" / name).exists(), name


def test_every_link_in_the_root_leads_somewhere():
    links = [link for page, text in PAGES.items() if "/" not in page for link in re.findall(r"\]\(([^)#]+)\)", text)]
    assert len(links) > 15
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_modes_are_mains():
    cells = table("docs/reference/command-line.md", "`--mode=`")
    assert [re.findall(r"`(\w+)`", cell)[0] for cell in cells] == list(main.MODES)


def test_methods_are_the_results_tables():
    cells = table("docs/reference/command-line.md", "method")
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert set(base.get_config().table.methods) <= named


def test_config_keys_exist():
    config = base.get_config()
    for cell in table("docs/reference/configuration.md", "key"):
        section = ""
        for name in re.findall(r"`([\w.*]+)`", cell):
            section = name.split(".")[0] or section
            key = name.split(".")[1]
            assert key == "*" or key in config[section], name


def test_config_keys_named_in_passing_exist():
    config = base.get_config()
    sections = [name for name in config if hasattr(config[name], "items")]
    ours = "\n".join(text for page, text in PAGES.items() if "coming-from" not in page)  # It names others' keys, too.
    names = re.findall(rf"(?:`|config\.)({'|'.join(sections)})\.(\w+)\b(?![.(])", ours)
    names = [name for name in names if name != ("prompts", "jsonl")]  # A file.
    assert len(names) > 60
    for section, key in names:
        assert key in config[section] or (ROOT / "popi_jax" / section / f"{key}.py").exists(), f"{section}.{key}"


def test_the_example_of_own_data_is_read(tmp_path):
    user, prompt = re.findall(r"```json\n(.*?)```", PAGES["docs/howto/own-data.md"], re.DOTALL)
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


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if "JAX_DISABLE_JIT" in command else ())  # Takes minutes.
        for command in PYTHON
        if "--topology=" not in command  # test_compile.py runs it.
    ],
)
def test_command_runs(command, folder):
    command = re.sub(r"(configs/\w+\.py)(?!:)", r"\1:runlocal", command)
    command = re.sub(r"(?<==)(runs/|\w+\.jsonl)", rf"{folder}/\1", command)
    command = command.replace(".venv/bin/", f"{pathlib.Path(sys.executable).parent}/")
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = [word for word in words if word.split("=", 1)[0] not in settings]
    environment = os.environ | {"XLA_FLAGS": ""} | settings  # One device, as a newcomer has.
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [pathlib.Path(word.split("=", 1)[1]) for word in words if word.startswith("--output=")]
    assert all(output.exists() for output in outputs)
    if not outputs:
        (workdir,) = (pathlib.Path(word.split("=", 1)[1]) for word in words if word.startswith("--workdir="))
        if "--mode=prepare" in words:
            assert json.loads((workdir / "data_card.json").read_text())["splits"]
            return
        assert (workdir / "report.html").exists()
        assert json.loads((workdir / "results.json").read_text())["rows"]
