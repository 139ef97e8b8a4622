"""One run of reinforcement learning in panels: accuracy, length, entropy, and what the task counts in the thinking."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
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
    """What RL did to one run, over its steps: accuracy, length, behaviour (for a task that has it), entropy.

    Reads from `metrics` (the rows of metrics.jsonl): train/accuracy, eval/pass@1, train/length, behaviour/NAME,
    train/entropy, train/kl; from `result`: before/pass@1, after/pass@1 with _low and _high, forced/pass@1, and
    NAME/pass@1 for each baseline, known by its after/over_NAME.
    """
    result = measured(result or {})
    names = list(dict.fromkeys(key for row in metrics for key in row if key.startswith("behaviour/")))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 8.2 if names else 5.2), dpi=DPI)
        panels = list(figure.subplots(2, 2).flat) if names else list(figure.subplots(1, 3))
        top, bottom, wspace = (0.81, 0.075, 0.43) if names else (0.68, 0.12, 0.33)  # two axes between the columns
        figure.subplots_adjust(left=0.075, right=0.925, top=top, bottom=bottom, wspace=wspace, hspace=0.5)
        _accuracy(panels[0], metrics, result)
        _length(panels[1], metrics)
        if names:
            _behaviour(panels[2], metrics, names)
        _entropy(panels[-1], metrics)
        for panel in panels:
            panel.set_xlabel("RL step")
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            panel.set_xlim(0, max([row["step"] for row in metrics], default=1) or 1)
        headline(figure, *_finding(result))
        return write(figure, path)


def _best_baseline(result: dict) -> list[tuple[str, float]]:
    """(label, value) of the baseline with the highest pass@1; empty for a task without baselines."""
    names = [key.removeprefix("after/over_") for key in result if key.startswith("after/over_")]
    values = {name: result[f"{name}/pass@1"] for name in names if f"{name}/pass@1" in result}
    best = sorted(values, key=values.get)[-1:]
    return [(f"baseline: {name.replace('_', ' ')}", values[name]) for name in best]


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
    lines = _best_baseline(result)
    if "forced/pass@1" in result:
        lines.append(("forced to answer at once", result["forced/pass@1"]))
    heights = sorted((height, text) for text, height in lines)
    for number, (height, text) in enumerate(heights):
        panel.axhline(height, color=GREY, lw=1.3, ls=(0, (4, 3)), zorder=1)
        below = number == 0 and len(heights) > 1 and heights[1][0] - height < 0.09
        offset, side = ((-4, "top"), (4, "bottom"))[not below]
        position = {"xycoords": ("axes fraction", "data"), "xytext": (-2, offset), "textcoords": "offset points"}
        style = {"ha": "right", "va": side, "color": MUTED, "size": 10.5, "zorder": 5, "path_effects": HALO}
        panel.annotate(text, (1, height), **position, **style)
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


def _behaviour(panel: Axes, metrics: list[dict], names: list[str]) -> None:
    """On the left the first count above 1 per answer, on the right the three shares that changed most."""
    drawn = {name: series(metrics, name) for name in names}
    drawn = {name: pair for name, pair in drawn.items() if len(pair[0])}
    counts = [name for name, (_, values) in drawn.items() if values.max() > 1]
    words = []
    for name in counts[:1]:
        line(panel, *drawn[name], BLUE)
        words.append((f"{_read(name)} per answer", BLUE))
        panel.set_ylabel(words[0][0], color=BLUE)
        from_zero(panel, drawn[name][1])
    if not counts:
        panel.set_yticks([])
    shares = [name for name, (_, values) in drawn.items() if 0 <= values.min() and values.max() <= 1]
    shares = sorted(shares, key=lambda name: _change(drawn[name][1]))[-3:][::-1]
    if shares:
        right = right_axis(panel, "share", MUTED)
        percent_axis(right)
    for name, colour in zip(shares, (GREEN, RED, ORANGE)):
        line(right, *drawn[name], colour)
        words.append((_read(name), colour))
    caption(panel, "Behaviour in the thinking", words)


def _read(name: str) -> str:
    """behaviour/said_yes in plain words."""
    return name.removeprefix("behaviour/").replace("_", " ")


def _change(values: np.ndarray) -> float:
    """The difference between the means of the first and the last fifth."""
    fifth = max(1, len(values) // 5)
    return abs(values[-fifth:].mean() - values[:fifth].mean())


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
        return "Accuracy over the steps of RL with rule rewards alone", ""
    title = f"Held-out pass@1: {percent(before)} → {percent(after)} by RL with rule rewards alone"
    notes = []
    if "after/pass@1_low" in result and "after/pass@1_high" in result:
        low, high = (100 * result[f"after/pass@1_{end}"] for end in ("low", "high"))
        notes.append(f"95% interval {low:.0f} to {high:.0f}%")
    if "forced/pass@1" in result:
        notes.append(f"forced to answer at once, it solves {percent(result['forced/pass@1'])}")
    notes += [f"{text} {percent(value)}" for text, value in _best_baseline(result)]
    return title, "  ·  ".join(notes)
