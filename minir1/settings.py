"""Checks of the numbers in a script's Config. Each raises ValueError with field, value and what is allowed."""

from __future__ import annotations


def at_least(config, least: float, *names: str) -> None:
    """Each of these fields is at least `least`."""
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name} = {getattr(config, name)}: at least {least}")


def above(config, bound: float, *names: str) -> None:
    """Each of these fields is above `bound`."""
    for name in names:
        if not getattr(config, name) > bound:
            raise ValueError(f"{name} = {getattr(config, name)}: above {bound}")


def fraction(config, *names: str) -> None:
    """Each of these fields is in 0 … 1."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} = {getattr(config, name)}: 0 to 1")


def same_steps(steps: int, began_with: int) -> None:
    """A resumed run has as many steps as it began with: for runs whose learning rate follows the number of steps."""
    if steps != began_with:
        raise ValueError(f"steps = {steps}: the learning rate follows it, so this run resumes with {began_with} only")
