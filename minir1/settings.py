"""Checks of the values in a script's Config. Each raises ValueError with field, value and what is allowed.

Of tuples every entry is checked, and there must be one; None passes. NaN, infinity and integers beyond 64 bits do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable


def at_least(config, least: float, *names: str) -> None:
    """Each of these fields is at least `least`."""
    _check(config, names, f"at least {least:g}", lambda entry: entry >= least)


def above(config, bound: float, *names: str) -> None:
    """Each of these fields is above `bound`."""
    _check(config, names, f"above {bound}", lambda entry: entry > bound)


def fraction(config, *names: str) -> None:
    """Each of these fields is in 0 … 1."""
    _check(config, names, "0 to 1", lambda entry: 0 <= entry <= 1)


def zero_or_at_least(config, least: float, *names: str) -> None:
    """Each of these fields is 0 or at least `least`: as a temperature, by which logits are divided unless it is 0."""
    _check(config, names, f"0, or at least {least:g}", lambda entry: entry == 0 or entry >= least)


def below_folders(config, *names: str) -> None:
    """Each of these paths is there or can be made: its nearest parent that exists is a folder to write to."""
    for name in names:
        path = getattr(config, name)
        if path is not None and not path.is_file():
            at = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
            if not at.is_dir() or not os.access(at, os.W_OK):
                raise ValueError(f"{name} = {path}: {at} is no folder that can be written to")


def new_file(config, *names: str) -> None:
    """A file can be written at each of these paths: a script must not find out when its work is done."""
    for name in names:
        path = getattr(config, name)
        if path is not None:
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
                raise ValueError(f"{name} = {path}: name a file, in a folder that can be written to")


def new_folder(config, *names: str) -> None:
    """None of these paths is a file: a script makes a folder there when its work is done."""
    for name in names:
        path = getattr(config, name)
        if path is not None and path.exists() and not path.is_dir():
            raise ValueError(f"{name} = {path} is a file: choose a folder")


def no_training(config, *names: str) -> None:
    """None of these folders holds a training: the script would overwrite its result.json."""
    for name in names:
        path = getattr(config, name)
        if path is not None and (path / "config.json").exists():
            raise ValueError(f"{name} = {path} holds a training, whose result.json would be lost: choose another")


def same_steps(steps: int, began_with: int, why: str = "the learning rate follows it") -> None:
    """A resumed run has as many steps as it began with. why: what depends on their number."""
    if steps != began_with:
        raise ValueError(f"steps = {steps}: {why}, so this run resumes with {began_with} only")


def _check(config, names: tuple[str, ...], allowed: str, ok: Callable[[float], bool]) -> None:
    for name in names:
        value = getattr(config, name)
        entries = _entries(value)
        if value == () or not all(map(ok, entries)):
            raise ValueError(f"{name} = {value}: {allowed}")
        if max(entries, default=0) >= 2**63:
            raise ValueError(f"{name} = {value}: too large, below 2^63")


def _entries(value) -> list[float]:
    if isinstance(value, tuple):
        return [entry for part in value for entry in _entries(part)]
    return [] if value is None else [value]
