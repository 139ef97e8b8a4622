"""The figure of the demonstration over seeds: before and after, with the controls."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minir1 import figures as fig
from minir1.figures import BLUE, GREEN, GREY, HALO, INK, ORANGE, VIOLET, percent


def seeds(results: list[dict], path: Path) -> Figure:
    """Held-out pass@1 of every seed before and after RL, its 95% interval, and the controls that were run.

    results: one result.json per seed, with before/, after/, forced/, nothink/ and search/pass@1, each with _low and
    _high if measured. A column that no seed has is left out.
    """
    results = [fig.measured(result) for result in results]
    columns = [
        ("before", "before RL", GREY),
        ("after", "after RL", BLUE),
        ("forced", "after RL, forced\nto answer at once", ORANGE),
        ("nothink", "RL without\nthinking", VIOLET),
        ("search", "random search", GREEN),
    ]
    columns = [column for column in columns if any(f"{column[0]}/pass@1" in result for result in results)]
    with matplotlib.rc_context(fig.STYLE):
        figure = Figure(figsize=(fig.WIDTH, 6.4), dpi=fig.DPI)
        panel = figure.subplots()
        figure.subplots_adjust(left=0.075, right=0.97, top=0.83, bottom=0.14)
        spread = np.linspace(-0.16, 0.16, len(results)) if len(results) > 1 else np.zeros(len(results))
        for result, shift in zip(results, spread):
            if "before/pass@1" in result and "after/pass@1" in result:  # these two are the first columns
                ends = [result["before/pass@1"], result["after/pass@1"]]
                panel.plot([shift, 1 + shift], ends, color=BLUE, lw=1.4, alpha=0.35, zorder=2)
            for x, (name, _, colour) in enumerate(columns):
                _dot(panel, x + shift, result, f"{name}/pass@1", colour)
        for x, (name, _, colour) in enumerate(columns):
            mean = np.mean([result[f"{name}/pass@1"] for result in results if f"{name}/pass@1" in result])
            style = {"color": colour, "va": "center", "weight": "bold", "size": 16, "path_effects": HALO}
            panel.text(x + spread.max(initial=0) + 0.1, mean, percent(mean), **style)
        panel.set_xticks(range(len(columns)), [text for _, text, _ in columns], color=INK)
        panel.set_xlim(-0.45, max(1, len(columns)) - 0.4)
        panel.set_ylabel("held-out problems solved (pass@1)")
        fig.percent_axis(panel)
        panel.tick_params(axis="x", length=0, pad=8)
        fig.headline(figure, *_seeds_finding(results))
        return fig.write(figure, path)


def _dot(panel: Axes, x: float, result: dict, key: str, colour: str) -> None:
    if key not in result:
        return
    if f"{key}_low" in result and f"{key}_high" in result:
        panel.plot([x, x], [result[f"{key}_low"], result[f"{key}_high"]], color=colour, lw=3.5, alpha=0.45, zorder=3)
    panel.plot(x, result[key], "o", color=colour, ms=7.5, mec="white", mew=1, zorder=4)


def _seeds_finding(results: list[dict]) -> tuple[str, str]:
    gains = [r["after/pass@1"] - r["before/pass@1"] for r in results if "after/pass@1" in r and "before/pass@1" in r]
    count = f"{len(results)} seed{'s' if len(results) != 1 else ''}"
    note = f"{count}; a dot is a seed, its bar the 95% interval over problems, a number the mean of the seeds"
    if not gains:
        return "Held-out pass@1 by seed", note
    low, high = 100 * min(gains), 100 * max(gains)
    span = f"{low:+.0f}" if round(low) == round(high) else f"{low:+.0f} to {high:+.0f}"
    return f"Held-out pass@1: {span} points by RL with rule rewards alone", note
