"""ARC: science questions from school exams, in an easy and a challenge set (Clark et al. 2018, arXiv:1803.05457).

Read as published, `ARC-Easy-Test.jsonl` and the like, or as on the Hugging Face hub. The level is easy or challenge, by
the name of the file or its folder: give the folder of one set for its problems alone.
"""

import re
from pathlib import Path

from minir1.tasks import Problem
from minir1.tasks.multiple_choice import filled, final, problem, verify  # noqa: F401
from minir1.tasks.published import records, split_files

SPLITS = ("train", "validation", "test")
DATA = "ARC's folder with ARC-Easy and ARC-Challenge, one of the two, or one of their JSONL or Parquet files"
NEED = '{"question": {"stem": "…", "choices": [{"text": "…", "label": "A"}, …]}, "answerKey": "A"}, or the hub\'s form'


def problems(split: str, data: str | Path) -> list[Problem]:
    """The problems of one split, files in alphabetical order. ValueError for files that are missing or differ.

    Labels may be A-E or 1-5: the choices are lettered anew, in the order of the file.
    """
    files = split_files(data, split, kinds=(".jsonl", ".json", ".parquet"))  # the same problems are there as CSV
    return filled(data, split, [_read(where, record, file) for file in files for where, record in records(file)])


def _read(where: str, record: dict, file: Path) -> Problem:
    question, choices = record.get("question"), record.get("choices")
    if isinstance(question, dict):  # as published; on the hub the choices are two lists
        pairs = question.get("choices")
        pairs = pairs if isinstance(pairs, list) and all(isinstance(pair, dict) for pair in pairs) else []
        choices = {key: [pair.get(key) for pair in pairs] for key in ("text", "label")}
        question = question.get("stem")
    choices = choices if isinstance(choices, dict) else {}
    texts, labels, key = choices.get("text"), choices.get("label"), record.get("answerKey")
    lists = isinstance(texts, list) and isinstance(labels, list)
    whole = lists and len(texts) == len(labels) and labels.count(key) == 1
    right = labels.index(key) if whole else None
    level = re.findall("easy|challenge", "/".join(file.parts[-3:]).lower())
    return problem(where, NEED, question, texts, right, level=level[-1] if level else "default")
