"""How a decode step grows with rows, cache length, width and number of experts: measured, and its floor; a figure.

    python -m experiments.benchmarks.growth --out docs/results/growth.json --figure docs/results/growth.png

The default model (MLA and experts), untrained; one of the four sizes grows, the others stay at --at-rows rows, 40
tokens in the cache, width 128 and 8 experts. With the width all inner sizes grow in proportion. A step is `hidden` and
`logits` of one token in each row; the floor is that of floor.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiments.benchmarks import floor
from experiments.benchmarks.profile_step import LENGTH, decoding, seconds
from minir1 import cli
from minir1.device import pick
from minir1.figures import BLUE, DPI, GREY, STYLE, WIDTH, caption, headline, write
from minir1.files import write_json
from minir1.log import table
from minir1.model.config import ModelConfig
from minir1.model.transformer import Transformer
from minir1.settings import at_least, new_file

BASE = ModelConfig(vocab=128)


@dataclass(frozen=True)
class Config:
    """Growth of a decode step."""

    rows: tuple[int, ...] = (1, 4, 16, 64, 256, 512)
    lengths: tuple[int, ...] = (40, 256, 1024, 4096)  # tokens in the cache
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)  # D, multiples of 16
    experts: tuple[int, ...] = (4, 8, 16, 32, 64, 128)  # E
    at_rows: int = 64  # where the rows do not grow
    steps: int = 21  # decode steps of a point
    device: str = "auto"
    out: Path | None = None  # a JSON file
    figure: Path | None = None  # a PNG file

    def __post_init__(self):
        at_least(self, 1, "rows", "lengths", "at_rows", "steps")
        at_least(self, 16, "widths")
        at_least(self, BASE.experts_per_token, "experts")
        if any(width % 16 for width in self.widths):
            raise ValueError(f"widths = {self.widths}: multiples of 16")
        if min(self.lengths) <= self.steps // 2:
            raise ValueError(f"lengths = {self.lengths}: above steps // 2 = {self.steps // 2}, the tokens of the steps")
        new_file(self, "out", "figure")


def wide(dim: int) -> ModelConfig:
    """The default model at width D = `dim`, all inner sizes in proportion."""
    heads = {"nope": dim // 8, "rope": dim // 8, "v_dim": dim // 4, "kv_lora": dim // 2}
    return replace(BASE, dim=dim, ffn=2 * dim, expert_ffn=dim // 2, **heads)


def cases(config: Config) -> dict[str, list[tuple[int, ModelConfig, int, int]]]:
    """panel -> (what grows, shape, rows, tokens in the cache) of each point."""
    at = config.at_rows
    return {
        "rows": [(rows, BASE, rows, LENGTH) for rows in config.rows],
        "cache length": [(length, BASE, at, length) for length in config.lengths],
        "width": [(dim, wide(dim), at, LENGTH) for dim in config.widths],
        "experts": [(experts, replace(BASE, experts=experts), at, LENGTH) for experts in config.experts],
    }


LABELS = {
    "rows": "rows decoded at once",
    "cache length": "tokens in the cache of each row",
    "width": "width D of the model",
    "experts": "routed experts in a layer",
}


def panel_of(panel: Axes, name: str, points: dict[int, tuple[float, float]]) -> None:
    """Measured time and floor against one size, on logarithmic axes. points: size -> both in milliseconds."""
    sizes = list(points)
    for index, (colour, style) in enumerate(((BLUE, "-"), (GREY, "--"))):
        panel.plot(sizes, [pair[index] for pair in points.values()], style, color=colour, lw=2.2, marker="o", ms=5)
    panel.set(xscale="log", yscale="log")
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(10))
    panel.yaxis.set_minor_locator(NullLocator())
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    panel.set_xlabel(LABELS[name])
    panel.set_ylabel("milliseconds of a step")
    caption(panel, name.capitalize(), [("measured", BLUE), ("floor: matrix products alone", GREY)])


def draw(result: dict[str, float], path: Path) -> Figure:
    """The figure of `main`'s result."""
    points: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in LABELS}
    for name, size in (key.split("/")[:2] for key in result if key.endswith("/floor")):
        pair = tuple(1000 * result[f"{name}/{size}/{what}"] for what in ("seconds", "floor"))
        points[name][int(size)] = pair
    top = max(value for panel in points.values() for pair in panel.values() for value in pair)
    least = min(value for panel in points.values() for pair in panel.values() for value in pair)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure = Figure(figsize=(WIDTH, 9.5), dpi=DPI)
        panels = figure.subplots(2, 2)
        figure.subplots_adjust(left=0.08, right=0.97, top=0.79, bottom=0.075, hspace=0.52, wspace=0.2)
        for panel, (name, own) in zip(panels.flat, points.items()):
            panel_of(panel, name, own)
            panel.set_ylim(least / 1.5, top * 1.5)
        few, many = (own := points["rows"])[min(own)], own[max(own)]
        ratios = f"{few[0] / few[1]:.0f} times its floor at {min(own)} row{'s' * (min(own) > 1)}"
        ratios += f", {many[0] / many[1]:.1f} times at {max(own)}"
        note = "one size grows in each panel; the floor is what the matrix products take by themselves"
        headline(figure, f"Time of a decode step: {ratios}", note)
        return write(figure, path)


def main(config: Config) -> dict[str, float]:
    """Measure, print, and write: PANEL/SIZE/seconds and PANEL/SIZE/floor."""
    torch.manual_seed(0)
    device = pick(config.device)
    result, lines = {}, []
    for name, points in cases(config).items():
        for size, shape, rows, length in points:
            model = Transformer(shape).to(device)
            took = seconds(decoding(model, rows, length, config.steps), config.steps, device)
            least = floor.decode_step(model, rows, length)
            result |= {f"{name}/{size}/seconds": took, f"{name}/{size}/floor": least}
            lines.append([name, f"{size:,}", f"{1000 * took:.2f}", f"{1000 * least:.2f}", f"{took / least:.1f}"])
    columns = ["what grows", "to", "median, ms", "floor, ms", "times the floor"]
    table(f"a decode step, {torch.get_num_threads()} threads", columns, lines)
    if config.out:
        write_json(config.out, result)
    if config.figure:
        draw(result, config.figure)
    return result


if __name__ == "__main__":
    cli.run(main, Config)
