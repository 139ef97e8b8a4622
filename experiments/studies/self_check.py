"""Does it help RL, or harm it, to predict along the way whether the answer will be right?

    python -m experiments.studies.self_check --checkpoint runs/base/checkpoint --jobs 2

variants/self_check.py with three weights of the squared error of that prediction. Weight 0 is GRPO alone.
"""

from __future__ import annotations

from pathlib import Path

from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import Config, Method
from experiments.studies.comparison_figures import draw_settings
from minir1 import cli

METHODS = {
    f"{weight:g}": Method(f"w = {weight:g}", "variants.self_check", {"check-weight": weight})
    for weight in (0.0, 0.5, 2.0)
}
PANELS = {"accuracy": ("Training problems", "share"), "check_error": ("Error of the check", "squared")}
DEFAULT = Config(
    out=Path("runs/self-check-study"),
    results=Path("docs/results/self_check.json"),
    figure=Path("docs/results/self_check.png"),
)


def page(results: tables.Results) -> str:
    """The block of docs/distillation.md."""
    return tables.page(results, METHODS, "0", DEFAULT, "studies.self_check")


def main(config: Config) -> None:
    """Run what is missing, draw, print. SystemExit if a cell fails."""
    draw = lambda config: draw_settings(config, METHODS, PANELS)
    tables.compare(config, METHODS, "0", "self-check", draw)


if __name__ == "__main__":
    cli.run(main, Config, default=DEFAULT)
