"""The figure of `experiments.studies.long_tail`: lengths, and the GPU time lost by rows and by number of GPUs."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from minir1.figures import BLUE, GREY, ORANGE, STYLE, caption, headline, percent, percent_axis, wide_figure, write


def points(results: dict, start: str, end: str) -> tuple[list[int], list[float]]:
    """Numbers and shares of the keys start/NUMBER/end."""
    found = {int(key.split("/")[2]): v for key, v in results.items() if key.startswith(start) and key.endswith(end)}
    return list(found), list(found.values())


def draw(results: dict, path: Path) -> Figure:
    """Three panels: lengths before and after RL; lost share by rows at once; lost share by number of GPUs."""
    with matplotlib.rc_context(STYLE):
        figure, (lengths, rows, gpus) = wide_figure(height=5, columns=3, top=0.7)
        for when, colour in (("before", GREY), ("after", BLUE)):
            numbers = np.array([int(n) for line in results[f"{when}/lengths"] for n in line.split()])
            lengths.plot(np.sort(numbers), 1 - np.arange(len(numbers)) / len(numbers), color=colour, lw=2.4)
        caption(lengths, "Answers longer than …", [("before RL", GREY), ("after RL", BLUE)])
        lengths.set_xlabel("tokens")
        for way, colour in (("wait", ORANGE), ("refill", BLUE)):
            rows.plot(*points(results, "after/rows/", f"/{way}"), "o-", color=colour, lw=2.4)
            for name, style in (("dealt", "o-"), ("balanced", "s:")):
                gpus.plot(*points(results, "after/gpus/", f"/{way}/{name}"), style, color=colour, lw=2.0, mfc="white")
        caption(rows, "GPU time lost, one GPU", [("wait", ORANGE), ("refill", BLUE)])
        caption(gpus, "GPU time lost, many GPUs", [("wait", ORANGE), ("refill", BLUE)])
        gpus.text(0.03, 0.95, "solid: dealt in turn\ndotted: balanced", transform=gpus.transAxes, va="top", size=10)
        for panel, name in ((rows, "rows at once"), (gpus, "GPUs, 64 rows each")):
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_locator(FixedLocator(panel.lines[0].get_xdata()))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
            panel.set_xlabel(name)
        for panel in (lengths, rows, gpus):
            percent_axis(panel)
        waiting, refilling = (percent(results[f"after/rows/64/{way}"]) for way in ("wait", "refill"))
        title = f"Waiting for the longest answer loses {waiting} of the time, refilling {refilling}"
        headline(figure, title, "lengths measured before and after RL; 64 rows at once of a 7B model, simulated")
        return write(figure, path)
