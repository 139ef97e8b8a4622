"""Types of the values in a configuration, which a file or a command line may get wrong."""

from __future__ import annotations

import math
from dataclasses import fields
from reprlib import repr as shown  # short, however long or deep the value is


def is_a(value, annotation: str) -> bool:
    """Whether the value has the annotated type, such as `int | None`; an int is also a float, a bool is neither, and a
    number that no tensor takes (NaN, infinity, an integer of more than 64 bits) has no type."""
    kind, allowed = "None" if value is None else type(value).__name__, annotation.split(" | ")
    if kind in ("int", "float") and not (abs(value) < 2**63 if kind == "int" else math.isfinite(value)):
        return False
    return kind in allowed or (kind == "int" and "float" in allowed)


def check_types(config) -> None:
    """ValueError names the first field of a dataclass whose value does not have the annotated type."""
    for f in fields(config):
        value = getattr(config, f.name)
        if not is_a(value, f.type):
            raise ValueError(f"{type(config).__name__}.{f.name} = {shown(value)}: must be {f.type}, and finite")
