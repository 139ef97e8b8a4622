"""Benchmark files as they were published: JSON, JSONL, CSV and Parquet, each also with gzip around it."""

from __future__ import annotations

import csv
import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path

from minir1.files import parse_json

KINDS = (".jsonl", ".json", ".csv", ".parquet")
ALIASES = {"validation": ("validation", "val", "valid", "dev"), "train": ("train", "auxiliary_train")}


def records(path: str | Path, columns: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Each record of one file, with where it stands, such as `test.jsonl, line 3`, for errors.

    JSON may hold one object, a list of them, or a Hugging Face viewer's {"rows": [{"row": {…}}, …]}. columns: the names
    in a CSV file without a header, such as MMLU's. ValueError, naming file and line, for anything else.
    """
    path = Path(path)
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind not in KINDS:
        raise ValueError(f"{path}: a file of problems ends in {', '.join(KINDS)}, or one of these and .gz")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    found = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}[kind]
    try:
        listed = list(found(content, columns))
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    for where, record in listed:
        if not isinstance(record, dict):
            raise ValueError(f"{path}{where}: need an object, got {str(record)[:60]!r}")
        yield f"{path}{where}", record


def split_files(data: str | Path, split: str) -> list[Path]:
    """The files that hold a split: `data` itself if it is a file, else those in the folder that are named for the split.

    In a folder that is `test.jsonl`, `test-00000-of-00001.parquet`, `algebra_test.csv`, `test/algebra/1.json` or the
    like, at any depth; validation is also called val or dev. ValueError if there is none.
    """
    path = Path(data)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}")
    names = "|".join(ALIASES.get(split, (split,)))
    named = re.compile(rf"(?:^|[/_.-])(?:{names})(?:[/_.-]|$)", re.IGNORECASE)
    files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in KINDS)
    of_split = [file for file in files if named.search(file.relative_to(path).as_posix())]
    if not of_split:
        raise ValueError(f"{path} holds no file of the split {split!r}, such as {split}.jsonl")
    return of_split


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _lines(content: bytes, columns) -> Iterator[tuple[str, object]]:
    for i, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield f", line {i}", _parsed(line, f"line {i}")


def _json(content: bytes, columns) -> Iterator[tuple[str, object]]:
    value = _parsed(content, "the file")
    if isinstance(value, dict) and isinstance(value.get("rows"), list):
        value = [row.get("row", row) if isinstance(row, dict) else row for row in value["rows"]]
    if isinstance(value, dict):
        yield "", value
        return
    if not isinstance(value, list):
        raise ValueError(f"need an object or a list of objects, got {str(value)[:60]!r}")
    yield from ((f", record {i}", record) for i, record in enumerate(value, start=1))


def _csv(content: bytes, columns) -> Iterator[tuple[str, object]]:
    text = io.StringIO(content.decode("utf-8-sig"), newline="")
    for i, record in enumerate(csv.DictReader(text, fieldnames=columns or None), start=1):
        yield f", record {i}", record


def _parquet(content: bytes, columns) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow, or convert the file to JSONL") from error
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    yield from ((f", row {i}", record) for i, record in enumerate(table.to_pylist(), start=1))


def _parsed(text: bytes, where: str):
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}; it begins {text[:60]!r}") from error
