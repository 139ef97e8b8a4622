"""Checkpoints that survive a kill: written under a temporary name, fsynced, renamed; `latest` is replaced last.

    checkpoint/
      step-000120/     a Hugging Face folder, and training_state.pt beside it
      latest           one line: step-000120
      best             one line: the step that scored best
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from minir1.files import replace_text

STATE = "training_state.pt"


def save(
    folder: Path, step: int, write: Callable[[Path], None], state: dict, *, best: bool = False, keep: int = 1
) -> Path:
    """Write checkpoint `step` into `folder` and return its path, `folder/step-000120`.

    `write(path)` puts the model and tokenizer into the empty folder `path`; `state` (tensors and plain Python values)
    goes to training_state.pt. Then `latest`, and with `best` also `best`, names the new checkpoint. All others are
    deleted but these two and the newest `keep` up to `step` (a resumed run discards what lies beyond). A kill at any
    moment leaves `latest` and `best` valid, except for an instant while a step is saved a second time.

    Raises ValueError for a negative step, keep < 1, or a state that `weights_only` would not load.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step is {step} and keep is {keep}; allowed are step >= 0 and keep >= 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step-*.tmp-*"):  # of a killed save
        shutil.rmtree(leftover)
    final = folder / f"step-{step:06d}"
    aside = folder / f"{final.name}.tmp-{os.getpid()}"
    aside.mkdir()
    write(aside)
    torch.save(state, aside / STATE)
    load_state(aside, device="meta")  # a state that cannot be loaded must fail now, not at the resume
    for path in [*aside.rglob("*"), aside]:
        _fsync(path)
    if final.exists():
        final.rename(folder / f"{final.name}.tmp-old")
    aside.rename(final)
    _fsync(folder)
    if best:  # before `latest`, whose state already counts this step as the best
        replace_text(folder / "best", final.name + "\n")
    replace_text(folder / "latest", final.name + "\n")
    _fsync(folder)
    _delete_old(folder, step, keep)
    return final


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None where none was saved. ValueError when the pointer names no folder."""
    return _follow(Path(folder) / "latest")


def best(folder: Path) -> Path | None:
    """The best checkpoint, or None where none was called best. ValueError when the pointer names no folder."""
    return _follow(Path(folder) / "best")


def resolve(folder: Path, prefer: Literal["latest", "best"] = "latest") -> Path:
    """The latest checkpoint in `folder`, or the best if there is one; any other folder as it is.

    folder: of checkpoints, or of a run, which has them in `checkpoint`. ValueError where there is no folder.
    """
    for place in (Path(folder), Path(folder) / "checkpoint"):
        if found := (best(place) if prefer == "best" else None) or latest(place):
            return found
    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is no folder: need a Hugging Face checkpoint, or the folder of a run such as runs/base, which "
            "`python -m experiments.pretrain` makes"
        )
    return Path(folder)


def load_state(path: Path, device: str = "cpu") -> dict:
    """The `state` of the checkpoint folder `path`, its tensors on `device`.

    Raises ValueError naming the file if it is missing, damaged (every byte is checked), or holds more than tensors and
    plain Python values.
    """
    file = Path(path) / STATE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {path} is no checkpoint to resume from")
    try:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():  # torch.load itself ignores the check sums
                raise zipfile.BadZipFile(f"wrong check sum of {damaged}")
        return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors and plain Python values") from error
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read, it is cut short or damaged: {error}") from error


def _follow(pointer: Path) -> Path | None:
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"step-\d{6,}", name) or not (pointer.parent / name).is_dir():
        raise ValueError(f"{pointer} names {name!r}, which is no checkpoint in {pointer.parent}")
    return pointer.parent / name


def _delete_old(folder: Path, step: int, keep: int) -> None:
    steps = {path: int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit()}
    newest = sorted((path for path in steps if steps[path] <= step), key=steps.get)[-keep:]
    old = steps.keys() - {latest(folder), best(folder), *newest}
    for path in [*old, *folder.glob("step-*.tmp-*")]:
        shutil.rmtree(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
