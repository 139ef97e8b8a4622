"""Figures of experiments/report.py about training: losses, rewards, and when each stage ran."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.report_model_figures import thousands
from experiments.report_run import Pipeline, Stage
from minir1.figures import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    HALO,
    INK,
    ORANGE,
    VIOLET,
    WIDTH,
    caption,
    from_zero,
    headline,
    line,
    right_axis,
    series,
    tall_headline,
    wide_figure,
    write,
)  # fmt: skip

KIND_COLOURS = {"pre-training": GREY, "RL": BLUE, "SFT": ORANGE, "sampling": GREEN, "reward model": VIOLET}


def _of_kind(run: Pipeline, kind: str, key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> steps and values of the finished stages of this kind that logged `key`."""
    logged = {name: series(stage.metrics, key) for name, stage in run.stages.items() if stage.kind == kind}
    return {name: pair for name, pair in logged.items() if len(pair[0])}


def sft_loss(run: Pipeline, path: Path) -> Figure | None:
    """Training and held-out loss of both fine-tunings over their steps."""
    stages = _of_kind(run, "SFT", "train/loss")
    if not stages:
        return None
    figure, panels = wide_figure(columns=len(stages), top=0.7)
    changes = []
    for panel, (name, (steps, values)) in zip(panels, stages.items()):
        line(panel, steps, values, BLUE)
        due, held_out = series(run.stages[name].metrics, "eval/loss")
        panel.plot(due, held_out, "o-", color=ORANGE, lw=1.4, ms=6, mec="white", mew=1.2, zorder=4, clip_on=False)
        panel.set(xlabel="step", ylabel="nats per answer token", xlim=(0, max(*steps, *due, 1)))
        from_zero(panel, [*values, *held_out])
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        caption(panel, run.label(name), [("batches", BLUE)] + [("held-out documents", ORANGE)] * bool(len(due)))
        changes += [f"{run.label(name)} {held_out[0]:.2f} → {held_out[-1]:.2f}"] if len(due) > 1 else []
    title = f": {', '.join(changes)} nats held out" if changes else ""
    headline(figure, f"SFT loss{title}", "mean -log π of the answer tokens; each fine-tuning has its own data")
    return write(figure, path)


