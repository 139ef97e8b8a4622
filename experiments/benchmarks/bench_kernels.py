"""Time, memory and accuracy of the kernels, of the same operations in torch, and of other implementations.

    python -m experiments.benchmarks.bench_kernels
    python -m experiments.benchmarks.bench_kernels --device cuda --out runs/bench_gpu.json --figure runs/bench_gpu.png

On the CPU: linear_logprob with entropy, forward and backward, for several chunk sizes, against naive code; linear_kl
against two full log-softmaxes; small vocabularies; errors against fp64. On a GPU: the ceilings of the device (a matrix
product, a copy), then all implementations of log-probs (Liger's and cut-cross-entropy's too, if installed), of forward
KL, and of attention. The variants of a comparison are called in turn, and medians are reported. For a variant that does
not fit the machine or does not compile, the reason is reported instead.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from experiments.benchmarks import bench_attention, bench_logprob
from experiments.benchmarks.bench_timing import Figures, ceilings, report
from minir1 import cli
from minir1.settings import at_least, new_file

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Config:
    """What is measured; shapes are N tokens, width D, vocabulary V."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: both parts, the second if there is a GPU
    shape: Shape = (1024, 512, 32768)  # on the CPU
    chunks: tuple[int, ...] = (4, 8, 16, 32, 64)  # MiB of logits at a time
    small: tuple[Shape, ...] = tuple((N, 128, 160) for N in (1024, 2048, 4096, 8192))  # as in the demo
    gpu_shapes: tuple[Shape, ...] = ((8192, 4096, 32768), (8192, 4096, 129280), (32768, 4096, 151936))
    repeats: int = 5  # on the CPU; small shapes take twelve times as many
    gpu_repeats: int = 30
    attention: bool = True  # on a GPU, include bench_attention.py
    out: Path = Path("runs/bench_kernels.json")
    figure: Path | None = None  # the roofline of a GPU; None: beside the JSON

    def __post_init__(self):
        at_least(self, 1, "shape", "chunks", "small", "gpu_shapes", "repeats", "gpu_repeats")
        new_file(self, "out", "figure")


def cpu(config: Config) -> Figures:
    """Processor seconds of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures = bench_logprob.cpu_large(config.shape, config.chunks, config.repeats, kl=False)
        figures |= bench_logprob.cpu_large(config.shape, config.chunks, config.repeats, kl=True)
        for kl in (False, True):
            figures |= bench_logprob.cpu_small(config.small, 12 * config.repeats, kl)
        ways = {"naive": bench_logprob.naive, "torch": bench_logprob.ours()}
        return figures | bench_logprob.errors(config.shape, "cpu", ways, torch.float32)
    finally:
        torch.set_num_threads(threads)


def cuda(config: Config) -> Figures:
    figures = ceilings()
    for shape in config.gpu_shapes:
        figures |= bench_logprob.gpu(shape, config.gpu_repeats, figures["tflops"])
        figures |= bench_logprob.gpu_kl(shape, config.gpu_repeats, figures["tflops"])
    if config.attention:
        attention = bench_attention.Config(repeats=config.gpu_repeats)
        figures |= bench_attention.gpu(attention, figures["tflops"], figures["tb_s"])
    ways = {"naive": bench_logprob.naive, "torch": bench_logprob.ours(), **bench_logprob.engines()}
    return figures | bench_logprob.errors((1024, 1024, 32768), "cuda", ways, torch.bfloat16)


def main(config: Config) -> dict:
    """Measure, print, and write the figures."""
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not on_gpu:
        raise ValueError("device='cuda': this machine has no GPU that torch can use; cpu, or auto")
    if config.figure and not on_gpu:
        raise ValueError(f"figure = {config.figure}: the roofline is that of a GPU, and none is measured here")
    figures: dict = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    if config.device != "cuda":
        figures |= cpu(config)
    if on_gpu:
        figures |= {"gpu": torch.cuda.get_device_name(), **cuda(config)}
    report("kernels", figures, config.out)
    if on_gpu:
        bench_attention.roofline(figures, config.figure or config.out.with_suffix(".png"))
    elif not torch.cuda.is_available():
        print("No GPU here: figures of the kernels themselves are missing; run this again on a machine that has one.")
    return figures


if __name__ == "__main__":
    cli.run(main, Config)
