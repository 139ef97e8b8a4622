"""With a given number of answers per step, is it better to ask many problems a few times or a few problems many times?

    python -m experiments.studies.group_size --checkpoint runs/base/checkpoint --jobs 2

All settings are GRPO with the same P·G = --prompts · --num-generations. A large group gives a better baseline, and more
often has both right and wrong answers; with many problems the gradient averages over more of them.
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
    """A method per group size. ValueError if a size does not divide the answers of a step, or leaves one problem."""
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


def main(config: Config) -> None:
    """Run what is missing, draw, print. SystemExit if a cell fails."""
    draw = lambda config: draw_settings(config, methods(config), PANELS)
    tables.compare(config, methods(config), "G8", "problems × answers", draw)


if __name__ == "__main__":
    cli.run(main, Config, default=DEFAULT)
