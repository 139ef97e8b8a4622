"""With a given number of answers a step, is it better to ask many problems a few times or a few problems many times?

    python -m experiments.studies.group_size --checkpoint runs/base/checkpoint --jobs 2

P·G stays what --prompts times --answers say. A large group gives a better baseline, and more groups hold both right and
wrong answers; many problems give a gradient that speaks for more of them. GRPO, everything else alike.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from experiments.studies import algorithms_figures as figures_algorithms
from experiments.studies import comparison_tables as tables
from experiments.studies.comparison import START, Config, Method, cells_of, complete, end, load

GROUPS = (4, 8, 16, 32)
PANELS = {"mixed_groups": ("Groups with signal", "share"), "accuracy": ("Training problems", "share")}
DEFAULT = Config(
    out=Path("runs/group_size"),
    results=Path("docs/results/group_size.json"),
    figure=Path("docs/results/group_size.png"),
)


def methods(config: Config) -> dict[str, Method]:
    """A method a group size. ValueError if one of them does not divide the answers of a step, or leaves one problem."""
    samples = config.prompts * config.answers
    for G in GROUPS:
        if samples % (2 * G):
            raise ValueError(f"prompts times answers = {samples}: must be a multiple of {2 * G}, for groups of {G}")
    split = {G: {"prompts": samples // G, "answers": G} for G in GROUPS}
    return {f"G{G}": Method(f"{shape['prompts']} × {G}", "r1_zero", shape) for G, shape in split.items()}


def page(found: tables.Found) -> str:
    """What docs/algorithms.md says of it."""
    return tables.page(found, methods(DEFAULT), "G8", DEFAULT, "studies.group_size", also="length")


def draw(config: Config) -> None:
    """The figure of what is done so far."""
    found = load(config.results)
    drawn = tables.parts(found, methods(config))
    if drawn["ends"] and START in found:
        figures_algorithms.settings(tables.start(found), **drawn, path=config.figure, panels=PANELS)


def main(config: Config) -> None:
    """Run what is missing, draw, print. SystemExit if a cell fails."""
    failed = []
    for cell, failure in complete(cells_of(methods(config), config), config):
        failed += [cell.name] if failure else []
        draw(config)
    tables.show(f"problems × answers, {config.steps} steps, test split", load(config.results), methods(config), "G8")
    end(failed, config)


if __name__ == "__main__":
    main(tyro.cli(Config, default=DEFAULT))
