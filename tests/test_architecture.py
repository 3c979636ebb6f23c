"""The rules of docs/architecture.md that the source alone can show."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "popi_jax"
SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def files_with(found) -> set[str]:
    return {name for name, tree in SOURCES.items() if any(found(node) for node in ast.walk(tree))}


def attribute(*names: str):
    """Whether a node is x.NAME for any x."""
    return lambda node: isinstance(node, ast.Attribute) and node.attr in names


def test_one_module_makes_every_program():
    assert files_with(attribute("jit", "pjit", "pmap")) == {"modes/programs.py"}


def test_only_the_edge_reads_a_config_dict():
    def imports(node):
        if isinstance(node, ast.ImportFrom):
            return node.module == "ml_collections"
        return isinstance(node, ast.Import) and any(name.name == "ml_collections" for name in node.names)

    assert files_with(imports) == {"config.py", "main.py"}


def test_no_mesh_is_ambient():
    assert files_with(attribute("set_mesh", "use_mesh", "get_abstract_mesh", "get_mesh")) == set()


@pytest.mark.parametrize("name", SOURCES)
def test_modules_and_functions_are_short(name):
    lines = (PACKAGE / name).read_text().count("\n")
    functions = [node for node in ast.walk(SOURCES[name]) if isinstance(node, ast.FunctionDef)]
    longest = max((node.end_lineno - node.lineno + 1 for node in functions), default=0)
    assert lines <= 500 and longest <= 90, (lines, longest)


def test_the_package_has_a_dozen_entries():
    entries = {name.split("/")[0] for name in SOURCES} | {"assets"}
    assert len(entries) <= 12, entries
