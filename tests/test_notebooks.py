"""The notebooks in docs/notebooks: what is committed is complete and small, and they run without a network or a data folder."""

import re
import runpy
from pathlib import Path

import pytest

from .serving.peers import python_with
from .test_docs import anchors

nbformat = pytest.importorskip("nbformat", reason="needs the extra `docs`")
ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes
# What each notebook is there to show, whatever images it has.
SHOWN = {
    "grow-on-photos": ["max |Δ| eager      0 (exact)", "every logit is equal: True", "photos.onnx matches the model"],
    "export-and-compare": ["same class: 100.0%", "passed: False", "first layer that differs: stage2_block1_norm1"],
    "int8-within-a-budget": ["int8.onnx agrees with float32 on", "max_drop=0.0:", "float16.onnx matches the model"],
    "serve-with-tritonclient": ["ready: True True", "more rows than executions: True", "400 input 'images'", "exit code 0"],
}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def test_there_are_four_notebooks():
    assert {path.stem for path in NOTEBOOKS} == set(SHOWN)


@every_notebook
def test_committed_notebooks_are_complete_and_small(path):
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "not executed from top to bottom; run scripts/notebooks.py"
    assert all(text in printed(notebook) for text in SHOWN[path.stem])
    # Neither errors nor logs, and nothing about the machine that executed it.
    assert not [output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"]
    assert not re.search(r"/(home|root|tmp|work|usr)/", path.read_text("utf-8"))


@every_notebook
def test_links_lead_somewhere(path):
    dead = []
    for cell in nbformat.read(path, as_version=4).cells:
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            file, _, anchor = target.partition("#")
            found = path.parent / file
            if not found.exists() or (anchor and anchor not in anchors(found)):
                dead.append(target)
    assert dead == []


@pytest.mark.slow
@every_notebook
def test_notebooks_run_without_a_network(path, tmp_path, monkeypatch):
    """They take scikit-learn's digits then."""
    pytest.importorskip("sklearn", reason="needs the extra `demo`")
    for variable in ("CIFAR10_NPZ", "PHOTOS", "KERAS_RESNET_DATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # where nothing has been downloaded
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    if "triton" in path.stem:
        monkeypatch.setenv("TRITON_PYTHON", python_with("tritonclient", "triton"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
    before = path.read_bytes()
    found = printed(runpy.run_path(str(ROOT / "scripts" / "notebooks.py"))["execute"](path))
    assert all(text in found for text in SHOWN[path.stem]), found
    assert path.read_bytes() == before
