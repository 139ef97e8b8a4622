"""Weights in the safetensors files of a Hugging Face folder: their headers, and tensors one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minir1.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN = 4  # names of each kind in an error


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it


def files_of(path: Path) -> list[Path]:
    """The files that hold a folder's weights."""
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if not (path / INDEX).exists():
        refuse_gguf(path)
        pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
        if pickles:
            raise ValueError(
                f"{path} holds no {WEIGHTS}, only {pickles[0]}: a pickle may run any code, so none is read; convert "
                "it with safetensors.torch.save_file"
            )
        raise ValueError(f"{path} holds no {WEIGHTS} and no {INDEX}")
    where = read_json(path / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{path / INDEX} has no weight_map")
    names = sorted(set(map(str, where.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path / INDEX} names {name!r}: must be a .safetensors file beside it")
    absent = [name for name in names if not (path / name).exists()]
    if absent:
        raise ValueError(f"{path / INDEX} names shards that are not there: {some(absent)}")
    return [path / name for name in names]


def refuse_gguf(path: Path) -> None:
    """ValueError for a GGUF file, or a folder that has one."""
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if files:
        raise ValueError(f"{files[0]}: GGUF is not supported, only safetensors files with their config.json")


def _open(file: Path):
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def headers(files: list[Path]) -> dict[str, Stored]:
    """The tensors in the files, by name."""
    stored: dict[str, Stored] = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():
                if name.endswith("rotary_emb.inv_freq"):  # of old Llama files: config.json counts, as in transformers
                    continue
                if name in stored:
                    raise ValueError(f"{name} is in two shards, {stored[name].file.name} and {file.name}")
                part = opened.get_slice(name)
                stored[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
    return stored


def tensors_in(stored: dict[str, Stored], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, one file after another."""
    for file in sorted({stored[name].file for name in names}):
        with _open(file) as opened:
            for name in names:
                if stored[name].file == file:
                    yield name, opened.get_tensor(name)


def some(names: list[str], between: str = ", ") -> str:
    """The first SHOWN names, and how many more there are."""
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return between.join(names[:SHOWN] + more)
