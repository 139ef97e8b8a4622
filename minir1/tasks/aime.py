"""AIME and AMC: competition problems whose answers are integers, in the layouts in which they are shared.

Records have `problem` or `question` and `answer`, a string or a number (`204`, `"004"`, `27.0`), often also `solution`,
`level`, `subject`, `id`, `year` and `url`; the case of the names does not matter.
"""

from __future__ import annotations

from pathlib import Path

from minir1.tasks import Problem, answers, numbers, published

SPLITS = ("test",)  # a benchmark; the files themselves are often called train
VARIANTS = answers.VARIANTS
DATA = "the file with the problems as published (JSON, JSONL, CSV or Parquet), or its folder"

verify, final = numbers.verify, numbers.final


def problems(split: str, data: str | Path, variant: str = "plain") -> list[Problem]:
    """All problems of the file, or of the files of a folder, in their order; references without leading zeros.

    In a folder these are the files named for test, else those named for train, else all. ValueError for a file that is
    missing or has another layout.
    """
    listed = [_problem(record, where) for file in _files(Path(data)) for where, record in published.records(file)]
    if not listed:
        raise ValueError(f"{data} holds no problems: give {DATA}")
    return answers.asked(listed, variant)


def _files(path: Path) -> list[Path]:
    for split in ("test", "train"):
        try:
            return published.split_files(path, split)
        except ValueError as error:
            missing = error
    files = sorted(file for file in path.rglob("*") if file.name.lower().removesuffix(".gz").endswith(published.KINDS))
    if not files:
        raise ValueError(f"{missing}: give {DATA}")
    return files


def _problem(record: dict, where: str) -> Problem:
    fields = {str(name).lower(): value for name, value in record.items()}
    question = fields.get("problem") or fields.get("question")
    answer = fields.get("answer")
    reference = None if isinstance(answer, bool) else numbers.number(str(answer))
    if not isinstance(question, str) or reference is None or reference.denominator != 1:
        raise ValueError(f'{where}: need {{"problem": "…", "answer": an integer}}, got {str(record)[:60]!r}')
    named = {name: str(fields[name]) for name in ("level", "subject", "solution") if fields.get(name) is not None}
    extra = {name: fields[name] for name in ("id", "year", "url") if fields.get(name) is not None}
    return Problem(question, str(reference), **named, extra=extra)
