"""The part of bench_kernels.py about attention and decoding: time, memory, accuracy, and a roofline.

Run alone, it measures this part only:

    python -m experiments.benchmarks.bench_attention --out runs/bench_attention_gpu.json \\
        --figure runs/bench_attention_gpu.png
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmarks.bench_timing import Figures, accuracy, ceilings, measure, relative, report
from minir1 import cli
from minir1.ops import attention, decode_attention, decode_latent
from minir1.settings import at_least, new_file

COPIES = 4  # of the inputs on a GPU, used in turn
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


class Shape(NamedTuple):
    """Causal training on B rows of T tokens, or decoding of one new token per row over caches of T tokens."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    d_qk: int
    d_v: int

    def __str__(self):
        return "x".join(map(str, self))


@dataclass(frozen=True)
class Config:
    """What is measured."""

    training: tuple[Shape, ...] = (Shape(4, 4096, 16, 16, 128, 128), Shape(4, 16384, 16, 16, 128, 128),
                                   Shape(4, 4096, 32, 8, 128, 128), Shape(4, 4096, 16, 16, 192, 128),
                                   Shape(4, 16384, 16, 16, 192, 128))
    decoding: tuple[Shape, ...] = (Shape(64, 4096, 32, 8, 128, 128), Shape(8, 32768, 32, 8, 128, 128))
    latents: tuple[Shape, ...] = (Shape(64, 4096, 128, 1, 576, 512), Shape(8, 32768, 128, 1, 576, 512),
                                  Shape(64, 4096, 16, 1, 576, 512))
    repeats: int = 30
    out: Path | None = None  # a JSON file for the figures
    figure: Path | None = None  # the roofline

    def __post_init__(self):
        at_least(self, 1, "training", "decoding", "latents", "repeats")
        new_file(self, "out", "figure")


# ---- implementations: q [B, T, H, Dqk], k [B, T, K, Dqk], v [B, T, K, Dv] -> o [B, T, H, Dv], causal ----------------


def ours(impl: str) -> Callable:
    def run(q, k, v):
        B, T = q.shape[:2]
        cu = torch.arange(B + 1, dtype=torch.int32, device=q.device) * T
        o, _ = attention(*(x.flatten(0, 1) for x in (q, k, v)), cu, cu, T, T, impl=impl, check=False)
        return o.unflatten(0, (B, T))

    return run


def sdpa(backend: SDPBackend | None, pad: bool) -> Callable:
    """torch's attention by one backend (None: torch's choice); pad: v to the size of q."""

    def run(q, k, v):
        size, scale, grouped = v.shape[-1], q.shape[-1] ** -0.5, q.shape[2] != k.shape[2]
        v = F.pad(v, (0, q.shape[-1] - size)) if pad and q.shape[-1] > size else v
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend) if backend else nullcontext():
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return o[..., :size].transpose(1, 2)

    return run


def flex() -> Callable:
    """FlexAttention, compiled, with a causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention), {}

    def run(q, k, v):
        T = q.shape[1]
        if T not in masks:
            masks[T] = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=masks[T], enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


def ways(shape: Shape, device: str) -> dict[str, Callable]:
    """The implementations that may run on a device."""
    if device == "cpu":
        return {"torch": ours("torch"), "sdpa": sdpa(None, pad=True)}
    runs = {"triton": ours("triton")} | {f"sdpa {name}": sdpa(which, pad=False) for name, which in BACKENDS.items()}
    if shape.d_qk != shape.d_v:
        runs |= {f"sdpa {name}, v padded": sdpa(which, pad=True) for name, which in BACKENDS.items()}
    return runs | {"flex": flex()}


def inputs(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v that require gradients, and the gradient of o."""
    (B, T, H, K, d_qk, d_v), gen = shape, torch.Generator(device).manual_seed(seed)
    sizes = (B, T, H, d_qk), (B, T, K, d_qk), (B, T, K, d_v), (B, T, H, d_v)
    *qkv, g = [torch.randn(*size, generator=gen, device=device).to(dtype) for size in sizes]
    return [*(x.requires_grad_() for x in qkv), g]


def forward(f: Callable, batches: list[list[Tensor]]) -> Callable[[int], Tensor]:
    """Forward with the inputs of round i."""

    @torch.no_grad()
    def run(i: int):
        return f(*batches[i % len(batches)][:3])

    return run


def both_ways(f: Callable, batches: list[list[Tensor]]) -> Callable[[int], tuple[Tensor, ...]]:
    """Forward and backward with the inputs of round i."""

    def run(i: int):
        *x, g = batches[i % len(batches)]
        return torch.autograd.grad(f(*x), x, g)

    return run


# ---- measurements --------------------------------------------------------------------------------------------------


def operations(shape: Shape, backward: bool) -> float:
    """2 · BHT²/2 times the widths of all products: q·k, p·v; in the backward pass q·k, do·v, pᵀ·do, dzᵀ·q, dz·k."""
    pairs = shape.rows * shape.heads * shape.tokens**2 / 2
    return 2 * pairs * (shape.d_qk + shape.d_v + (3 * shape.d_qk + 2 * shape.d_v if backward else 0))


def cache_bytes(shape: Shape, itemsize: int = 2) -> float:
    """Bytes that one step of decoding must read: keys and values, which in a latent cache are the same."""
    values = 0 if shape.kv_heads == 1 and shape.d_qk > shape.d_v else shape.d_v
    return shape.rows * shape.tokens * shape.kv_heads * (shape.d_qk + values) * itemsize


