"""The figure of load balance: how evenly experts are used, and at what cost in loss."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minir1.figures import BLUE, DPI, GREEN, GREY, ORANGE, STYLE, VIOLET, WIDTH, headline, series, smooth, write


def balance(curves: dict[str, list[list[dict]]], path: Path) -> Figure:
    """Loss and maximal violation over the steps of pre-training, a colour per method; bands span the seeds.

    curves: method -> one metrics.jsonl per seed, with train/loss and train/max_violation at every step.
    """
    colours = dict(zip(curves, (GREY, ORANGE, VIOLET, BLUE, GREEN)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 6), dpi=DPI)
        panels = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.07, right=0.97, top=0.7, bottom=0.1, wspace=0.2)
        for panel, key, title, label in (
            (panels[0], "train/loss", "Loss of the language model", "nats per token"),
            (panels[1], "train/max_violation", "Imbalance of the experts", "MaxVio of a batch, mean of layers"),
        ):
            late = [_band(panel, runs, key, colours[name]) for name, runs in curves.items()]
            panel.set(xlabel="step", ylabel=label, xlim=(0, None), ylim=(0, 1.08 * max(late)))
            panel.set_title(title, loc="left", weight="bold", size=14)
        keys = ("train/max_violation", "train/loss")
        ends = {name: [_end(runs, key) for key in keys] for name, runs in curves.items()}
        for number, (name, (violation, loss)) in enumerate(ends.items()):
            style = {"x": 0.07 + 0.9 * number / len(ends), "color": colours[name], "size": 12, "va": "center"}
            figure.text(y=0.85, s=name, weight="bold", **style)
            figure.text(y=0.81, s=f"MaxVio {violation:.2f} · loss {loss:.3f}", **style)
        headline(figure, *_finding(list(ends.values())))
        return write(figure, path)


def _band(panel: Axes, runs: list[list[dict]], key: str, colour: str) -> float:
    """Draw the mean over seeds of their running means, and their span; returns the largest after a tenth of the run."""
    values = np.stack([smooth(series(run, key)[1], max(1, len(run) // 25)) for run in runs])
    steps = series(runs[0], key)[0]
    panel.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, lw=0, zorder=2)
    panel.plot(steps, values.mean(0), color=colour, lw=2.2, zorder=3)
    return values[:, len(steps) // 10 :].max()


def _end(runs: list[list[dict]], key: str) -> float:
    """The mean over seeds and the last sixth of the steps."""
    return float(np.mean([series(run, key)[1][-max(1, len(run) // 6) :].mean() for run in runs]))


def _finding(ends: list[list[float]]) -> tuple[str, str]:
    note = "means of the last sixth of the steps beside the names; lines are running means, bands go from seed to seed"
    (plain, _), *balanced = ends
    if not balanced:
        return f"MaxVio ends at {plain:.1f}", note
    low, high = (end(violation for violation, _ in balanced) for end in (min, max))
    apart = max(loss for _, loss in ends) - min(loss for _, loss in ends)
    span = f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
    return f"Balancing: MaxVio {plain:.1f} → {span}; losses end within {apart:.3f} nats", note
