"""Mistakes in flags and config files: exit code 2 and one line that names the place and the remedy."""

import os
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from popi_jax import config
from popi_jax.errors import UserError
from popi_jax.modes import cli

BASE = "from popi_jax.configs import base\n\ndef get_config():\n    c = base.get_config()\n"


def parsed(*arguments):
    """The settings that a command line gives, read as main reads it."""
    argv, values = ["main", *arguments], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    sys.modules.pop("config_config", None)  # Its names would otherwise be there in the next config file, too.
    cli._parse_flags(argv, values)
    return config.parse(values.config)


def refused(*arguments):
    with pytest.raises(UserError) as error:
        parsed(*arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


CONFIG_FILES = [
    ("def get_config(:\n", ":1: invalid syntax"),
    ("def get_config():\n\tx = 1\n        y = 2\n", ":3: inconsistent use of tabs and spaces in indentation"),
    ("# coding: latin-7777\n", ":1: unknown encoding: latin-7777"),
    ("x = 1\nx.y\n", ":2: AttributeError: 'int' object has no attribute 'y'"),
    ("import nosuch\n", ":1: ModuleNotFoundError: No module named 'nosuch'"),
    ("def get_config():\n    return nosuch\n", ":2: NameError: name 'nosuch' is not defined"),
    ("def get_config():\n    raise ValueError('one\\ntwo')\n", ":2: ValueError: one"),
    ("def get_config():\n    return b'\\xff'.decode()\n", ":2: UnicodeDecodeError: 'utf-8' codec"),
    ("def get_config():\n    raise SystemExit('bye')\n", ":2: SystemExit: bye"),
    ("def get_config():\n    return get_config()\n", ":2: RecursionError: maximum recursion depth exceeded"),
    ("def get_config():\n    return open('/nosuch')\n", ":2: FileNotFoundError: "),
    ("def get_config():\n    return [].nosuch.x\n", ":2: AttributeError: 'list' object has no attribute 'nosuch'"),
    (f"{BASE}    c.data.pth = ''\n    return c\n", ':5: AttributeError: \'Key "pth" does not exist'),
    (f"{BASE}    c.seed = 'a'\n    return c\n", ":5: TypeError: Could not override field 'seed'"),
    (f"{BASE}    c.optim.lr_inference = 10**400\n    return c\n", ":5: OverflowError: int too large"),
]


@pytest.mark.parametrize("override", [(), ("--config.seed=1",)])
@pytest.mark.parametrize(("source", "message"), CONFIG_FILES, ids=[message for _, message in CONFIG_FILES])
def test_an_error_of_a_config_file_is_one_line_with_file_and_line(tmp_path, source, message, override):
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert refused(f"--config={path}", *override).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "--config: the file has no function get_config; see"),
        ("def get_config(a, b):\n    pass\n", "--config: TypeError: get_config() missing 2 required positional arg"),
        ("def get_config():\n    pass\n", "--config: get_config returned None; return a ConfigDict"),
        ("def get_config():\n    return {'seed': 1}\n", "--config: get_config returned dict; return a ConfigDict"),
        (f"{BASE}    c.seed = None\n    return c\n", "config.seed is None; it should be a valid integer"),
        (f"{BASE}    c = c.unlock()\n    c.model = {{}}\n    return c\n", "config.model.path is missing; start from"),
        (
            f"{BASE}    c = c.unlock()\n    c.extra = 1\n    return c\n",
            "config.extra is not a setting; configs/base.py",
        ),
        (f"{BASE}    del c.unlock().eval\n    return c\n", "config.eval is missing; start from"),
    ],
)
def test_a_config_of_another_kind_is_one_line_with_the_remedy(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert refused(f"--config={path}").startswith(message)


@pytest.mark.parametrize("override", [(), ("--config.seed=1",)])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("configs/nosuch.py", "--config: No such file or directory: 'configs/nosuch.py'; give"),
        ("configs/nosuch.py:runlocal", "--config: No such file or directory: 'configs/nosuch.py'; give"),
        ("configs", "--config: Is a directory: 'configs'; give"),
        ("", "--config: Path to config file is an empty string; give"),
        ("configs/quickstart.py:runlocla", "configs/quickstart.py: the argument 'runlocla' is unknown; use runlocal,"),
        ("configs/recorded.py", "configs/recorded.py: the file is missing; use --config=configs/recorded.py:DIR/"),
        ("configs/recorded.py:/nosuch.json", "/nosuch.json: no such file; give a run's config.json"),
    ],
)
def test_a_config_that_is_not_there_is_one_line_with_the_remedy(path, message, override):
    assert refused(f"--config={path}", *override).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nosuch=1", "--config.nosuch: no such key; configs/base.py has all keys"),
        ("model.nosuch=1", "--config.model.nosuch: no such key; configs/base.py has all keys"),
        ("train.steps=1", "--config.train.steps: no such key; did you mean --config.schedule.steps?"),
        ("optim.lr=1", "--config.optim.lr: no such key; did you mean --config.optim.lr_generator?"),
        ("objective.betta=1", "--config.objective.betta: no such key; did you mean --config.objective.beta?"),
        ("limits.buckets[0]=3", "--config.limits.buckets[0]: no such key; did you mean --config.limits.buckets?"),
        ("model.path.x=3", "--config.model.path.x: no such key; did you mean --config.model.path?"),
        ("=3", "--config.: no such key"),
        ("seed=None", "flag --config.seed=None: invalid literal for int()"),
        ("seed=9223372036854775808", "config.seed is 9223372036854775808; it must be less than 4294967296"),
        ("seed=" + "9" * 5000, "flag --config.seed=9999"),
        ("schedule=joint", "flag --config.schedule=joint: "),
        ("limits.buckets=('a',)", "config.limits.buckets.0 is 'a'; it should be a valid integer"),
        ("limits.buckets=(1.5,)", "config.limits.buckets.0 is 1.5; it should be a valid integer"),
        ("limits.buckets=('',)", "config.limits.buckets.0 is ''; it should be a valid integer"),
        ("limits.buckets=(None,)", "config.limits.buckets.0 is None; it should be a valid integer"),
        ("limits.buckets=(True,)", "config.limits.buckets.0 is True; it should be a valid integer"),
        ("limits.buckets=a b,c", "flag --config.limits.buckets=a b,c: Error while parsing string"),
        ("limits.buckets=" + "(" * 10**5, "config.limits.buckets.0 is '((("),
        ("limits.buckets=" + str(tuple(range(1, 100))), "config.limits.buckets has 99 lengths; give at most 64"),
        ("train.profile_steps=('a','b')", "config.train.profile_steps.0 is 'a'; it should be a valid integer"),
        ("train.profile_steps=(3,1)", "config.train.profile_steps is (3, 1); give (first, last) or ()"),
        ("eval.bootstrap=1000000000", "config.eval.bootstrap is 1000000000; it must be at most"),
        ("schedule.steps=1000000000", "config.schedule.steps is 1000000000; it must be at most"),
        ("train.users_per_step=1000000000", "config.train.users_per_step is 1000000000; it must be at most"),
        ("data.test_users=1000000000", "config.data.test_users is 1000000000; it must be at most"),
        ("data.train_draws=1000000000", "config.data.train_draws is 1000000000; it must be at most"),
        ("data.signals_per_user=1000000000", "config.data.signals_per_user is 1000000000; it must be at most"),
        ("sampling.k=1000000000", "config.sampling.k is 1000000000; it must be at most"),
        ("mesh.data=1000000000", "config.mesh.data is 1000000000; it must be at most"),
        ("sampling.temperature=inf", "config.sampling.temperature is inf; it should be a finite number"),
        ("sampling.temperature=1e-320", "config.sampling.temperature is 1e-320; it must be at least"),
        ("eval.temperature=1e-320", "config.eval.temperature is 1e-320; it must be 0 or at least"),
        ("objective.beta=inf", "config.objective.beta is inf; it should be a finite number"),
        ("objective.beta=1e39", "config.objective.beta is 1e+39; it must be at most"),
        ("objective.kl_coef=inf", "config.objective.kl_coef is inf; it should be a finite number"),
        ("objective.baseline_decay=-1", "config.objective.baseline_decay is -1.0; it must be at least 0"),
        ("optim.b1=inf", "config.optim.b1 is inf; it should be a finite number"),
        ("optim.b2=nan", "config.optim.b2 is nan; it should be a finite number"),
        ("optim.b2=0.9999999999", "config.optim.b2 is 0.9999999999; it must be at most"),
        ("optim.clip_inference=inf", "config.optim.clip_inference is inf; it should be a finite number"),
        ("name=a\nb", "config.name is 'a\\nb'; it must not have control characters"),
        ("name=\udcff", "config.name is '\\udcff'; it must be text that UTF-8 can encode"),
        ("name=" + "x" * 300, "config.name is 'xxx"),
        ("data.path=a\0b", "config.data.path is 'a\\x00b'; it must not have control characters"),
        ("table.seeds=()", "config.table.seeds is (); give at least one value"),
        ("table.seeds=(0,0)", "config.table.seeds is (0, 0); give at least one value, and each only once"),
        ("lora.targets=('q','z')", "config.lora.targets.1 is 'z'; choose one of q, k, v, o, gate, up, down"),
    ],
)
def test_an_override_that_is_wrong_is_one_line_with_key_and_value(override, message):
    assert refused("--config=configs/quickstart.py:runlocal", f"--config.{override}").startswith(message)


