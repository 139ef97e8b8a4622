"""JSON files: read with errors that name the file, and written atomically."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path


def read_json(path: Path, why: str = "") -> dict:
    """The object in a JSON file. ValueError, with `why`, if the file is absent or damaged."""
    if not path.is_file():
        absent = "" if path.parent.is_dir() else ", as there is no such folder"
        raise ValueError(f"{path.parent} holds no {path.name}{absent}" + (f": {why}" if why else ""))
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object, but {str(values)[:40]!r}")
    return values


def read_text(path: Path) -> str:
    """The text of a file. ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def parse_json(text: str | bytes):
    """A JSON value. ValueError if it is none, is nested too deeply, or has a string that is no Unicode text."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    json.dumps(value, ensure_ascii=False).encode()  # fails for "\ud800", half of a surrogate pair
    return value


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a kill, sees the old file or the new, never a part."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """As `replace_text`."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, values: dict) -> None:
    """Write an object as `replace_text` does, making the folder; values as in `plain`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(plain(values), indent=2, ensure_ascii=False) + "\n")


def plain(value):
    """`value` as JSON knows it: numpy and torch scalars as numbers, NaN and infinity as None, paths as str."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch: a number, or lists of numbers
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
