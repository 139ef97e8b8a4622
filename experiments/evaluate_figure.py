"""Accuracy by difficulty and subject with intervals, as one figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from minir1.figures import BLUE, DPI, GRID, INK, STYLE, WIDTH, percent, tall_headline, write


def draw_groups(values: Mapping[str, float], counts: Mapping[str, int], title: str, note: str, path: Path) -> Figure:
    """A row for all problems and one per group of problems: pass@1 and its 95 % interval.

    values: as `evaluate.figures` returns them; counts: group -> number of problems. Writes a PNG, returns the figure.
    """
    groups = [""] + [f"_{name}" for name in counts if f"pass@1_{name}" in values]
    labels = ["all problems"] + [f"{group[1:]} ({counts[group[1:]]})" for group in groups[1:]]
    height = 2.0 + 0.42 * len(groups)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        panel = figure.add_axes((0.27, 0.75 / height, 0.68, 1 - 1.85 / height))
        for row, group in enumerate(groups):
            low, mean, high = (values[f"pass@1{end}{group}"] for end in ("_low", "", "_high"))
            panel.plot([low, high], [row, row], color=BLUE, lw=3, alpha=0.4)
            panel.plot(mean, row, "o", color=BLUE, ms=9)
        panel.axhline(0.5, color=GRID, lw=1.2)
        panel.set_ylim(len(groups) - 0.5, -0.5)
        panel.set_yticks(range(len(groups)), labels, color=INK)
        panel.set_xlim(0, 1)
        panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.set_xlabel("pass@1 and its 95 % interval over problems")
        heading = f"{title}: pass@1 {percent(values['pass@1'])}"
        tall_headline(figure, heading, note)
        return write(figure, path)
