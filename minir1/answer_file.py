"""Sampled answers on disk, as JSONL: the first line says how they were sampled, each other line holds one problem's.

    {"settings": {"task": "gsm8k", …, "weights": {"model.safetensors": "9f…"}}}
    {"kind": "sampled", "index": 0, "prompt": …, "reference": …, "answers": [{"text": …, "right": true, …}, …]}

A killed evaluation loses at most its last line; `begin` returns what is there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from minir1.files import parse_json, plain, replace_text
from minir1.judge import Answer
from minir1.ranks import on_first, rank
from minir1.tasks import Problem

Answers = dict[str, dict[int, list[Answer]]]  # kind of sampling -> index of the problem -> its answers


class Saved(NamedTuple):
    """What a file holds."""

    settings: dict
    answers: Answers
    asked: dict[int, tuple[str, str]]  # index of a problem -> its prompt and reference
    about: dict[int, tuple[str, str]]  # index of a problem -> its subject and language; "" where the file has none


def begin(path: Path, settings: Mapping, problems: Sequence[Problem], resume: bool) -> Answers:
    """Start the file, or continue it; the answers that it holds. Of several ranks the first alone writes.

    ValueError if there is a file and `resume` is False, or if it has other settings or problems, naming them.
    """
    return on_first(lambda: _begin(path, settings, problems, resume))


def _begin(path: Path, settings: Mapping, problems: Sequence[Problem], resume: bool) -> Answers:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"settings": plain(dict(settings))}, ensure_ascii=False) + "\n")
        return {}
    if not resume:
        raise ValueError(f"{path} exists: continue it with --resume, or choose another --out")
    saved = read(path)
    if changed := differing(saved.settings, plain(dict(settings))):
        raise ValueError(f"{path} was sampled with other settings ({'; '.join(changed)}): choose another --out")
    same_problems(saved, problems)
    whole = path.read_bytes().rpartition(b"\n")[0]  # without a torn line
    replace_text(path, whole.decode() + "\n")
    return saved.answers


def append(
    path: Path, kind: str, indices: Sequence[int], problems: Sequence[Problem], grid: list[list[Answer]]
) -> None:
    """Add the answers to these problems. Of several ranks the first alone writes."""
    if rank():
        return
    with path.open("a", encoding="utf-8") as file:
        for index, problem, answers in zip(indices, problems, grid):
            record = {"kind": kind, "index": index, "prompt": problem.prompt, "reference": problem.reference}
            record |= {"subject": problem.subject, "level": problem.level, "language": problem.language}
            record |= {"answers": [dataclasses.asdict(answer) for answer in answers]}
            file.write(json.dumps(plain(record), ensure_ascii=False) + "\n")


def read(path: Path) -> Saved:
    """The whole lines of a file, or of answers.jsonl in a folder. ValueError, naming the line, if it is another."""
    path = path / "answers.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no file {path}: expected the answers.jsonl of an evaluation, or its folder")
    *lines, torn = path.read_bytes().split(b"\n")
    number, saved = 1, Saved({}, {}, {}, {})
    try:
        saved.settings.update(parse_json(lines[0])["settings"])
        for number, line in enumerate(lines[1:], start=2):
            record = parse_json(line)
            group = [Answer(**answer) for answer in record["answers"]]
            saved.answers.setdefault(record["kind"], {})[record["index"]] = group
            saved.asked[record["index"]] = record["prompt"], record["reference"]
            saved.about[record["index"]] = record.get("subject", ""), record.get("language", "")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        shown = lines[number - 1][:60] if lines else b""
        raise ValueError(f"{path}, line {number}: no answers of an evaluation, but {shown!r}") from error
    return saved


def same_problems(saved: Saved, problems: Sequence[Problem]) -> None:
    """ValueError, naming the first, unless the answers are to these problems."""
    for index, (prompt, reference) in sorted(saved.asked.items()):
        now = problems[index] if index < len(problems) else Problem("(none)", "")
        if (prompt, reference) != (now.prompt, now.reference):
            raise ValueError(f"other problems: number {index} was {prompt[:60]!r} and is {now.prompt[:60]!r}")


def differing(a: Mapping, b: Mapping) -> list[str]:
    """What differs between two settings, in words: `temperature: 1.0 and 0.6`; of dicts only their names."""
    changed = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return [key if isinstance(b.get(key), dict) else f"{key}: {a.get(key)!r} and {b.get(key)!r}" for key in changed]
