"""The documentation builds without a warning or a network, and what it takes from code and records is up to date."""

import ast
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

import popi_jax

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: mkdocs does not count the warnings that it does not show.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # A proxy that refuses: whatever asked for the network would fail.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_every_page_is_built(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).exists(), page


def test_pages_load_nothing_from_elsewhere(site):
    loads = re.compile(r"<(?:script|img|iframe)[^>]*\bsrc=\"?https?:|<link[^>]*stylesheet[^>]*\bhref=\"?https?:")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not loads.search(page.read_text(encoding="utf-8")), page


def test_code_of_an_equation_is_shown(site):
    page = (site / "reference" / "api" / "training.html").read_text(encoding="utf-8")
    assert 'id="popi_jax.training.objective.dpo_loss"' in page
    assert "log_sigmoid" in page  # Its source.


def test_generating_changes_nothing(generate):
    stale = [path.relative_to(ROOT).as_posix() for path in generate.stale(generate.outputs())]
    assert not stale, f"{stale}: run python docs/generate.py and commit what it changes"


def test_a_stale_table_is_found(generate, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: flags -->\n\nof long ago\n\n<!-- end -->\nafter\n")
    filled = generate.fill(page.read_text())
    assert generate.stale({page: filled}) == [page]
    assert "of long ago" not in filled and "`--workdir`" in filled
    assert filled.startswith("before\n<!-- table: flags -->\n") and filled.endswith("<!-- end -->\nafter\n")
    page.write_text(filled)
    assert generate.fill(filled) == filled and generate.stale({page: filled}) == []
    assert generate.stale({tmp_path / "missing.md": "text"}) == [tmp_path / "missing.md"]


def test_an_unknown_table_is_an_error(generate):
    with pytest.raises(KeyError, match="nothing"):
        generate.fill("<!-- table: nothing -->\n<!-- end -->")


def test_comments_of_keys_are_what_stands_at_them(generate):
    source = """
def get_config():
    c = dict()
    # Of the section.
    c.model = dict()
    # Above,
    # twice.
    c.model.path = "x"  # Beside.
    c.model.other = (
        "a"  # Inside.
    )
    c.seed = 0
"""
    assert generate.key_comments(source) == {
        "model": "Of the section.",
        "model.path": "Above, twice. Beside.",
        "model.other": "Inside.",
        "seed": "",
    }


def test_every_key_is_in_the_reference(generate):
    from popi_jax.configs import base

    page = (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8")
    config = base.get_config()
    keys = [
        f"{section}.{key}" if hasattr(config[section], "items") else section
        for section in config
        for key in (config[section] if hasattr(config[section], "items") else [section])
    ]
    rows = re.findall(r"^\| `([\w.]+)` \|", page[page.index("<!-- table: configuration -->") :], re.MULTILINE)
    assert sorted(rows) == sorted(keys)


def test_the_path_of_a_batch_has_fifteen_files_at_most():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    stops = re.findall(r"^\| \d+ \| `([\w/.]+)` \|", page, re.MULTILINE)
    assert 10 <= len(stops) <= 15 and len(set(stops)) == len(stops)
    assert all((ROOT / stop).is_file() for stop in stops)


def imports(path: pathlib.Path) -> set[str]:
    """The packages of popi_jax, and its modules beside them, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "popi_jax":
            inside = node.module.split(".")[1:]
            found |= {inside[0]} if inside else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("popi_jax.")}
    return found


def test_packages_import_only_what_stands_above_them():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    order = [name.removesuffix(".py") for name in re.findall(r"^\| `(\w+(?:/|\.py))` \|", page, re.MULTILINE)]
    order = [name.rstrip("/") for name in order]
    package = ROOT / "popi_jax"
    paths = [path for path in package.rglob("*.py") if path != package / "__init__.py"]
    assert {path.relative_to(package).parts[0].removesuffix(".py") for path in paths} <= set(order)
    for path in paths:
        own = path.relative_to(package).parts[0].removesuffix(".py")
        wrong = imports(path) - set(order[: order.index(own) + 1])
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which stand below {own} in docs/architecture.md"


def names(path: pathlib.Path) -> set[str]:
    """The variables, arguments and fields of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name | ast.arg | ast.Attribute):
            found.add(getattr(node, {"Name": "id", "arg": "arg", "Attribute": "attr"}[type(node).__name__]))
    return found


def test_every_shape_letter_is_in_the_legend():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## Shape letters") : page.index("## A joint step in arrays")]
    legend = {letter for cell in re.findall(r"^\| ([\w, ]+) \| ", table, re.MULTILINE) for letter in cell.split(", ")}
    axis = r"(?:[A-Z][a-wyz]*|[nrbx]|\d+)"
    seen = set()
    for path in (ROOT / "popi_jax").rglob("*.py"):
        for name in names(path):
            shape = re.fullmatch(rf"[a-z0-9_]+_({axis}(?:x{axis})*)", name)
            if shape and re.search("[A-Z]", shape[1]):
                axes = {letter for letter in re.findall(axis, shape[1]) if not letter.isdigit()}
                assert axes <= legend, f"{path.relative_to(ROOT)}: {name}"
                seen |= axes
    assert len(seen) > 20


def test_version_is_one():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == popi_jax.__version__
    (newest, *_) = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest == popi_jax.__version__


def test_prose_of_results_agrees_with_the_records(generate):
    page = (DOCS / "results.md").read_text(encoding="utf-8").replace("\n", " ")
    rows = generate.results("quickstart/results.json")
    popi, raw = (rows[method]["context_tokens_mean"] for method in ("popi", "raw_signals"))
    assert f"summaries of {popi:.0f} tokens" in page and f"all {raw:.0f} tokens of signals" in page
    four, eight = (
        generate.results(f"psoups_smollm2/{name}.json")["population"]["popi_minus_this_ci95"][0]
        for name in ("results", "results_eight_signals")
    )
    assert four < 0 < eight  # "With four signals, POPI's lead is within chance; with eight it is not."


def test_prose_of_speed_agrees_with_the_records(generate):
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8").replace("\n", " ")
    found = generate.bench("")
    ours, torch = (found["roofline"][side]["flops"] / 1e9 for side in ("ours", "torch"))
    assert f"XLA multiplies large matrices at {ours:.0f} GFLOP/s and torch at {torch:.0f}," in page
    assert f"A factor of {ours / torch:.1f} is" in page

    def reached(case: str, part: str) -> str:
        shares = [row["roofline"][part] for row in found["rows"] if row["case"] == case and "ours" in row]
        return f"{min(shares):.0%} to {max(shares):.0%}"

    assert f"`dpo_signals` reaches {reached('dpo_signals', 'step')}" in page
    assert f"the prefill of `sampling` {reached('sampling', 'prefill')}" in page
    products, copies = (reached("sampling", f"decode, {part}") for part in ("products", "copy rate"))
    assert f"decoding reaches {products} of the products and {copies} of the copy rate" in page
    profiled = next(row for row in generate.bench("profile")["rows"] if row["case"] == "sampling")
    kinds = profiled["ours"]["profile"]["kinds"]
    products, copies, arithmetic = (f"{kinds[kind]:.0%}" for kind in ("products", "copies", "arithmetic"))
    assert f"{products} products, {copies} copies" in page and f"{arithmetic} arithmetic" in page
    later = generate.bench("evaluation")["roofline"]
    rates = " and ".join(f"{later[side]['flops'] / 1e9:.0f}" for side in ("ours", "torch"))
    assert f"at {rates} GFLOP/s, measured" in page
    steps = [
        next(row["roofline"]["step"] for row in generate.bench(folder)["rows"] if row["case"] == "dpo_summaries")
        for folder in ("growth", "evaluation")
    ]
    growth, evaluation = (f"{share:.0%}" for share in steps)
    assert f"`dpo_summaries` reached {growth} of the roofline, and beside TRL" in page
    assert f"in the run of the evaluation, {evaluation}." in page


def test_readme_says_how_much_faster_our_products_are(generate):
    folders = ("", "evaluation", "adapters", "tunix_evaluation", "tunix_iteration")
    rooflines = [generate.bench(folder)["roofline"] for folder in folders]
    ratios = [roofline["ours"]["flops"] / roofline["torch"]["flops"] for roofline in rooflines]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"matrix products alone are {min(ratios):.1f} to {max(ratios):.1f} times as fast" in readme
