"""MMLU: questions of 57 subjects with four choices (Hendrycks et al. 2020, arXiv:2009.03300).

Read as published, folders dev, val and test with one CSV file per subject and no header
(`abstract_algebra_test.csv`: question, A, B, C, D, letter), or as on the Hugging Face hub, Parquet or JSON with
`question`, `subject`, `choices` and `answer` (0-3, or a letter). The five questions per subject of `dev`, meant for
few-shot prompts, are the split train. `auxiliary_train`, taken from other benchmarks, is not read.
"""

from pathlib import Path
from string import ascii_uppercase

from minir1.tasks import Problem
from minir1.tasks.multiple_choice import filled, final, problem, verify  # noqa: F401
from minir1.tasks.published import records, split_files

SPLITS = ("train", "validation", "test")
DATA = "MMLU's folder with dev, val and test, as published (CSV) or from the hub (Parquet), or one of its files"
COLUMNS = ("question", "A", "B", "C", "D", "answer")
NAMES = {"train": ("dev",), "validation": ("val", "validation"), "test": ("test",)}
NEED = 'question,A,B,C,D,letter or {"question": "…", "choices": ["…", …], "answer": 0}'


def problems(split: str, data: str | Path) -> list[Problem]:
    """The problems of one split, files in alphabetical order. ValueError for files that are missing or differ."""
    files = [file for file in split_files(data, split, NAMES) if file.parent.name != "auxiliary_train"]
    files = [
        file for file in files if file.parent.name == "all"
    ] or files  # the hub has each subject alone and in `all`
    listed = [_read(where, record, file) for file in files for where, record in records(file, COLUMNS)]
    return filled(data, split, listed)


def _read(where: str, record: dict, file: Path) -> Problem:
    choices, answer = record.get("choices"), record.get("answer")
    if choices is None:
        choices = [record.get(letter) for letter in "ABCD"]
    if isinstance(answer, str):
        answer = ascii_uppercase.find(answer.strip()) if len(answer.strip()) == 1 else None
    subject = record.get("subject") or file.name.partition(".")[0].rpartition("_")[0]
    return problem(where, NEED, record.get("question"), choices, answer, subject=str(subject).replace("_", " "))
