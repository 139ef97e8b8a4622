"""Figure: the splits of a cache for decoding, which of them a row has reached, and which outputs are merged.

    python -m experiments.benchmarks.decode_splits --out docs/results/decode_splits.png

The splits are those of kernels/decode.py for heads of up to 256 dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.benchmarks.attention_tiles import EMPTY, MASKED, WHOLE, save
from minir1 import cli
from minir1.settings import at_least, new_file


@dataclass(frozen=True)
class Config:
    """Sizes in slots of the cache."""

    past: tuple[int, ...] = (300, 2048, 1400, 3333)  # of each row, before its new token
    slots: int = 4096  # M
    split: int = 512  # slots per program
    out: Path = Path("docs/results/decode_splits.png")

    def __post_init__(self):
        at_least(self, 1, "slots", "split")
        at_least(self, 0, "past")
        new_file(self, "out")


def pieces(past: int, slots: int, split: int) -> list[str]:
    """The kind of each piece of a row whose new token sees slots 0 … past: nothing of it is visible, a part, or all."""
    counts = [min(max(past + 1 - start, 0), split) for start in range(0, slots, split)]
    return [EMPTY if n == 0 else WHOLE if n == split else MASKED for n in counts]


def main(config: Config) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    if not all(0 <= past < config.slots for past in config.past):
        raise ValueError(f"past = {config.past}: 0 to {config.slots - 1}")
    fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
    for row, past in enumerate(config.past):
        kinds = pieces(past, config.slots, config.split)
        for i, colour in enumerate(kinds):
            corner = i * config.split, row + 0.1
            ax.add_patch(Rectangle(corner, config.split, 0.5, facecolor=colour, edgecolor="#888888"))
        reached = [i for i, colour in enumerate(kinds) if colour != EMPTY]
        for i in reached:
            ax.plot((i + 0.5) * config.split, row + 0.74, "o", color="#b03030", ms=4)
        first, last = ((x + 0.5) * config.split for x in (0, reached[-1] + 0.55))
        ax.annotate("", (last, row + 0.74), (first, row + 0.74),
                    arrowprops={"arrowstyle": "->", "linewidth": 1.5, "color": "#b03030"})
        ax.plot([past + 1] * 2, [row + 0.03, row + 0.67], color="#222222", linewidth=2)
    ax.set(xlim=(0, config.slots), ylim=(len(config.past), 0), xlabel="slots of the cache, split alike for every row",
           yticks=[row + 0.35 for row in range(len(config.past))],
           yticklabels=[f"row {row}" for row in range(len(config.past))])
    ax.set_xticks(range(0, config.slots + 1, config.split))
    handles = [Patch(facecolor=WHOLE, edgecolor="#888888", label="a program, all slots visible"),
               Patch(facecolor=MASKED, edgecolor="#888888", label="a program, some slots masked"),
               Patch(facecolor=EMPTY, edgecolor="#888888", label="a program that returns at once"),
               Line2D([], [], color="#222222", linewidth=2, label="slot of the new token"),
               Line2D([], [], color="#b03030", marker="o", ms=4, label="outputs and lse, merged in order")]
    save(fig, handles, config.out)


if __name__ == "__main__":
    cli.run(main, Config)