def rl_reward(run: Pipeline, path: Path) -> Figure | None:
    """Mean reward of each RL over its steps."""
    stages = _of_kind(run, "RL", "train/reward")
    if not stages:
        return None
    figure, panels = wide_figure(columns=len(stages), top=0.7)
    changes = []
    for panel, (name, (steps, values)) in zip(panels, stages.items()):
        line(panel, steps, values, BLUE)
        due, accuracy = series(run.stages[name].metrics, "eval/pass@1")
        panel.plot(due, accuracy, "o-", color=ORANGE, lw=1.2, ms=6, mec="white", mew=1.2, zorder=4, clip_on=False)
        panel.set(xlabel="step", xlim=(0, max(*steps, *due, 1)))
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        T = run.stages[name].config.get("temperature")
        title = run.label(name) + (f", T = {T:g}" if T is not None else "")
        caption(panel, title, [("reward", BLUE)] + [("validation pass@1", ORANGE)] * bool(len(due)))
        fifth = max(1, len(values) // 5)
        changes.append(f"{run.label(name)} {values[:fifth].mean():.2f} → {values[-fifth:].mean():.2f}")
    drawn = np.concatenate([curve.get_ydata() for panel in panels for curve in panel.get_lines()])
    for panel in panels:
        from_zero(panel, drawn)
    note = "means of the first and the last fifth of the steps"
    note += "; the rewards of the stages are sums of different parts" if len(stages) > 1 else ""
    headline(figure, f"RL reward: {', '.join(changes)}", note)
    return write(figure, path)


def loss_and_reward(run: Pipeline, path: Path) -> Figure | None:
    """SFT loss on the left axis and RL reward on the right, over the seconds of the pipeline."""
    stages = {name: (ORANGE, pair) for name, pair in _of_kind(run, "SFT", "train/loss").items()}
    stages |= {name: (BLUE, pair) for name, pair in _of_kind(run, "RL", "train/reward").items()}
    stages = {name: stages[name] for name, stage in run.stages.items() if name in stages and stage.seconds}
    if len({colour for colour, _ in stages.values()}) < 2:
        return None
    figure, (left,) = wide_figure(right=0.925)
    right = right_axis(left, "reward", BLUE)
    drawn = {ORANGE: [0.0], BLUE: [0.0]}
    for name, (colour, (steps, values)) in stages.items():
        stage = run.stages[name]
        line(right if colour == BLUE else left, stage.start + stage.seconds * steps / max(1, steps[-1]), values, colour)
        drawn[colour] += [*values]
    from_zero(left, drawn[ORANGE])
    from_zero(right, drawn[BLUE])
    left.set_ylabel("SFT loss, nats per answer token", color=ORANGE)
    first, last = (run.stages[list(stages)[i]] for i in (0, -1))
    left.set(xlim=(first.start, last.start + last.seconds), xlabel="seconds of the pipeline")
    left.xaxis.set_major_formatter(FuncFormatter(thousands))
    for name in stages:
        stage = run.stages[name]
        left.axvspan(stage.start, stage.start + stage.seconds, color=stages[name][0], alpha=0.06, lw=0)
        _name_of_span(left, run.label(name), stage)
    caption(left, "Means over a batch", [("loss of SFT", ORANGE), ("reward of RL", BLUE)])
    hidden = "what lies between is sampling and the reward model; steps are spread evenly over the seconds of a stage"
    headline(figure, f"SFT loss and RL reward over {_duration(last.start + last.seconds)} of the pipeline", hidden)
    return write(figure, path)


def _name_of_span(panel: Axes, label: str, stage: Stage) -> None:
    low, high = panel.get_xlim()
    narrow = stage.seconds < 0.08 * (high - low)
    where = {"ha": "center", "va": "top", "size": 10, "color": INK, "path_effects": HALO, "zorder": 6}
    height = 0.98 if not narrow else 0.9
    panel.text(stage.start + stage.seconds / 2, height, label, transform=panel.get_xaxis_transform(), **where)


def _duration(seconds: float) -> str:
    """48 s, 12 min, 3.4 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def timeline(run: Pipeline, path: Path) -> Figure | None:
    """When each stage ran, one after the other."""
    timed = {name: stage for name, stage in run.stages.items() if stage.seconds}
    if not timed:
        return None
    height = 2.2 + 0.42 * len(timed)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    panel = figure.add_axes((0.165, 0.75 / height, 0.8, 1 - 2.25 / height))
    panel.grid(axis="x")
    panel.grid(False, axis="y")
    total = sum(stage.seconds for stage in timed.values())
    for row, stage in enumerate(timed.values()):
        panel.barh(row, stage.seconds, left=stage.start, height=0.62, color=KIND_COLOURS[stage.kind], zorder=3)
        late = stage.start > total / 2
        at = stage.start if late else stage.start + stage.seconds
        style = {"textcoords": "offset points", "va": "center", "size": 10.5, "color": INK, "path_effects": HALO}
        text = f"{stage.seconds:,.0f} s · {stage.seconds / total:.0%}"
        panel.annotate(text, (at, row), xytext=(-6 if late else 6, 0), ha="right" if late else "left", **style)
    panel.set_yticks(range(len(timed)), [stage.label for stage in timed.values()], color=INK)
    panel.set(ylim=(len(timed) - 0.5, -0.5), xlim=(0, total), xlabel="seconds")
    panel.xaxis.set_major_formatter(FuncFormatter(thousands))
    kinds = dict.fromkeys(stage.kind for stage in timed.values())
    caption(panel, "", [(kind, KIND_COLOURS[kind]) for kind in kinds])
    longest = max(timed.values(), key=lambda stage: stage.seconds)
    title = f"Time of the stages: {_duration(total)}, of which {longest.label} took {longest.seconds / total:.0%}"
    note = "one stage after the other, as the pipeline measured them; tests are not included"
    tall_headline(figure, title, note)
    return write(figure, path)
