"""Does the way a loss is averaged over tokens change how long answers become, and how many are right?

    python -m experiments.studies.reduction --checkpoint runs/base/checkpoint --jobs 2

GRPO divides the sum of an answer's token losses by its own length, so that a token of a long wrong answer is punished
less than a token of a short one (Dr. GRPO, arXiv:2503.20783, section 3.1). DAPO takes the mean over all tokens of
the batch (arXiv:2503.14476, section 3.3), Dr. GRPO a fixed length. Only the reduction differs here: advantages, clip
and KL are GRPO's. With a fixed length the whole gradient is smaller, which AdamW's step does not depend on.
"""

from __future__ import annotations

from pathlib import Path

from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import Config, Method
from experiments.studies.comparison_figures import draw_settings
from minir1 import cli

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


def page(results: tables.Results) -> str:
    """The block of docs/algorithms.md."""
    return tables.page(results, METHODS, "per_answer", DEFAULT, "studies.reduction", also="length")


def main(config: Config) -> None:
    """Run what is missing, draw, print. SystemExit if a cell fails."""
    draw = lambda config: draw_settings(config, METHODS, PANELS)
    tables.compare(config, METHODS, "per_answer", "reduction", draw)


if __name__ == "__main__":
    cli.run(main, Config, default=DEFAULT)
