"""Benchmark files as they were published: JSON, JSONL, CSV and Parquet, each also with gzip around it."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from minir1.files import parse_json

KINDS = (".jsonl", ".json", ".csv", ".parquet")
NAMES = {  # of a split -> the words in paths that name it
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def records(path: str | Path, columns: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Each record of one file, with where it stands, such as `test.jsonl, line 3`, for errors.

    JSON may hold one object, a list of them, a Hugging Face viewer's {"rows": [{"row": {…}}, …]}, or lines of JSON.
    columns: the names in a CSV file without a header, such as MMLU's. Blank files and lines hold no records.
    ValueError in one line, naming the file and, if known, the line, for anything else.
    """
    path = Path(path)
    kind = _kind(path)
    if kind not in KINDS:
        raise ValueError(f"{path}: a file of problems ends in {', '.join(KINDS)}, or one of these and .gz")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    reader = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}[kind]
    for where, record in reader(content, str(path), columns):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: need an object, got {str(record)[:60]!r}")
        yield where, record


def split_files(
    data: str | Path,
    split: str,
    names: Mapping[str, tuple[str, ...]] = NAMES,
    kinds: tuple[str, ...] = KINDS,
) -> list[Path]:
    """The files that hold a split: `data` itself if it is a file, else those in the folder named for the split.

    In a folder that is `test.jsonl`, `test-00000-of-00001.parquet`, `algebra_test.csv`, `test/algebra/1.json` or the
    like, at any depth; of several such words in a path the last one counts. names: the words for each split. kinds: of
    files to look for. Hidden files and folders are left out. ValueError if there is none, if a file's name says that it
    holds another split, and if the folder has the same file twice, such as test.jsonl and test.jsonl.gz.
    """
    path, names = Path(data), {split: (split,), **names}
    if path.is_file():
        if split_named(path.name, names) not in (split, None):
            raise ValueError(f"{path} does not hold the split {split!r}: give the folder, or the file of that split")
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}")
    files = {}  # path without kind -> file
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        hidden = any(part.startswith((".", "__MACOSX")) for part in inside.parts)
        if hidden or _kind(file) not in kinds or not file.is_file() or split_named(inside.as_posix(), names) != split:
            continue
        stem = str(inside)[: str(inside).lower().rindex(_kind(file))]
        if stem in files:
            raise ValueError(f"{path} holds {files[stem].name} and {file.name}: remove one, or give a file")
        files[stem] = file
    if not files:
        raise ValueError(f"{path} holds no file of the split {split!r}, such as {names[split][0]}.jsonl")
    return list(files.values())


def split_named(path: str, names: Mapping[str, tuple[str, ...]] = NAMES) -> str | None:
    """The split that a path names, None if none: `dev-00000-of-00001.parquet` names validation."""
    parts = re.split(r"[/_.\s-]+", path.lower())
    return next((split for part in reversed(parts) for split, words in names.items() if part in words), None)


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _lines(content: bytes, path: str, columns=()) -> Iterator[tuple[str, object]]:
    for i, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            yield f"{path}, line {i}", _parsed(line, f"{path}, line {i}")


def _json(content: bytes, path: str, columns) -> Iterator[tuple[str, object]]:
    if not content.strip():
        return
    try:
        value = parse_json(content)
    except ValueError as error:
        lines = content.strip().splitlines()
        if len(lines) < 2 or not lines[0].startswith(b"{") or not lines[0].rstrip().endswith(b"}"):
            raise ValueError(f"{path} is no JSON: {error}; it begins {content[:60]!r}") from error
        yield from _lines(content, path)
        return
    if isinstance(value, dict) and isinstance(value.get("rows"), list):
        value = [_viewed(row, f"{path}, record {i}") for i, row in enumerate(value["rows"], start=1)]
    if isinstance(value, dict):
        yield path, value
    elif isinstance(value, list):
        yield from ((f"{path}, record {i}", record) for i, record in enumerate(value, start=1))
    else:
        raise ValueError(f"{path}: need an object or a list of objects, got {str(value)[:60]!r}")


def _viewed(row, where: str):
    """The record in a row of the Hugging Face viewer."""
    if not isinstance(row, dict) or "row" not in row:
        return row
    if truncated := row.get("truncated_cells"):
        raise ValueError(f"{where}: the viewer truncated {str(truncated)[:60]}: download the file instead")
    return row["row"]


def _csv(content: bytes, path: str, columns: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    try:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is not UTF-8: {error.reason}") from error
    header, line = columns, 1
    try:
        for i, row in enumerate(rows):
            where, line = f"{path}, line {line}", rows.line_num + 1  # a cell may hold line breaks
            if i == 0 and (not columns or set(columns) <= set(row)):
                header = tuple(row)
            elif row and len(row) != len(header):
                raise ValueError(f"{where}: need {len(header)} cells ({', '.join(header)[:80]!r}), got {len(row)}")
            elif row:
                yield where, dict(zip(header, row))
    except csv.Error as error:
        raise ValueError(f"{path}, line {line} is no CSV: {error}") from error


def _parquet(content: bytes, path: str, columns) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow, or convert the file to JSONL") from error
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is no Parquet file: {' '.join(str(error).split())[:200]}") from error
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, start=1))


def _parsed(text: bytes, where: str):
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}; it begins {text[:60]!r}") from error
