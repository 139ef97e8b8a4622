"""JSON files read with errors that name them, and text files replaced as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path


def read_json(path: Path, why: str = "") -> dict:
    """The object in a JSON file. ValueError, with `why`, if the file is absent or damaged."""
    if not path.exists():
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
