"""JSON files: read with errors that name the file, and written atomically."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path


def read_json(path: Path, why: str = "") -> dict:
    """The object in a JSON file. ValueError, with `why`, if the file is absent or damaged."""
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}" + (f": {why}" if why else ""))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object, but {str(values)[:40]!r}")
    return values


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a kill, sees the old file or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
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
