"""The notebook runs from top to bottom with the smallest experiment."""

import pathlib

import nbclient
import nbformat

NOTEBOOK = pathlib.Path(__file__).parents[1] / "experiments" / "popi.ipynb"


def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("POPI_CONFIG_ARG", "runlocal")
    monkeypatch.setenv("POPI_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("XLA_FLAGS", "")  # One device, as on most machines.
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    last = notebook.cells[-1].outputs
    assert "AutoModelForCausalLM.from_pretrained" in "".join(output.get("text", "") for output in last)
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    assert (tmp_path / "run" / "report.html").exists()
