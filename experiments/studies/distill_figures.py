"""Figures of distillation: ways at equal tokens, and against RL."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.studies.comparison_tables import plural
from minir1 import figures as fig
from minir1.figures import BLUE, GREY, INK, ORANGE
from minir1.metrics import seed_interval

PANELS = (("forward_kl", "KL(T‖S), teacher's texts", BLUE), ("reverse_kl", "KL(S‖T), student's texts", ORANGE))


def draw_ways(results: dict[str, list[dict[str, float]]], path: Path) -> Figure:
    """Both divergences of every way: the mean over seeds, its interval, and a small dot per seed. Writes a PNG."""
    height = 2.6 + 0.42 * len(results)
    with matplotlib.rc_context(fig.STYLE):
        figure = Figure(figsize=(fig.WIDTH, height), dpi=fig.DPI)
        panels = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(left=0.3, right=0.98, top=1 - 1.7 / height, bottom=0.6 / height, wspace=0.08)
        places = np.arange(len(results))[::-1]
        for panel, (key, title, colour) in zip(panels, PANELS):
            for y, runs in zip(places, results.values()):
                values = [run[key] for run in runs]
                panel.plot(values, [y] * len(values), "o", color=colour, ms=4, alpha=0.45, zorder=3)
                mean = float(np.mean(values))
                if len(values) >= 3:
                    mean, low, high = seed_interval(values)
                    panel.plot([max(low, 0), high], [y, y], color=colour, lw=2.2, zorder=2)
                panel.plot(mean, y, "o", color=colour, ms=8, mec="white", mew=1.2, zorder=4)
            panel.set_xlim(left=0)
            panel.set_yticks(places, list(results), color=INK)
            panel.set_xlabel("nats per token")
            panel.grid(axis="x", color=GREY, alpha=0.25)
            fig.panel_title(panel, title)
        ends = [np.mean([run["forward_kl"] for run in runs]) for runs in results.values()]
        title = f"Ways to distil at equal tokens: KL(T‖S) from {min(ends):.2f} to {max(ends):.2f}"
        note = "large dots: means over seeds; bars: 95 % intervals; small dots: seeds"
        fig.tall_headline(figure, title, note)
        return fig.write(figure, path)


def draw_against_rl(results: list[dict], ways: dict[str, str], path: Path) -> Figure:
    """Left: RL's validation accuracy over its tokens, a line per seed. Right: test accuracy of every way."""
    with matplotlib.rc_context(fig.STYLE):
        figure = Figure(figsize=(fig.WIDTH, 6.2), dpi=fig.DPI)
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.15)})
        figure.subplots_adjust(left=0.07, right=0.98, top=0.72, bottom=0.12, wspace=0.62)
        for result in results:
            tokens, accuracy = np.array(result["curve"]).T
            left.plot(tokens / 1e6, accuracy, color=GREY, lw=1.6)
            for way, colour in (("rl", GREY), ("texts", BLUE), ("logits", ORANGE), ("on-policy", fig.GREEN)):
                left.plot(result[f"{way}/tokens"] / 1e6, result[f"{way}/pass@1"], "o", color=colour, ms=7, mec="white")
        left.set(xlabel="tokens trained on, in millions", xlim=(0, None))
        fig.percent_axis(left)
        left.set_ylim(0, None)
        names = [("RL", GREY), ("texts", BLUE), ("distributions", ORANGE), ("on policy", fig.GREEN)]
        fig.caption(left, "Dots: test; line: validation", names)
        for y, name in enumerate(reversed(ways)):
            values = [result[f"{name}/pass@1"] for result in results]
            colour = GREY if name in ("base", "rl", "texts-rl") else BLUE if name != "teacher" else INK
            right.plot(values, [y] * len(values), "o", color=colour, ms=4, alpha=0.45)
            if len(values) >= 3:
                mean, low, high = seed_interval(values)
                right.plot([max(low, 0), min(high, 1)], [y, y], color=colour, lw=2.2)
            right.plot(np.mean(values), y, "o", color=colour, ms=8, mec="white", mew=1.2)
        right.set_yticks(range(len(ways)), list(reversed(ways.values())), color=INK)
        right.set_xlim(0, 1)
        right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        right.grid(axis="x", color=GREY, alpha=0.25)
        fig.panel_title(right, "Test problems solved")
        mean = lambda name: float(np.mean([result[f"{name}/pass@1"] for result in results]))
        title = f"Taught by texts {fig.percent(mean('texts'))}, by RL {fig.percent(mean('rl'))}"
        note = f"the same small student; the teacher solves {fig.percent(mean('teacher'))}; {plural(len(results))}"
        fig.headline(figure, title, note)
        return fig.write(figure, path)
