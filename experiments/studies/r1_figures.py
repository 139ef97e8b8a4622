"""The figure of the R1 pipeline over seeds: accuracy and readability from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from minir1 import figures as fig
from minir1.figures import BLUE, GREEN, GREY, INK, ORANGE, RED, VIOLET, percent

PANELS = (  # key, title, whether the axis ends at 1
    ("pass@1", "test problems solved", True), ("language_consistency", "thinking in the question's language", True),
    ("repetition", "thinking that repeats", False), ("tidiness", "closes with its answer", True),
)  # fmt: skip
COLOURS = (GREY, BLUE, GREEN, VIOLET, ORANGE, RED, GREY)


def seeds(results: Sequence[dict[str, float]], stages: Mapping[str, str], path: Path) -> Figure:
    """A dot per seed and a bar for their mean, by stage, one panel per quantity. stages: name -> label."""
    with matplotlib.rc_context(fig.STYLE):
        figure = Figure(figsize=(fig.WIDTH, 7.6), dpi=fig.DPI)
        panels = figure.subplots(2, 2)
        figure.subplots_adjust(left=0.06, right=0.985, top=0.83, bottom=0.11, hspace=0.62, wspace=0.14)
        for panel, (key, title, whole) in zip(panels.flat, PANELS):
            for x, (name, colour) in enumerate(zip(stages, COLOURS)):
                values = [result[f"{name}/{key}"] for result in results if f"{name}/{key}" in result]
                if not values:
                    continue
                panel.bar(x, np.mean(values), color=colour, alpha=0.35, width=0.72)
                spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [0.0]
                panel.plot(x + np.array(spread), values, "o", color=colour, ms=6, mec="white", mew=1)
                shown = percent(np.mean(values)) if whole else f"{np.mean(values):.1%}"
                panel.annotate(shown, (x, max(values)), (0, 5), textcoords="offset points", ha="center", color=colour,
                               weight="bold")  # fmt: skip
            labels = [label.replace(" without language reward", ",\nno language\nreward") for label in stages.values()]
            panel.set_xticks(range(len(stages)), labels, color=INK, fontsize=9)
            panel.tick_params(axis="x", length=0)
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            panel.set_ylim(0, 1.12 if whole else 1.2 * max(0.01, panel.dataLim.ymax))
            if whole:
                panel.set_yticks(np.arange(6) / 5)
            panel.set_title(title, loc="left", pad=12)
        fig.headline(figure, *_finding(results))
        return fig.write(figure, path)


def _finding(results: Sequence[dict[str, float]]) -> tuple[str, str]:
    ends = lambda key: " → ".join(
        percent(np.mean([result[f"{name}/{key}"] for result in results])) for name in ("r1-zero", "rl-2")
    )
    text = f"From R1-Zero to R1: right {ends('pass@1')}, in one language {ends('language_consistency')}"
    return (
        text,
        f"{len(results)} seeds; a dot is a seed, a bar and its number their mean; problems that no stage has seen",
    )
