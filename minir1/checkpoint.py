"""Checkpoints that survive a kill: written under a temporary name, fsynced, renamed; `latest` is replaced last.

    checkpoint/
      step-000120/     a Hugging Face folder, and training_state.pt beside it
      latest           one line: step-000120; none before the first
      best             one line: the step that scored best, once one beats what the run started from
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import torch

from minir1 import sharded_state
from minir1.distributed import exchanged, my_share, on_first
from minir1.files import replace_text

STATE, NONE = "training_state.pt", "none"
TENSORS = (".safetensors", ".distcp")  # suffixes of files
INDEX = ".metadata"  # of the .distcp files
NAME = re.compile(r"step-[0-9]{6,}")
READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")  # to open a model


def save(folder: Path, step: int, write: Callable[[Path], None], state: dict, *, best: bool = False) -> Path:
    """Write checkpoint `step` into `folder` and return its path, `folder/step-000120`.

    `write(path)` puts the model and tokenizer into the empty folder `path`; `state` (tensors and plain Python values)
    goes to training_state.pt, with digests of the model's files. Then `latest`, and with `best` also `best`, names the
    new checkpoint; all but these two are deleted. A kill at any moment leaves both valid.

    Of several ranks each calls this: rank 0 writes, and each its parts of the divided tensors of the state
    (minir1/sharded_state.py). The training waits for it: written beside the next steps, a folder would get its name,
    and an error would show, at some later step, and every script would have to wait for the last one before it ends.

    Raises ValueError for a negative step, or a state that `weights_only` would not load.
    """
    if step < 0:
        raise ValueError(f"step is {step}; allowed is step >= 0")
    folder = Path(folder)
    final = folder / f"step-{step:06d}"
    aside = on_first(lambda: _begin(folder, final))
    write(aside)
    rest, shards = sharded_state.apart(state)
    sharded_state.write(aside, shards)
    rest = rest | {"sha256": digests(aside, state=True)}
    on_first(lambda: _end(folder, final, aside, rest, best))
    return final


def _begin(folder: Path, final: Path) -> Path:
    """An empty folder with a temporary name, which becomes `final`."""
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    if not (folder / "latest").exists():  # from now on only damage leaves checkpoints without it
        replace_text(folder / "latest", NONE + "\n")
    aside = folder / f"{final.name}.tmp-{os.getpid()}"
    aside.mkdir()
    return aside


def _end(folder: Path, final: Path, aside: Path, state: dict, best: bool) -> None:
    """Add the state, and give the folder its name."""
    torch.save(state, aside / STATE)
    load_state(aside, device="meta")  # a state that cannot be loaded must fail now, not at the resume
    for path in [*aside.rglob("*"), aside]:
        _fsync(path)
    if final.exists():  # as after a kill between `best` and `latest`
        final.rename(folder / f"{final.name}.tmp-old")
    aside.rename(final)
    _fsync(folder)
    if best:  # before `latest`, whose state already counts this step as the best
        replace_text(folder / "best", final.name + "\n")
    replace_text(folder / "latest", final.name + "\n")
    _fsync(folder)
    _clean(folder)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None where none was saved. ValueError when the pointer is lost, or names no folder."""
    pointer = Path(folder) / "latest"
    if not pointer.exists() and (steps := _steps(folder)):
        raise ValueError(f"{pointer} is missing: write {steps[-1].name} into it to continue from that checkpoint")
    return _follow(pointer)


def best(folder: Path) -> Path | None:
    """The best checkpoint, or None where none was called best. ValueError when the pointer names no folder."""
    return _follow(Path(folder) / "best")


def resolve(folder: Path, prefer: Literal["latest", "best"] = "latest") -> Path:
    """The latest checkpoint in `folder`, or the best if there is one (else it says so); any other folder as it is.

    folder: of checkpoints, or of a run, which has them in `checkpoint`; of the demonstration's runs, base and rl, the
    last is taken. ValueError where there is no folder, for that of other runs, as of a pipeline, and for a run that has
    saved none yet.
    """
    folder = Path(folder)
    places = [folder, folder / "checkpoint"]
    if not any(folder.glob("*.safetensors")):
        places.append(folder / "rl" / "checkpoint")
    for checkpoints in places:
        if prefer == "best" and (path := best(checkpoints)):
            return path
        if path := latest(checkpoints):
            if prefer == "best":
                print(f"{checkpoints} has no best checkpoint: the latest is used, {path.name}")
            return path
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder: need a Hugging Face checkpoint, or the folder of a run such as runs/base, which "
            "`python -m experiments.pretrain` makes"
        )
    _refuse_runs(folder)
    return folder


