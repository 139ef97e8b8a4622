"""One run of reinforcement learning in four panels: accuracy, length, checking and entropy."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minir1.figures import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    HALO,
    MUTED,
    ORANGE,
    RED,
    STYLE,
    VIOLET,
    WIDTH,
    caption,
    from_zero,
    headline,
    line,
    measured,
    percent,
    percent_axis,
    right_axis,
    series,
    write,
)


def r1_zero(metrics: list[dict], path: Path, *, result: dict | None = None) -> Figure:
    """What RL did to one run, in four panels over its steps: accuracy, length, checking, entropy.

    Reads from `metrics` (the rows of metrics.jsonl): train/accuracy, eval/pass@1, train/length,
    train/tries, train/said_yes, train/false_yes, train/entropy, train/kl; from `result`:
    before/pass@1, after/pass@1 with _low and _high, forced/pass@1, search/pass@1.
    """
    result = measured(result or {})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 8.2), dpi=DPI)
        grid = figure.subplots(2, 2)
        figure.subplots_adjust(left=0.075, right=0.925, top=0.81, bottom=0.075, wspace=0.33, hspace=0.5)
        _accuracy(grid[0, 0], metrics, result)
        _length(grid[0, 1], metrics)
        _checking(grid[1, 0], metrics)
        _entropy(grid[1, 1], metrics)
        for panel in grid.flat:
            panel.set_xlabel("RL step")
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            panel.set_xlim(0, max([row["step"] for row in metrics], default=1) or 1)
        headline(figure, *_finding(result))
        return write(figure, path)


def _accuracy(panel: Axes, metrics: list[dict], result: dict) -> None:
    words = []
    steps, values = series(metrics, "train/accuracy")
    if len(steps):
        line(panel, steps, values, BLUE)
        words.append(("training problems", BLUE))
    steps, values = series(metrics, "eval/pass@1")
    if len(steps):
        panel.plot(steps, values, "o-", color=ORANGE, lw=1.2, ms=7, mec="white", mew=1.2, zorder=4, clip_on=False)
        words.append(("validation problems", ORANGE))
    lines = [("search/pass@1", "random search"), ("forced/pass@1", "forced to answer at once")]
    heights = sorted((result[key], text) for key, text in lines if key in result)
    for number, (height, text) in enumerate(heights):
        panel.axhline(height, color=GREY, lw=1.3, ls=(0, (4, 3)), zorder=1)
        below = number == 0 and len(heights) > 1 and heights[1][0] - height < 0.09
        offset, side = ((-4, "top"), (4, "bottom"))[not below]
        place = {"xycoords": ("axes fraction", "data"), "xytext": (-2, offset), "textcoords": "offset points"}
        style = {"ha": "right", "va": side, "color": MUTED, "size": 10.5, "zorder": 5, "path_effects": HALO}
        panel.annotate(text, (1, height), **place, **style)
    panel.set_ylabel("right answers")
    percent_axis(panel)
    caption(panel, "Accuracy", words)


def _length(panel: Axes, metrics: list[dict]) -> None:
    steps, values = series(metrics, "train/length")
    words = []
    if len(steps):
        line(panel, steps, values, BLUE)
        words.append(("tokens, thinking included", BLUE))
    panel.set_ylabel("tokens")
    from_zero(panel, values)
    caption(panel, "Length of an answer", words)


def _checking(panel: Axes, metrics: list[dict]) -> None:
    words = []
    steps, values = series(metrics, "train/tries")
    if len(steps):
        line(panel, steps, values, BLUE)
        words.append(("tries per answer", BLUE))
    panel.set_ylabel("tries per answer", color=BLUE)
    from_zero(panel, values)
    shares = [("train/said_yes", "ends in “yes”", GREEN), ("train/false_yes", "“yes” wrongly", RED)]
    shares = [(*series(metrics, key), text, colour) for key, text, colour in shares]
    shares = [share for share in shares if len(share[0])]
    if shares:
        right = right_axis(panel, "share of answers", MUTED)
        percent_axis(right)
    for steps, values, text, colour in shares:
        line(right, steps, values, colour)
        words.append((text, colour))
    caption(panel, "Checking its own tries", words)


def _entropy(panel: Axes, metrics: list[dict]) -> None:
    words = []
    steps, values = series(metrics, "train/entropy")
    if len(steps):
        line(panel, steps, values, VIOLET)
        words.append(("entropy per token", VIOLET))
    panel.set_ylabel("entropy, nats", color=VIOLET)
    from_zero(panel, values)
    steps, values = series(metrics, "train/kl")
    if len(steps):
        right = right_axis(panel, "KL, nats", ORANGE)
        from_zero(right, values)
        line(right, steps, values, ORANGE)
        words.append(("KL to the reference", ORANGE))
    caption(panel, "Entropy and drift" if len(steps) else "Entropy", words)


def _finding(result: dict) -> tuple[str, str]:
    """The headline, and the line below it, that `result` supports."""
    before, after = result.get("before/pass@1"), result.get("after/pass@1")
    if before is None or after is None:
        return "R1-Zero: reinforcement learning with rule rewards alone", ""
    title = f"RL with rule rewards alone: {percent(before)} → {percent(after)} of held-out problems solved"
    notes = []
    if "after/pass@1_low" in result and "after/pass@1_high" in result:
        low, high = (100 * result[f"after/pass@1_{end}"] for end in ("low", "high"))
        notes.append(f"95% interval {low:.0f} to {high:.0f}%")
    if "forced/pass@1" in result:
        notes.append(f"forced to answer at once, the same weights solve {percent(result['forced/pass@1'])}")
    if "search/pass@1" in result:
        notes.append(f"random search {percent(result['search/pass@1'])}")
    return title, "  ·  ".join(notes)
