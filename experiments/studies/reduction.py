"""Does the way a loss is averaged over tokens change how long answers become, and how many are right?

    python -m experiments.studies.reduction --checkpoint runs/base/checkpoint --jobs 2

GRPO divides the sum of an answer's token losses by its own length, so that a token of a long wrong answer is punished
less than one of a short wrong answer (Dr. GRPO, arXiv:2503.20783, section 3.1). DAPO takes the mean over all tokens of
the batch (arXiv:2503.14476, section 3.3), Dr. GRPO a fixed length. Only the reduction differs here: advantages, clip
and KL are GRPO's. With a fixed length the whole gradient is smaller, which AdamW takes out again.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from experiments.studies import algorithms_figures as figures_algorithms
from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import START, Config, Method, cells_of, complete, end, load

METHODS = {
    "per_answer": Method("per answer", "r1_zero", {"reduction": "per_answer"}),
    "token": Method("token mean", "r1_zero", {"reduction": "token"}),
    "fixed": Method("fixed length", "r1_zero", {"reduction": "fixed"}),
}
PANELS = {"length": ("Length of an answer", "tokens"), "accuracy": ("Training problems", "share")}
DEFAULT = Config(
    out=Path("runs/reduction"),
    results=Path("docs/results/reduction.json"),
    figure=Path("docs/results/reduction.png"),
)


def page(found: tables.Found) -> str:
    """What docs/algorithms.md says of it."""
    return tables.page(found, METHODS, "per_answer", DEFAULT, "studies.reduction", also="length")


def draw(config: Config) -> None:
    """The figure of what is done so far."""
    found = load(config.results)
    drawn = tables.parts(found, METHODS)
    if drawn["ends"] and START in found:
        figures_algorithms.settings(tables.start(found), **drawn, path=config.figure, panels=PANELS)


def main(config: Config) -> None:
    """Run what is missing, draw, print. SystemExit if a cell fails."""
    failed = []
    for cell, failure in complete(cells_of(METHODS, config), config):
        failed += [cell.name] if failure else []
        draw(config)
    tables.show(f"reduction, {config.steps} steps, test split", load(config.results), METHODS, "per_answer")
    end(failed, config)


if __name__ == "__main__":
    main(tyro.cli(Config, default=DEFAULT))
