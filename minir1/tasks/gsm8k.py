"""GSM8K: grade-school word problems with a number as the answer (Cobbe et al. 2021, arXiv:2110.14168).

The files are read as published, one JSON object per line: `{"question": …, "answer": "worked solution … #### 72"}`.
"""

from __future__ import annotations

import re
from pathlib import Path

from minir1.tasks import Problem, answers, numbers, published, share

SPLITS = ("train", "validation", "test")
VARIANTS = answers.VARIANTS
DATA = "the folder with train.jsonl and test.jsonl as published, or one of the two files"
VALIDATION = 0.07  # share of the published training problems, by a stable hash of the question

claim, number = answers.claim, numbers.number
verify, final = numbers.verify, numbers.final


def problems(split: str, data: str | Path, variant: str = "plain") -> list[Problem]:
    """The problems of one split, in the order of the file; `validation` is a share left out of the published train.

    One file instead of the folder is `test` if its name says so, else `train` and `validation`. ValueError for a file
    that is missing, lacks the split, or has another layout.
    """
    path, published_split = Path(data), "test" if split == "test" else "train"
    if path.is_file() and ("test" in re.split("[-_.]", path.name)) != (split == "test"):
        raise ValueError(f"{path} does not hold the split {split!r}: give {DATA}")
    try:
        files = published.split_files(path, published_split)
    except ValueError as error:
        raise ValueError(f"{error}: give {DATA}") from error
    main = [file for file in files if "socratic" not in file.as_posix()]  # the same problems, solved in other words
    listed = [_problem(record, where) for file in main or files for where, record in published.records(file)]
    if not listed:
        raise ValueError(f"{path} holds no problems of the split {split!r}")
    if split != "test":
        listed = [problem for problem in listed if (share(problem.prompt) < VALIDATION) == (split == "validation")]
    return answers.asked(listed, variant)


def _problem(record: dict, where: str) -> Problem:
    question, solution = record.get("question"), record.get("answer")
    _, marked, reference = solution.rpartition("####") if isinstance(solution, str) else ("", "", "")
    if not isinstance(question, str) or not marked or number(reference) is None:
        raise ValueError(f'{where}: need {{"question": "…", "answer": "… #### number"}}, got {str(record)[:60]!r}')
    return Problem(question, reference.strip(), solution=solution)