def training(shape: Shape, device: str, dtype: torch.dtype, repeats: int, tflops: float) -> Figures:
    """Forward, and forward with backward, of every implementation."""
    batches = [inputs(shape, device, dtype, seed) for seed in range(COPIES if device == "cuda" else 1)]
    figures = {}
    for part, how in (("forward", forward), ("both", both_ways)):
        runs = {name: how(f, batches) for name, f in ways(shape, device).items()}
        work = operations(shape, part == "both")
        figures |= measure(f"attention/{shape}/{part}", runs, repeats, device, work, tflops, "tflops", device == "cuda")
    return figures


@torch.no_grad()
def decoding(shape: Shape, latent: bool, device: str, dtype: torch.dtype, repeats: int, tb_s: float) -> Figures:
    """One new token per row over full caches, in the layout of minir1.model.cache."""
    B, M, H, K, d_qk, d_v = shape
    gen = torch.Generator(device).manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=gen, device=device).to(dtype)
    queries = [draw(B, 1, H, d_qk) for _ in range(COPIES)]
    past = torch.full((B,), M - 1, device=device)
    if latent:
        cache = draw(B, M, d_qk)
        call = lambda q, impl: decode_latent(*q.split((d_v, d_qk - d_v), -1), cache, past, 0.04, impl=impl, check=False)
    else:
        k, v = (draw(B, K, M, size).transpose(1, 2) for size in (d_qk, d_v))
        call = lambda q, impl: decode_attention(q, k, v, past, impl=impl, check=False)
    runs = {"triton": lambda i: call(queries[i % COPIES], "triton")} if device == "cuda" else {}
    runs["torch"] = lambda i: call(queries[i % COPIES], "torch")
    if not latent:
        runs["sdpa"] = lambda i: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (queries[i % COPIES], k, v)), enable_gqa=H != K).transpose(1, 2)
    key = f"{'latent' if latent else 'decode'}/{shape}"
    return measure(key, runs, repeats, device, cache_bytes(shape, queries[0].element_size()), tb_s, "tb_s")


def errors(shape: Shape, device: str, dtype: torch.dtype) -> Figures:
    """Relative errors of o, dq, dk and dv against fp64."""
    results = lambda f, batch: (forward(f, [batch])(0), *both_ways(f, [batch])(0))
    kinds = dict.fromkeys(("o", "dq", "dk", "dv"), relative)
    batch = inputs(shape, device, dtype)
    return accuracy(f"accuracy/{shape}", ways(shape, device), ours("torch"), results, batch, kinds)


def gpu(config: Config, tflops: float, tb_s: float) -> Figures:
    """Everything, in bf16."""
    figures, how = {}, ("cuda", torch.bfloat16, config.repeats)
    for shape in config.training:
        figures |= training(shape, *how, tflops)
    for latent, shapes in ((False, config.decoding), (True, config.latents)):
        for shape in shapes:
            figures |= decoding(shape, latent, *how, tb_s)
    for d_qk in (128, 192):
        figures |= errors(Shape(2, 1024, 8, 4, d_qk, 128), "cuda", torch.bfloat16)
    return figures


# ---- the figure ----------------------------------------------------------------------------------------------------


def points(figures: Figures) -> dict[str, tuple[float, float]]:
    """Label -> (operations per byte, TFLOP/s) of our kernels, those of log-probs too. Bytes are inputs and results,
    moved once."""
    labelled = {}
    for key, seconds in figures.items():
        kind, *case = key.split("/")
        if case[-2:] == ["triton", "seconds"]:
            shape, part = Shape(*map(int, case[0].split("x"))), case[1:-2]
            if kind == "attention":
                work = operations(shape, part == ["both"])
                moved = 2 * shape.rows * shape.tokens * (shape.heads + shape.kv_heads) * (shape.d_qk + shape.d_v)
                moved *= 3 if part == ["both"] else 1  # the backward pass reads them again and writes gradients
            else:
                work = 2 * shape.rows * shape.tokens * shape.heads * (shape.d_qk + shape.d_v)
                moved = cache_bytes(shape)
        elif kind == "logprob" and case[1:] in (["hybrid", "seconds"], ["fused", "seconds"]):
            N, D, V = map(int, case[0].split("x"))
            work, moved, part = 8 * N * D * V, 4 * D * (N + V), [case[1]]  # bf16 inputs and gradients; logits twice
        else:
            continue
        labelled[" ".join((kind, case[0], *part))] = work / moved, work / seconds / 1e12
    return labelled


def roofline(figures: Figures, path: Path) -> None:
    """Draw the rate of each kernel, below the limit of the device at its intensity."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    x = [2.0**i for i in range(-1, 15)]
    ax.plot(x, [min(figures["tflops"], figures["tb_s"] * i) for i in x], color="black", linewidth=1)
    for label, (intensity, rate) in points(figures).items():
        ax.plot(intensity, rate, "o", label=label)
    ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title=figures.get("gpu", ""))
    ax.legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(config: Config) -> Figures:
    """Measure, print, write, draw; on a GPU only."""
    if not torch.cuda.is_available():
        raise ValueError("this benchmark needs a GPU that torch can use, and there is none here")
    figures = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), **ceilings()}
    figures |= gpu(config, figures["tflops"], figures["tb_s"])
    report("attention", figures, config.out)
    if config.figure:
        roofline(figures, config.figure)
    return figures


if __name__ == "__main__":
    cli.run(main, Config)
