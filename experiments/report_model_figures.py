"""The figures of experiments/report.py about the model: its size, its window, and what a long context costs."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.count_figure import short, sizes
from experiments.report_run import Pipeline
from minir1.figures import BLUE, DPI, GREY, INK, ORANGE, WIDTH, caption, from_zero, headline, tall_headline, write
from minir1.model.config import ModelConfig
from minir1.model.count import cache_values, count
from minir1.model.presets import PRESETS

NUMBER_BYTES = 4  # fp32, in which the decoding steps are timed


def thousands(number: float, _=None) -> str:
    """12,345"""
    return f"{number:,.0f}"


@lru_cache(maxsize=1)
def _published() -> dict[str, dict]:
    """The counts of the presets that others published."""
    return {name: count(config) for name, config in PRESETS.items() if not name.startswith("minir1")}


def parameters(model: ModelConfig | None, path: Path) -> Figure | None:
    """Total and active parameters of this model beside published ones."""
    if not model:
        return None
    own = count(model)
    used, total = short(own["active_with_embedding"]), short(own["total"])
    title = f"Active against total parameters: a token uses {used} of {total} here"
    note = "dense models lie on the diagonal; the drop below it is what routing to a few experts spares each token"
    return sizes({**_published(), "this run": own}, path, (title, note))


def window(run: Pipeline, model: ModelConfig | None, path: Path) -> Figure | None:
    """The context window of this model and of published ones, and the lengths they were trained on."""
    if not model:
        return None
    shapes = {name: config for name, config in PRESETS.items() if not name.startswith("minir1")} | {"this run": model}
    shapes = dict(sorted(shapes.items(), key=lambda item: item[1].max_positions))
    trained = {name: c.rope_scaling.original for name, c in shapes.items() if c.rope_scaling.kind != "none"}
    budgets = [stage.config.get("max_completion_length") for stage in run.stages.values()]
    if longest := max(filter(None, budgets), default=None):
        trained["this run"] = longest
    height = 1.9 + 0.36 * len(shapes)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    panel = figure.add_axes((0.2, 0.72 / height, 0.72, 1 - 2.2 / height))
    panel.grid(axis="x")
    panel.grid(False, axis="y")
    panel.set_xscale("log", base=2)
    for row, (name, config) in enumerate(shapes.items()):
        colour = ORANGE if name == "this run" else BLUE
        panel.barh(row, config.max_positions, height=0.6, left=0, color=colour, alpha=0.75, zorder=2)
        style = {"textcoords": "offset points", "va": "center", "size": 10.5, "color": INK}
        panel.annotate(f"{config.max_positions:,}", (config.max_positions, row), xytext=(6, 0), **style)
        if name in trained:
            panel.plot(trained[name], row, "o", color="white", mec=INK, ms=7, zorder=4)
    low = min([config.max_positions for config in shapes.values()] + list(trained.values()))
    panel.set_yticks(range(len(shapes)), list(shapes), color=INK)
    panel.set(xlim=(low / 2, 2.2 * max(config.max_positions for config in shapes.values())), xlabel="tokens")
    panel.xaxis.set_major_formatter(FuncFormatter(thousands))
    panel.xaxis.set_minor_locator(NullLocator())
    labels = [("this run", ORANGE), ("published", BLUE), ("○ trained on, before the window was extended", INK)]
    caption(panel, "", labels)
    most = f", trained on answers of up to {longest:,}" if longest else ""
    title = f"Context window: {model.max_positions:,} tokens here{most}"
    note = "of this run: the largest token budget of an answer; of others: as their configurations say"
    tall_headline(figure, title, note)
    return write(figure, path)


def full_cache_values(config: ModelConfig) -> int:
    """Numbers in the cache for one token if keys and values of every head were kept, all layers together."""
    sizes = 2 * config.head_size if config.attention == "gqa" else config.nope + config.rope + config.v_dim
    return config.layers * config.heads * sizes


def context(model: ModelConfig | None, seconds: dict[int, float], path: Path) -> Figure | None:
    """Bytes of the cache and, where it was measured, the time of a decoding step against the context length."""
    if not model:
        return None
    figure = Figure(figsize=(WIDTH, 5.4), dpi=DPI)
    panels = list(np.ravel(figure.subplots(1, 1 + bool(seconds))))
    figure.subplots_adjust(left=0.075, right=0.965, top=0.76, bottom=0.13, wspace=0.25)
    cached, full = (NUMBER_BYTES * values for values in (cache_values(model), full_cache_values(model)))
    names = ("latent", "all heads") if model.attention == "mla" else (f"{model.kv_heads} heads", "all heads")
    lengths = 4.0 ** np.arange(2, np.emath.logn(4, model.max_positions) + 0.01)
    labels = []
    for size, name, colour in ((cached, names[0], BLUE), (full, names[1], GREY)):
        panels[0].plot(lengths, lengths * size / 1e3, "o-", color=colour, lw=2.2, ms=6, mec="white", mew=1)
        labels.append((f"{name}: {size:,} bytes a token", colour))
    panels[0].set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="kB")
    caption(panels[0], "Cache of one row, fp32", labels)
    if seconds:
        milliseconds = 1000 * np.array(list(seconds.values()))
        panels[1].plot(list(seconds), milliseconds, "o-", color=ORANGE, lw=2.2, ms=6, mec="white", mew=1)
        panels[1].set(xscale="log", xlabel="tokens in the cache", ylabel="ms")
        from_zero(panels[1], milliseconds)
        caption(panels[1], "Decoding one token", [("measured on the CPU, one row", ORANGE)])
    for panel in panels:
        panel.set_xticks(lengths if panel is panels[0] else list(seconds))
        panel.xaxis.set_major_formatter(FuncFormatter(thousands))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        panel.xaxis.set_minor_locator(NullLocator())
    title = f"Cost of the context: a cache {full / cached:.1f} times smaller than that of all heads"
    note = "cache: computed from the configuration"
    if seconds:
        first, last = min(seconds), max(seconds)
        note += f"; a token takes {1000 * seconds[first]:.1f} ms after {first:,} tokens, "
        note += f"{1000 * seconds[last]:.1f} ms after {last:,}; the fastest of 15"
    headline(figure, title, note)
    return write(figure, path)