def _refuse_runs(folder: Path) -> None:
    """ValueError for a folder without weights of its own: of runs, such as the stages of a pipeline, or of a run that
    has saved no checkpoint yet."""
    if any(folder.glob("*.safetensors")):
        return
    if made := sorted(folder.glob("*/checkpoint/latest"), key=lambda path: path.stat().st_mtime):
        names = ", ".join(path.parts[-3] for path in made)
        raise ValueError(
            f"{folder} is the folder of several runs, as of a pipeline: name one of its stages, such as "
            f"{made[-1].parents[1]} (there are {names})"
        )
    if any((folder / name).exists() for name in ("metrics.jsonl", ".lock", "latest")):  # a run's, or its checkpoint/
        raise ValueError(f"{folder}: this run has saved no checkpoint yet")


def resume(folder: Path) -> Path | None:
    """`latest`, to resume from. What a killed `save` left is deleted. ValueError for a step-* that is no checkpoint."""
    return on_first(lambda: _resume(Path(folder)))


def _resume(folder: Path) -> Path | None:
    for path in folder.glob("step-*"):
        if not (path.is_dir() and (NAME.fullmatch(path.name) or ".tmp-" in path.name)):
            raise ValueError(f"{path} is no checkpoint: move it elsewhere")
    _clean(folder)
    return latest(folder)


def load_state(path: Path, device: str = "cpu") -> dict:
    """The `state` of the checkpoint folder `path`, its tensors on `device`; its key sha256 is for `verify`.

    Raises ValueError naming the file if it is missing, damaged (every byte is checked), or holds more than tensors and
    plain Python values. The files of divided tensors are verified before they are read, as one of them is a pickle.
    """
    file = Path(path) / STATE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {path} is no checkpoint to resume from")
    try:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():  # torch.load itself ignores the check sums
                raise zipfile.BadZipFile(f"wrong check sum of {damaged}")
        state = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors and plain Python values") from error
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read, it is cut short or damaged: {error}") from error
    if torch.device(device).type == "meta":
        return state
    if isinstance(state, dict) and (expected := state.get("sha256")):
        shards = {name for name in expected if name.startswith(sharded_state.FOLDER)}
        verify(file.parent, {name: expected[name] for name in shards})
        state["sha256"] = {name: expected[name] for name in expected.keys() - shards}
    return sharded_state.together(file.parent, state, device)


def digests(path: Path, only: Collection[str] | None = None, *, state: bool = False) -> dict[str, str]:
    """Name -> SHA-256 of the files in `path`, and folders below, from which a model is opened.

    only: names of files, to read no others; state: also those of divided tensors of the training state. Of several
    ranks each calls this and reads some of the files, 1.4 GB/s on one core.
    """
    names = on_first(lambda: sorted(str(file.relative_to(path)) for file in path.rglob("*") if _is_read(file)))
    names = [name for name in names if state or not name.startswith(sharded_state.FOLDER)]
    result = {}
    for name in my_share([name for name in names if only is None or name in only]):
        digest = hashlib.sha256()
        with open(path / name, "rb") as opened:
            while chunk := opened.read(2**20):
                digest.update(chunk)
        result[name] = digest.hexdigest()
    return dict(sorted((name, digest) for part in exchanged(result) for name, digest in part.items()))


def _is_read(file: Path) -> bool:
    return file.suffix in TENSORS or file.name in (*READ, INDEX)


def verify(path: Path, expected: dict[str, str]) -> None:
    """ValueError naming the first file that is not as it was when `digests` returned `expected`."""
    present = digests(path, expected, state=True) if expected else {}
    for name in sorted(expected):
        if present.get(name) != expected[name]:
            raise ValueError(f"{path / name} has changed since the run saved its digest: put the old file back")


def _follow(pointer: Path) -> Path | None:
    if not pointer.exists():
        return None
    if not pointer.is_file():
        raise ValueError(f"{pointer} is a folder: it must be a file that names a checkpoint")
    if (name := pointer.read_text(encoding="utf-8", errors="replace").strip()) == NONE:
        return None
    for path in (pointer.parent / name, pointer.parent / f"{name}.tmp-old"):  # the latter while its step is saved again
        if NAME.fullmatch(name) and path.is_dir():
            return path
    raise ValueError(f"{pointer} names {name!r}, which is no checkpoint in {pointer.parent}")


def _steps(folder: Path) -> list[Path]:
    steps = (path for path in Path(folder).glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())
    return sorted(steps, key=lambda path: int(path.name[5:]))


def _clean(folder: Path) -> None:
    """Delete all that the pointers do not name; under another name first, since a kill may leave half of it."""
    needed = {latest(folder), best(folder)}
    for path in {*_steps(folder)} - needed:
        path.rename(path.with_name(f"{path.name}.tmp-deleted"))
    for path in {*folder.glob("step-*.tmp-*")} - needed:
        shutil.rmtree(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