def test_an_override_that_is_right_is_taken():
    given = "--config=configs/quickstart.py:runlocal", "--config.table.seeds=(1,2)", "--config.name=sweep[/b]"
    settings = parsed(*given, "--config.eval.temperature=0")
    assert (settings.table.seeds, settings.name, settings.eval.temperature) == ((1, 2), "sweep[/b]", 0.0)


def test_a_config_that_ships_is_found_by_its_name_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed("--config=quickstart:runlocal", "--config.seed=3").seed == 3
    (tmp_path / "quickstart").mkdir()  # The user's own.
    assert refused("--config=quickstart").startswith("--config: Is a directory: 'quickstart'; give")


def test_help_lists_flags_and_keys_and_ends_with_0():
    done = subprocess.run(
        [sys.executable, "-m", "popi_jax.main", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--workdir" in done.stdout and "--config.objective.beta=0.1\n" in done.stdout


def test_the_package_is_imported_without_jax():
    code = "import popi_jax, sys; assert 'jax' not in sys.modules; popi_jax.Personalizer; assert 'jax' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/nosuch.py"], "error: --config: No such file or directory: 'configs/nosuch.py'; give"),
        (["--config=configs/quickstart.py", "--config.seed=-1"], "error: config.seed is -1; it must be at least 0"),
        (["--config=BROKEN"], "error: mine.py:2: NameError: name 'nosuch' is not defined"),
        (["--config=EMPTY"], "error: --config: get_config returned None; return a ConfigDict"),
        (
            ["--config=configs/quickstart.py", "--mode=summarize", "--output=o", "--input=USERS"],
            "error: users.jsonl:1: field 'user' must be a string, found a number; put text in quotes",
        ),
        (
            ["--config=configs/users.py:runlocal", "--config.data.path=USERS"],
            "error: users.jsonl:1: field 'user' must be a string, found a number; put text in quotes",
        ),
    ],
)
def test_main_exits_with_2_and_one_line(tmp_path, arguments, message):
    (tmp_path / "mine.py").write_text("def get_config():\n    return nosuch\n")
    (tmp_path / "empty.py").write_text("def get_config():\n    pass\n")
    (tmp_path / "users.jsonl").write_text('{"user": 7}\n')
    for name, path in (("BROKEN", "mine.py"), ("EMPTY", "empty.py"), ("USERS", "users.jsonl")):
        arguments = [argument.replace(name, str(tmp_path / path)) for argument in arguments]
    command = [sys.executable, "-m", "popi_jax.main", *arguments, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.replace(f"{tmp_path}/", "").startswith(message), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("results_table", ["--config=configs/quickstart.py", "--seeds=²"], "error: --seeds: '²' is not a seed; give"),
        ("results_table", ["--config=configs/quickstart.py", "--methods="], "error: --methods: []; give at least one"),
        (
            "results_table",
            ["--config=configs/quickstart.py", "--signals=4,0"],
            "error: --signals: '0' is not a number of",
        ),
        ("results_table", ["--config=configs/quickstart.py", "--signals="], "error: --signals: []; give at least one"),
        (
            "tpu_table",
            ["--cases=quickstart:x@v5e:2x2"],
            "error: --cases: 'quickstart:x@v5e:2x2': configs/quickstart.py",
        ),
        (
            "tpu_table",
            ["--cases=nosuch:x@v5e:2x2"],
            "error: --cases: 'nosuch:x@v5e:2x2': No module named 'popi_jax.configs.nos",
        ),
    ],
)
def test_experiments_exit_with_2_and_one_line(tmp_path, module, arguments, message):
    arguments = [*arguments, f"--{'workdir' if module == 'results_table' else 'output'}={tmp_path / 'run'}"]
    command = [sys.executable, f"experiments/{module}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(message), done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\\nmore')",
            "allocating 9 bytes",
        ),
        ("MemoryError()", "MemoryError"),
    ],
)
def test_exhausted_memory_is_one_line_with_the_remedy(error, said):
    source = f"import jax\nfrom popi_jax.modes import cli\ndef entry(argv): raise {error}\ncli.run(entry)"
    out = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert out.returncode == 2 and len(out.stderr.splitlines()) == 1, out.stderr
    assert out.stderr.startswith("error: out of memory: ") and said in out.stderr
    assert "lower config.train.users_per_step" in out.stderr


def test_a_closed_stdout_is_no_error():
    source = "from popi_jax.modes import cli\ncli.run(lambda argv: print('done'))"
    command = ["sh", "-c", '"$0" -c "$1" >&-', sys.executable, source]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (out.returncode, out.stderr) == (0, "")
