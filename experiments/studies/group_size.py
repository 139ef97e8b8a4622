"""With a given number of answers a step, is it better to ask many problems a few times or a few problems many times?

    python -m experiments.studies.group_size --checkpoint runs/base/checkpoint --jobs 2

P·G is the same everywhere: --prompts times --num-generations. A large group gives a better baseline, and more groups
hold both right and wrong answers; many problems give a gradient that averages over more of them. All settings are GRPO.
"""

from __future__ import annotations

from pathlib import Path

from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import Config, Method
from experiments.studies.comparison_figures import draw_settings
from minir1 import cli

GROUPS = (4, 8, 16, 32)
PANELS = {"mixed_groups": ("Groups with signal", "share"), "accuracy": ("Training problems", "share")}
DEFAULT = Config(
    out=Path("runs/group_size"),
    results=Path("docs/results/group_size.json"),
    figure=Path("docs/results/group_size.png"),
)


def methods(config: Config) -> dict[str, Method]:
    """A method a group size. ValueError if one of them does not divide the answers of a step, or leaves one problem."""
    samples = config.prompts * config.num_generations
    for G in GROUPS:
        if samples % (2 * G):
            raise ValueError(f"prompts · num_generations = {samples}: must be a multiple of {2 * G}, for groups of {G}")
    return {
        f"G{G}": Method(f"{samples // G} × {G}", "r1_zero", {"prompts": samples // G, "num-generations": G})
        for G in GROUPS
    }


def page(results: tables.Results) -> str:
    """The block of docs/algorithms.md."""
    return tables.page(results, methods(DEFAULT), "G8", DEFAULT, "studies.group_size", also="length")


def draw(config: Config) -> None:
    """The figure of the results so far."""
    draw_settings(config, methods(config), PANELS)


def main(config: Config) -> None:
    """Run what is missing, draw, print. SystemExit if a cell fails."""
    tables.compare(config, methods(config), "G8", "problems × answers", draw)


if __name__ == "__main__":
    cli.run(main, Config, default=DEFAULT)
