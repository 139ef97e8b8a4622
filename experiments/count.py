"""Print how large a model is, and what a token costs.

    python -m experiments.count deepseek-v3
    python -m experiments.count path/to/config.json --length 32768
    python -m experiments.count all --json docs/results/count.json --figure docs/results/count.png

The model is a preset (minir1/model/presets.py), a config.json, or a folder with one; minir1/model/count.py counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from experiments.count_figure import sizes
from minir1 import cli
from minir1.files import read_json, write_json
from minir1.log import table
from minir1.model.config import ModelConfig
from minir1.model.count import PARTS, count
from minir1.model.hf_config import from_hf_config
from minir1.model.presets import PRESETS
from minir1.settings import above, at_least, new_file


@dataclass(frozen=True)
class Config:
    """Count one model, or all presets."""

    model: Annotated[str, tyro.conf.Positional]  # name of a preset, config.json, folder with one, or all
    length: int = 4096  # T, tokens of a row, for the FLOPs
    cache_bytes: float = 2  # bytes per number in the cache
    json: Path | None = None  # a file for the counts
    figure: Path | None = None  # a PNG: total against active parameters

    def __post_init__(self):
        at_least(self, 1, "length")
        above(self, 0, "cache_bytes")
        new_file(self, "json", "figure")


def find(name: str) -> ModelConfig:
    """The configuration of this name, file or folder; ValueError lists the names, or says what is wrong with a file."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(f"{name!r} is neither a preset nor a config.json; presets are {', '.join(PRESETS)}, all")
    return from_hf_config(read_json(path))


def human(number: float, unit: str = "") -> str:
    """Four digits and a prefix: 671.0B, 1.777B, 320.0"""
    for size, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = 3 if number < 10 * size else 2 if number < 100 * size else 1
            return f"{number / size:.{digits}f}{' ' if unit else ''}{prefix}{unit}"
    return f"{number:.0f}{' ' if unit else ''}{unit}"


def show_one(name: str, counts: dict, cache_bytes: float) -> None:
    """Two tables: the parts, and what a token costs."""
    rows = [
        [label, f"{counts[f'total/{part}']:,}", f"{counts[f'active/{part}']:,}"]
        for part, (label, _) in PARTS.items()
        if part != "mtp" and (counts[f"total/{part}"] or counts[f"active/{part}"])
    ]
    rows.append(["sum", f"{counts['total']:,}", f"{counts['active']:,}"])
    rows.append(["sum, input embedding active", "", f"{counts['active_with_embedding']:,}"])
    if counts["total/mtp"]:
        rows.append([f"{PARTS['mtp'][0]}, on top", f"{counts['total/mtp']:,}", f"{counts['active/mtp']:,}"])
    table(f"{name}: {human(counts['total'])} parameters", ["", "total", "active per token"], rows)
    cache = counts["cache/token"]
    costs = [
        ["cache, numbers per token and layer", f"{counts['cache/token_layer']:,}"],
        [f"cache, bytes per token ({cache_bytes:g} per number)", f"{cache:,.0f}"],
        [f"cache of {counts['length']:,} tokens", human(cache * counts["length"], "B")],
        [f"training, a token in rows of {counts['length']:,}", human(counts["flops/train"], "FLOP")],
        ["multi-token prediction, on top", human(counts["flops/train_mtp"], "FLOP")],
        [f"decoding, a token at position {counts['length']:,}", human(counts["flops/decode"], "FLOP")],
    ]
    if not counts["total/mtp"]:
        del costs[4]
    table("a token costs", ["", ""], costs)


def show_all(counts: dict[str, dict]) -> None:
    """One row per model."""
    rows = []
    for name, one in counts.items():
        numbers = [human(one[key]) for key in ("total", "active", "active_with_embedding")]
        costs = [human(one[f"flops/{key}"], "FLOP") for key in ("train", "decode")]
        rows.append([name, *numbers, f"{one['cache/token_layer']:,}", f"{one['cache/token']:,.0f}", *costs])
    length = f"{next(iter(counts.values()))['length']:,}"
    columns = ["", "total", "active", "with embedding", "cache/layer", "cache bytes", "training", "decoding"]
    table(f"parameters, and what a token costs at a length of {length}", columns, rows)


def main(config: Config) -> dict[str, dict]:
    """Count, print and write; returns the counts of each model by name."""
    names = list(PRESETS) if config.model == "all" else [config.model]
    counts = {name: count(find(name), config.length, config.cache_bytes) for name in names}
    if config.model == "all":
        show_all(counts)
    else:
        show_one(config.model, counts[config.model], config.cache_bytes)
    if config.json:
        write_json(config.json, counts)
    if config.figure:
        sizes(counts, config.figure)
    return counts


if __name__ == "__main__":
    cli.run(main, Config)
