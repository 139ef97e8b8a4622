"""Does it help to draw problems less that the base always or never solves?

    python -m experiments.studies.curriculum --checkpoint runs/base/checkpoint --jobs 2

All settings are GRPO with the same steps. With --difficulty-window the share of right answers of every training problem
is measured once before the first step, with as many answers as a group has, and again whenever the problem is drawn;
problems outside the window get a tenth of the weight. The cost of the first measurement is not part of the steps.
"""

from __future__ import annotations

from pathlib import Path

from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import Config, Method
from experiments.studies.comparison_figures import draw_settings
from minir1 import cli

METHODS = {
    "uniform": Method("all alike", "r1_zero"),
    "mixed": Method("mixed (0.1 to 0.9)", "r1_zero", {"difficulty-window": (0.1, 0.9)}),
    "solvable": Method("solvable (0.1 to 1)", "r1_zero", {"difficulty-window": (0.1, 1.0)}),
}
PANELS = {"mixed_groups": ("Groups with signal", "share"), "accuracy": ("Training problems", "share")}
DEFAULT = Config(
    steps=40,
    out=Path("runs/curriculum"),
    results=Path("docs/results/curriculum.json"),
    figure=Path("docs/results/curriculum.png"),
)


def page(results: tables.Results) -> str:
    """The block of docs/algorithms.md."""
    return tables.page(results, METHODS, "uniform", DEFAULT, "studies.curriculum", also="length")


def main(config: Config) -> None:
    """Run what is missing, draw, print. SystemExit if a cell fails."""
    draw = lambda config: draw_settings(config, METHODS, PANELS)
    tables.compare(config, METHODS, "uniform", "problems drawn", draw)


if __name__ == "__main__":
    cli.run(main, Config, default=DEFAULT)
