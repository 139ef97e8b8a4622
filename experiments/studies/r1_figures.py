"""The figure of the R1 pipeline over seeds: accuracy and readability from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

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
        figure.subplots_adjust(left=0.06, right=0.985, top=0.83, bottom=0.1, hspace=0.5, wspace=0.14)
        for panel, (key, title, whole) in zip(panels.flat, PANELS):
            for x, (name, colour) in enumerate(zip(stages, COLOURS)):
                values = [result[f"{name}/{key}"] for result in results]
                panel.bar(x, np.mean(values), color=colour, alpha=0.35, width=0.72)
                spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [0.0]
                panel.plot(x + np.array(spread), values, "o", color=colour, ms=6, mec="white", mew=1)
                panel.annotate(percent(np.mean(values)), (x, max(values)), (0, 5), textcoords="offset points",
                               ha="center", color=colour, weight="bold")  # fmt: skip
            labels = [label.replace(" without ", "\nwithout ") for label in stages.values()]
            panel.set_xticks(range(len(stages)), labels, color=INK, fontsize=9)
            panel.tick_params(axis="x", length=0)
            fig.percent_axis(panel)
            panel.set_ylim(0, 1.12 if whole else None)
            panel.set_title(title, loc="left", pad=12)
        fig.headline(figure, *_finding(results))
        return fig.write(figure, path)


def _finding(results: Sequence[dict[str, float]]) -> tuple[str, str]:
    mean = lambda key: float(np.mean([result[key] for result in results]))
    text = (
        f"R1-Zero is right and mixed ({percent(mean('r1-zero/language_consistency'))} in one language); the pipeline "
    )
    text += f"ends at {percent(mean('rl-2/pass@1'))} right and {percent(mean('rl-2/language_consistency'))}"
    return (
        text,
        f"{len(results)} seeds; a dot is a seed, a bar and its number their mean; problems that no stage has seen",
    )
