"""MBPP: short Python programs from a sentence and three tests (Austin et al. 2021, arXiv:2108.07732).

Files are read as published: mbpp.jsonl, one object per line with task_id, text, code, test_list and test_setup_code;
sanitized-mbpp.json, a list with `prompt` for `text` and `test_imports`; or either one as a folder with a file per
split. The splits are those of the paper, by task_id.

A prompt is the paper's, which shows the tests and ends in [BEGIN]. With the variant `chat` it asks for a ```python
block.
"""

from __future__ import annotations

import ast
from pathlib import Path

from minir1.tasks import Problem, Verdict, programs, published

SPLITS = ("train", "validation", "test", "prompt")  # the last one: the examples in the prompts of the paper
VARIANTS = ("complete", "chat")
DATA = "mbpp.jsonl or sanitized-mbpp.json as published, or a folder with a file per split"
RUNS_CODE = True
IDS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
TASK = "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n"
REQUEST = "\nAnswer with the whole program in a ```python block, without the tests."


def problems(split: str, data: str | Path, variant: str = "complete") -> list[Problem]:
    """The problems of a split, in the order of the file. ValueError if it is missing or has another layout."""
    records = [record for path in _files(data, split) for record in published.records(path)]
    listed = [_problem(*record, variant == "chat") for record in records]
    listed = [problem for problem in listed if problem.extra["task_id"] in IDS[split]]
    if not listed:
        raise ValueError(f"{data} holds no problems of the split {split!r}: give {DATA}")
    return listed


def _files(data: str | Path, split: str) -> list[Path]:
    for name in ("mbpp.jsonl", "mbpp.jsonl.gz", "sanitized-mbpp.json"):
        if (Path(data) / name).is_file():
            return [Path(data) / name]
    return published.split_files(data, split)


def _problem(where: str, record: dict, chat: bool) -> Problem:
    text, code, tests = record.get("text", record.get("prompt")), record.get("code"), record.get("test_list")
    setup, imports = record.get("test_setup_code") or "", record.get("test_imports") or []
    strings = [text, code, setup, *(tests if isinstance(tests, list) else [None]), *imports]
    if not all(isinstance(string, str) for string in strings) or not isinstance(record.get("task_id"), int):
        raise ValueError(f"{where}: need task_id, text or prompt, code and test_list, got {str(record)[:60]!r}")
    code, setup = (part.replace("\r\n", "\n").replace("\r", "\n") for part in (code, setup))
    shown, run = "\n".join(tests), "\n".join([*imports, setup, *tests]) + "\n"
    try:
        names, helpers = _taken(code, run)
    except SyntaxError as error:
        raise ValueError(f"{where}: code or tests are no Python: {error}") from error
    if not names:
        raise ValueError(f"{where}: the tests use nothing that the code defines: {shown[:60]!r}")
    return Problem(
        prompt=TASK.format(text.strip(), shown) + (REQUEST if chat else "[BEGIN]\n"),
        reference=code,
        solution=f"```python\n{code.strip()}\n```" if chat else f"{code.strip()}\n[DONE]",
        extra={"task_id": record["task_id"], "tests": run, "names": names, "helpers": helpers},
    )


def _taken(code: str, tests: str) -> tuple[list[str], str]:
    """What the tests use of the published program: the names that it defines, and the imports, as source."""
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    defined, imports = {}, []
    for node in ast.parse(code).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports += [ast.unparse(node)]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined[node.name] = None
        else:
            defined |= {name.id: None for name in ast.walk(node) if isinstance(name, ast.Name) and _stored(name)}
    return [name for name in defined if name in used], "\n".join(imports)


def _stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def verify(problem: Problem, text: str) -> Verdict:
    """Right iff the program in the text passes all tests of `test_list` in the sandbox."""
    extra = problem.extra
    return programs.judged(final(problem, text), extra["tests"], names=extra["names"], helpers=extra["helpers"])


def final(problem: Problem, text: str) -> str | None:
    """The program in a text, None if there is none.

    After the thinking, and in the answer tags if there are any: the last ``` block that defines what the tests use,
    else the last block, else the text itself, from [BEGIN] to [DONE] where these are.
    """
    said = programs.answer(text)
    if said is None or len(said) > programs.LONGEST:
        return None
    said = said.rpartition("[BEGIN]")[2].partition("[DONE]")[0]
    block = programs.chosen(said, problem.extra["names"])
    program = programs.whole(said, problem.extra["names"]) if block is None else block
    return program if program.strip() else None
