"""HumanEval: 164 Python functions to write from their docstrings, judged by tests (Chen et al. 2021, arXiv:2107.03374).

The file is read as published, HumanEval.jsonl.gz: one object per line with task_id, prompt, entry_point,
canonical_solution and test, which defines `check(candidate)`.

A prompt is the published head of the function, which a base model continues. With the variant `chat` it is a request
that a chat model answers with the whole function.
"""

from __future__ import annotations

from pathlib import Path

from minir1.tasks import Problem, Verdict, programs, published

SPLITS = ("test",)
VARIANTS = ("complete", "chat")
DATA = "HumanEval.jsonl.gz as published, or the folder that holds it"
RUNS_CODE = True
KEYS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
REQUEST = "Write the Python function that this code begins. Answer with the whole function in a ```python block."


def problems(split: str, data: str | Path, variant: str = "complete") -> list[Problem]:
    """The problems in the order of the file. ValueError for a file that is missing or has another layout."""
    listed = [record for path in _files(data) for record in published.records(path)]
    if not listed:
        raise ValueError(f"{data} holds no problems: give {DATA}")
    return [_problem(*record, variant == "chat") for record in listed]


def _files(data: str | Path) -> list[Path]:
    if Path(data).is_dir() and (named := sorted(Path(data).glob("HumanEval.jsonl*"))):
        return named[:1]
    return published.split_files(data, "test")


def _problem(where: str, record: dict, chat: bool) -> Problem:
    if lacking := [key for key in KEYS if not isinstance(record.get(key), str)]:
        raise ValueError(f"{where}: need the strings {', '.join(KEYS)}; {', '.join(lacking)} missing")
    code, solution = record["prompt"], record["canonical_solution"]
    return Problem(
        prompt=f"{REQUEST}\n\n```python\n{code.strip()}\n```" if chat else code,
        reference=solution,
        solution=f"```python\n{(code + solution).strip()}\n```" if chat else solution,
        extra={key: record[key] for key in ("task_id", "entry_point", "test")} | {"code": code},
    )


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the function in the text passes the published tests in the sandbox."""
    name = problem.extra["entry_point"]
    tests = f"{problem.extra['test']}\ncheck({name})\n"
    return programs.judged(final(problem, text), tests, names=[name], helpers=problem.extra["code"])


def final(problem: Problem, text: str) -> str | None:
    """The program in a text, with the prompt's imports and helpers; None if there is none.

    After the thinking, and in the answer tags if there are any: the last ``` block that defines the function, else the
    last block, else the text itself, which then continues the prompt up to the end of the function.
    """
    return programs.completed(problem.extra["code"], text, problem.extra["entry_point"])
