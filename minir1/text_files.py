"""Documents in a user's own files: plain text, and JSON lines with a `text` field. No whole file is held in memory.

    notes.txt, page.md, module.py    one document; a file of more than PART characters is divided into several
    corpus.jsonl                     one document per line, {"text": "…"}; other keys are ignored

Each may be compressed by gzip (.gz). Of a folder, the files whose names end in one of ENDINGS are read, at any depth;
hidden ones, caches and installed packages are left out.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from minir1.files import parse_json

ENDINGS = (
    ".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql",
    ".jsonl",
)  # fmt: skip
LEFT_OUT = ("__pycache__", "node_modules", "site-packages")  # folders
PART = 2**20  # characters


def files(paths: Sequence[Path], skip: Sequence[str] = ()) -> list[Path]:
    """The files to read: those named, and those of the folders named, in the order of their paths; none twice.

    skip: names of further folders to leave out, below those named. ValueError for a path that does not exist, and if
    there is no file at all.
    """
    result: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_file():
            result[path] = None
        elif path.is_dir():
            for folder, below, names in os.walk(path):
                below[:] = sorted(name for name in below if name not in (*LEFT_OUT, *skip) and name[0] != ".")
                chosen = sorted(name for name in names if _ending(name) in ENDINGS and name[0] != ".")
                result |= dict.fromkeys(Path(folder) / name for name in chosen)
        else:
            raise ValueError(f"there is no file or folder {path}")
    if not result:
        shown = ", ".join(map(str, paths))
        raise ValueError(f"{shown}: no file there ends in one of {', '.join(ENDINGS)}")
    return list(result)


def documents(paths: Sequence[Path], skip: Sequence[str] = (), quiet: bool = False) -> Iterator[tuple[str, str]]:
    """(where it stands, text) of each document, white space and line ends as in the file; blank ones are left out.

    Files that are not UTF-8 are left out from the part on that is not, and a line says so unless `quiet`. ValueError as
    `files`, for a damaged .gz, and for a line that is not JSON or has no text.
    """
    not_utf8 = []
    for path in files(paths, skip):
        read = _lines if _ending(path.name) == ".jsonl" else _parts
        try:
            for where, text in read(path):
                if text.strip():
                    yield where, text
        except UnicodeDecodeError:
            not_utf8.append(path)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    if not_utf8 and not quiet:
        print(f"left out {len(not_utf8):,} files that are not UTF-8, such as {not_utf8[0]}")


def _ending(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _parts(path: Path) -> Iterator[tuple[str, str]]:
    """Plain text in parts of PART characters, up to the end of the line (or of as many characters again)."""
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:  # line ends stay as they are
        while part := file.read(PART):
            yield str(path), part + file.readline(PART)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = parse_json(line.removeprefix(b"\xef\xbb\xbf"))
            except ValueError as error:
                raise ValueError(f"{where} is no JSON: {error}; it begins {line[:60]!r}") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f'{where}: need {{"text": "…"}}, got {str(record)[:60]!r}')
            yield where, record["text"]
