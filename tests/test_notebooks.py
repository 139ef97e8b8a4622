"""The notebooks: no outputs in git, no algorithm, and they run, with a run of the reader's and without one."""

import ast
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from toys import BASE

from experiments import demo, r1_zero

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
names = {"argvalues": NOTEBOOKS, "ids": [path.name for path in NOTEBOOKS]}


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", **names)
def test_no_outputs_are_stored(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


@pytest.mark.parametrize("path", **names)
def test_no_algorithm_is_defined(path):
    """A notebook explains and plots: no class, no gradient, no optimizer, and functions only for the reader to call."""
    for source in cells(path, "code"):
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, (ast.ClassDef, ast.AsyncFunctionDef))
            assert not isinstance(node, ast.FunctionDef) or ast.get_docstring(node)
            assert not (isinstance(node, ast.Attribute) and node.attr in ("backward", "optim", "nn", "step"))


@pytest.mark.parametrize("path", **names)
def test_links_lead_somewhere(path):
    for source in cells(path, "markdown"):
        for link in re.findall(r"\]\(([^)#\s]+)", source):
            assert re.match(r"\w+:", link) or (path.parent / link).exists(), link


def execute(path: Path, run: Path, seconds: int = 90) -> str:
    """Run a notebook in its folder with RUN = run; all that it printed and showed, one text."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source, count = re.subn(r'^RUN = Path\(.*?\)', f"RUN = Path({str(run)!r})", first.source, flags=re.M)
    assert count == 1
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "PYTHONPATH": str(ROOT)}
    where = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=seconds, kernel_name="python3", resources=where)
    client.execute(env=environment)
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any(output.output_type == "error" for output in shown)
    # Printed text comes in pieces that depend on the clock: nothing between them.
    return "".join(output.get("text") or f"\n{json.dumps(output.get('data'))}\n" for output in shown)


def check(shown: str) -> None:
    assert "image/png" in shown and "background: rgba(" in shown
    assert shown.count("=====") == 6 and shown.count("--- before") == shown.count("--- after") == 3
    assert "forced to answer without thinking" in shown and "least decided:" in shown
    assert len(re.findall(r"\n\n(?:right|wrong)\n", shown)) == 2  # what was asked has been judged


def test_r1_zero_makes_its_own_run_where_there_is_none(tmp_path):
    shown = execute(ROOT / "notebooks" / "r1_zero.ipynb", tmp_path / "none")
    check(shown)
    assert "toy: 10 steps of 8 problems" in shown and not (tmp_path / "none").exists()


def test_r1_zero_reads_a_run(tmp_path):
    pytest.importorskip("nbclient")
    base = replace(BASE, steps=20, mix={})
    rl = r1_zero.Config(
        steps=3, prompts=4, num_generations=2, max_completion_length=24, eval_every=2, eval_answers=1, eval_problems=20,
        min_mixed=0.0,
    )  # fmt: skip
    demo.main(demo.Config(base=base, rl=rl, problems=6, num_generations=2, device="cpu", out=tmp_path / "run"))
    files = sorted((tmp_path / "run").rglob("*"))
    shown = execute(ROOT / "notebooks" / "r1_zero.ipynb", tmp_path / "run")
    check(shown)
    assert f"{tmp_path / 'run'}: 3 steps of 4 problems, 2 answers each" in shown
    assert sorted((tmp_path / "run").rglob("*")) == files  # it only reads
