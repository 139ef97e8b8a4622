"""Time and memory of a long prompt, read in chunks or in one call.

    python -m experiments.benchmarks.prefill --out docs/results/prefill.json

The tiny MLA + MoE model with its window raised from 4,096 to 131,072 positions by YaRN, untrained, one prompt of random
tokens. Each length runs in its own process, so that the memory peak is that of this length; `cache` is the part that
must grow with the prompt. On the CPU the peak includes Python, torch and the weights.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from experiments.benchmarks.bench_timing import timed
from minir1 import cli
from minir1.device import peak_memory_gib, pick
from minir1.files import write_json
from minir1.log import table
from minir1.model.config import ModelConfig
from minir1.model.rope import RopeScaling
from minir1.model.transformer import Transformer
from minir1.settings import at_least, new_file


@dataclass(frozen=True)
class Config:
    """Prompts of several lengths."""

    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)  # tokens
    chunk: int = 512  # tokens
    whole: int = 32768  # the longest prompt that is also read in one call of hidden
    layers: int = 4  # L
    threads: int = 1
    device: str = "cpu"
    out: Path | None = None  # a JSON file for the figures

    def __post_init__(self):
        at_least(self, 1, "lengths", "chunk", "layers", "threads")
        at_least(self, 0, "whole")
        new_file(self, "out")


def model_config(longest: int, layers: int) -> ModelConfig:
    """The default model, its window of 4,096 extended as V3's (arXiv:2412.19437, section 4.3)."""
    factor = max(1.0, longest / 4096)
    scaling = RopeScaling("yarn", factor=factor, original=4096, mscale=1.0, mscale_all=1.0)
    return ModelConfig(layers=layers, max_positions=max(longest, 4096), rope_scaling=scaling)


def measure(length: int, chunk: int | None, config: Config) -> tuple[float, float, float, float]:
    """Clock seconds, processor seconds, peak GiB and cache GiB of one prompt, in chunks or (None) in one call."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    device = pick(config.device)
    model = Transformer(model_config(length, config.layers)).requires_grad_(False).to(device)
    tokens, cache = torch.randint(0, model.config.vocab, (1, length)).to(device), model.cache(1, length)
    read = partial(model.hidden, tokens, cache=cache)
    if chunk is not None:
        read = partial(model.prefill, tokens, cache=cache, chunk=chunk)
    _, seconds, cpu = timed(read, device)
    return seconds, cpu, peak_memory_gib(device), sum(layer.nbytes for layer in cache.layers) / 2**30


def main(config: Config) -> dict[str, float]:
    """Measure, print, and write the figures."""
    pick(config.device)  # refused here, not in the processes
    jobs = [(length, None) for length in config.lengths if length <= config.whole]
    jobs += [(length, config.chunk) for length in config.lengths]
    result: dict[str, float] = {"chunk": config.chunk, "layers": config.layers, "threads": config.threads}
    rows = []
    # spawned, because a forked child would start with the parent's memory
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for length, chunk in jobs:
            seconds, cpu, peak, cache = pool.apply(measure, (length, chunk, config))
            way = "one_call" if chunk is None else "chunks"
            result |= {f"{way}/{length}/seconds": seconds, f"{way}/{length}/cpu_seconds": cpu}
            result |= {f"{way}/{length}/peak_gib": peak, f"cache/{length}/gib": cache}
            cells = [f"{seconds:.1f}", f"{cpu:.1f}", f"{peak:.2f}", f"{cache:.3f}"]
            rows.append([f"{length:,} tokens, {way.replace('_', ' ')}", *cells])
            print(f"{rows[-1][0]}: {seconds:.1f} s, peak {peak:.2f} GiB", flush=True)
    title = f"prefill, {config.layers} layers, chunk {config.chunk}, {config.threads} threads"
    table(title, ["", "seconds", "of the CPU", "peak GiB", "cache GiB"], rows)
    if config.out:
        write_json(config.out, result)
    return result


if __name__ == "__main__":
    cli.run(main, Config)
