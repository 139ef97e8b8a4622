"""The notebooks: no outputs in git, no algorithm, and they run, with a run of the reader's and without one."""

import ast
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from r1_run import build
from toys import BASE

from experiments import demo, r1_zero
from minir1 import tasks
from minir1.ops.dispatch import kernels_missing

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {"01_the_model": 6, "02_policy_gradients": 9, "03_r1_zero": 1, "04_kernels": 4, "05_the_pipeline": 7}
ZERO, PIPELINE = (ROOT / "notebooks" / name for name in ("03_r1_zero.ipynb", "05_the_pipeline.ipynb"))
FORBIDDEN = ("backward", "optim", "nn", "step", "autograd", "grad")
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
            assert not (isinstance(node, ast.Attribute) and node.attr in FORBIDDEN)


@pytest.mark.parametrize("path", **names)
def test_links_lead_somewhere(path):
    for source in cells(path, "markdown"):
        for link in re.findall(r"\]\(([^)#\s]+)", source):
            assert re.match(r"\w+:", link) or (path.parent / link).exists(), link


def execute(path: Path, run: Path | None = None, seconds: int = 240) -> str:
    """Run a notebook in its folder, with RUN = run if there is one; all that it printed and showed, one text."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    if run is not None:
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        first.source, count = re.subn(r"^RUN = [^#]*", f"RUN = Path({str(run)!r})  ", first.source, flags=re.M)
        assert count == 1
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "PYTHONPATH": str(ROOT)}
    where = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=seconds, kernel_name="python3", resources=where)
    client.execute(env=environment)
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any(output.output_type == "error" for output in shown)
    # Printed text comes in pieces that depend on the clock: nothing between them.
    return "".join(output.get("text") or f"\n{json.dumps(output.get('data'))}\n" for output in shown)


def test_every_notebook_is_known():
    assert [path.stem for path in NOTEBOOKS] == list(PICTURES)


@pytest.mark.parametrize("name", ["01_the_model", "02_policy_gradients", "04_kernels"])
def test_it_runs(name):
    if name == "04_kernels" and kernels_missing():
        pytest.skip(kernels_missing())
    shown = execute(ROOT / "notebooks" / f"{name}.ipynb")
    assert shown.count("image/png") == PICTURES[name]


# ---- 03: R1-Zero -------------------------------------------------------------------------------


def check(shown: str) -> None:
    assert "image/png" in shown and "background: rgba(" in shown
    assert shown.count("=====") == 6 and shown.count("--- before") == shown.count("--- after") == 3
    assert "forced to answer without thinking" in shown and "least decided:" in shown
    assert len(re.findall(r"\n\n(?:right|wrong)\n", shown)) == 2  # what was asked has been judged


def test_r1_zero_learns_where_it_is_given_no_run():
    shown = execute(ZERO)
    check(shown)
    before, after = (float(re.search(rf"\n{when} +([\d.]+)%", shown)[1]) for when in ("before", "after"))
    assert after > before + 20
    assert shown.count("image/png") == 2  # the live picture, replaced as it learns, and the final one


def test_r1_zero_reads_a_run(tmp_path):
    pytest.importorskip("nbclient")
    base = replace(BASE, steps=20, mix={})
    rl = r1_zero.Config(
        steps=3, prompts=4, num_generations=2, max_completion_length=24, eval_every=2, eval_answers=1, eval_problems=20,
        min_mixed=0.0,
    )  # fmt: skip
    demo.main(demo.Config(base=base, rl=rl, problems=6, num_generations=2, device="cpu", out=tmp_path / "run"))
    files = sorted((tmp_path / "run").rglob("*"))
    shown = execute(ZERO, tmp_path / "run")
    check(shown)
    assert f"{tmp_path / 'run'}: 3 steps of 4 problems, 2 answers each" in shown
    assert next(tasks.load("countdown").documents(0)) in shown  # what its base read, not that of pairs.py
    assert sorted((tmp_path / "run").rglob("*")) == files  # it only reads


@pytest.mark.parametrize(
    "path, line",
    [(ZERO, "RUN = {} is no finished run of experiments/demo.py"), (PIPELINE, "{} is no run of experiments/r1.py")],
    ids=["03", "05"],
)
def test_a_mistyped_run_is_named(path, line, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    with pytest.raises(nbclient.exceptions.CellExecutionError) as error:
        execute(path, tmp_path / "none")
    assert error.value.ename == "ValueError" and error.value.evalue.startswith(line.format(tmp_path / "none"))


PAIRS = tasks.load(ROOT / "notebooks" / "pairs.py")


def test_pairs_holds_problems_out():
    prompts = {split: {problem.prompt for problem in PAIRS.problems(split)} for split in PAIRS.splits}
    assert all(len(prompts[split]) > 100 for split in PAIRS.splits)
    assert not any(a & b for a, b in itertools.combinations(prompts.values(), 2))
    asked = {text.partition("\n")[0].removeprefix("User:") for text in itertools.islice(PAIRS.documents(0), 300)}
    assert {text for text in asked if text.startswith("make")} <= prompts["train"]


@pytest.mark.parametrize(
    "answer, right",
    [("4+5", True), ("5+4", True), ("2+7", False), ("4+4", False), ("4+5=9", False), ("", False), ("8+1", False)],
)
def test_pairs_judges(answer, right):
    problem = tasks.Problem("make 9 from 2,5,4,8,3", "5+4")
    assert (PAIRS.verify(problem, f"<think>2+5=7:9 no\n</think><answer>{answer}</answer>").status == "right") == right


def test_pairs_takes_each_number_once():
    text = "</think><answer>4+4</answer>"
    assert PAIRS.verify(tasks.Problem("make 8 from 2,5,4,7,1", "7+1"), text).status == "wrong"


def test_pairs_references_and_documents_are_what_it_judges():
    for problem in PAIRS.problems("test"):
        assert PAIRS.verify(problem, f"</think><answer>{problem.reference}</answer>").status == "right"
    texts = [text for text in itertools.islice(PAIRS.documents(0), 300) if text.startswith("User:")]
    counts = [PAIRS.behaviour(None, text.partition("Assistant:")[2]) for text in texts]
    assert [count["tries"] for count in counts] == [len(re.findall(" (?:yes|no)\n", text)) for text in texts]
    assert 0.5 < sum(count["said_yes"] for count in counts) / sum("yes" in text for text in texts) <= 1


# ---- 05: the pipeline --------------------------------------------------------------------------


def test_the_pipeline_reads_what_was_kept_of_a_run(tmp_path):
    """In a checkout without runs."""
    notebook = tmp_path / "notebooks" / PIPELINE.name
    notebook.parent.mkdir()
    notebook.write_text(PIPELINE.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    shown = execute(notebook)
    assert shown.count("image/png") + shown.count("no values for the figure") == PICTURES["05_the_pipeline"]
    assert shown.count("image/png") >= 4 and "r1_pipeline: Base, R1-Zero, Cold start" in shown


def test_the_pipeline_reads_a_run(tmp_path):
    pytest.importorskip("nbclient")
    shown = execute(PIPELINE, build(tmp_path / "run"))
    assert shown.count("image/png") == PICTURES["05_the_pipeline"] and f"{tmp_path / 'run'}: Base, R1-Zero" in shown
