"""The parts of bench_kernels.py about attention and decoding: who is compared, where, and how exactly.

Alone it measures these parts only, and draws them under the roof of the device:

    python -m experiments.benchmarks.bench_attention --out runs/bench_attention_gpu.json \\
        --figure runs/bench_attention_gpu.png
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmarks.bench_timing import Figures, Refused, attempt, ceilings, cuda_peak, interleaved
from minir1 import cli
from minir1.files import replace_text
from minir1.log import table
from minir1.ops import attention, decode_attention, decode_latent

COPIES = 4  # of the inputs on a GPU, taken in turn
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


class Shape(NamedTuple):
    """Causal training: B rows of T tokens. For decoding T is what each row holds, and one token is new."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    d_qk: int
    d_v: int

    def __str__(self):
        return "x".join(f"{x}" for x in self)


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


# ---- who is compared: q [B, T, H, Dqk], k [B, T, K, Dqk], v [B, T, K, Dv] -> o [B, T, H, Dv], causal ----------------


def ours(impl: str) -> Callable:
    def run(q, k, v):
        B, T = q.shape[:2]
        cu = torch.arange(B + 1, dtype=torch.int32, device=q.device) * T
        o, _ = attention(*(x.flatten(0, 1) for x in (q, k, v)), cu, cu, T, T, impl=impl, check=False)
        return o.unflatten(0, (B, T))

    return run


def sdpa(backend: SDPBackend | None, pad: bool) -> Callable:
    """torch's attention with its backend pinned; pad: v to the size of q."""

    def run(q, k, v):
        size, scale = v.shape[-1], q.shape[-1] ** -0.5
        v = F.pad(v, (0, q.shape[-1] - size)) if pad and q.shape[-1] > size else v
        call = lambda: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
        if backend is None:
            return call()[..., :size].transpose(1, 2)
        with sdpa_kernel(backend):
            return call()[..., :size].transpose(1, 2)

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
    """All that may be compared on a device; the first is the measure of the others."""
    if device == "cpu":
        return {"torch": ours("torch"), "sdpa": sdpa(None, pad=True)}
    figures = {"triton": ours("triton")} | {f"sdpa {name}": sdpa(which, pad=False) for name, which in BACKENDS.items()}
    if shape.d_qk != shape.d_v:
        figures |= {f"sdpa {name}, v padded": sdpa(which, pad=True) for name, which in BACKENDS.items()}
    return figures | {"flex": flex()}


def inputs(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k, v with gradient, and the gradient of o."""
    B, T, H, K, d_qk, d_v = shape
    gen = torch.Generator(device).manual_seed(seed)
    sizes = (B, T, H, d_qk), (B, T, K, d_qk), (B, T, K, d_v), (B, T, H, d_v)
    made = [torch.randn(*size, generator=gen, device=device).to(dtype) for size in sizes]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def forward(f: Callable, batches: list[list[Tensor]]) -> Callable[[int], Tensor]:
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


# ---- what it must cost --------------------------------------------------------------------------------------------


def operations(shape: Shape, backward: bool) -> float:
    """2·B·H·T²/2 for each number of a head in each product: q·k and p·v; backward q·k, do·v, pᵀ·do, dzᵀ·q and dz·k."""
    pairs = shape.rows * shape.heads * shape.tokens**2 / 2
    return 2 * pairs * (shape.d_qk + shape.d_v + (3 * shape.d_qk + 2 * shape.d_v if backward else 0))


def cache_bytes(shape: Shape, itemsize: int = 2) -> float:
    """What one step of decoding must read: keys and values, which in a latent cache are the same."""
    values = 0 if shape.kv_heads == 1 and shape.d_qk > shape.d_v else shape.d_v
    return shape.rows * shape.tokens * shape.kv_heads * (shape.d_qk + values) * itemsize


def training(shape: Shape, device: str, dtype: torch.dtype, repeats: int, tflops: float) -> Figures:
    """Seconds, share of the floor (the operations at the measured ceiling) and peak memory, of every way; or why there
    are none."""
    batches = [inputs(shape, device, dtype, seed) for seed in range(COPIES if device == "cuda" else 1)]
    figures = {}
    for part, how in (("forward", forward), ("both", both_ways)):
        refused: Refused = {}
        needed = operations(shape, part == "both")
        runs = {name: how(f, batches) for name, f in ways(shape, device).items()}
        for name, times in interleaved(runs, repeats, device, refused).items():
            key, seconds = f"attention/{shape}/{part}/{name}", statistics.median(times)
            figures |= {f"{key}/seconds": seconds, f"{key}/tflops": needed / seconds / 1e12}
            figures[f"{key}/of_floor"] = seconds / (needed / (tflops * 1e12))
            if device == "cuda" and (peak := attempt(lambda: cuda_peak(runs[name]), name, refused)) is not None:
                figures[f"{key}/peak_mib"] = peak
        figures |= {f"attention/{shape}/{part}/{name}/refused": why for name, why in refused.items()}
    return figures


@torch.no_grad()
def decoding(shape: Shape, latent: bool, device: str, dtype: torch.dtype, repeats: int, tb_s: float) -> Figures:
    """One new token a row over full caches, laid out as in minir1.model.cache."""
    B, M, H, K, d_qk, d_v = shape
    gen = torch.Generator(device).manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=gen, device=device).to(dtype)
    queries = [draw(B, 1, H, d_qk) for _ in range(COPIES)]
    past = torch.full((B,), M - 1, device=device)
    if latent:
        cache = draw(B, M, d_qk)
        call = lambda i, impl: decode_latent(*queries[i % COPIES].split((d_v, d_qk - d_v), -1), cache, past, 0.04,
                                             impl=impl, check=False)
    else:
        k, v = (draw(B, K, M, size).transpose(1, 2) for size in (d_qk, d_v))
        call = lambda i, impl: decode_attention(queries[i % COPIES], k, v, past, impl=impl, check=False)
    runs = {"triton": lambda i: call(i, "triton")} if device == "cuda" else {}
    runs["torch"] = lambda i: call(i, "torch")
    if not latent:
        runs["sdpa"] = lambda i: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (queries[i % COPIES], k, v)), enable_gqa=H != K).transpose(1, 2)
    figures, key, refused = {}, f"{'latent' if latent else 'decode'}/{shape}", {}
    for name, times in interleaved(runs, repeats, device, refused).items():
        seconds = statistics.median(times)
        rate = cache_bytes(shape, queries[0].element_size()) / seconds / 1e12
        figures |= {f"{key}/{name}/seconds": seconds, f"{key}/{name}/tb_s": rate}
        figures[f"{key}/{name}/of_floor"] = tb_s / rate
    return figures | {f"{key}/{name}/refused": why for name, why in refused.items()}


def accuracy(shape: Shape, device: str, dtype: torch.dtype) -> Figures:
    """Norm of the error against fp64 on the same inputs, relative to the exact one's: o, dq, dk, dv."""
    batch = inputs(shape, device, dtype)
    exact_batch = [x.detach().double().requires_grad_(x.requires_grad) for x in batch]
    exact = forward(ours("torch"), [exact_batch])(0), *both_ways(ours("torch"), [exact_batch])(0)
    figures, refused = {}, {}
    for name, f in ways(shape, device).items():
        have = attempt(lambda: (forward(f, [batch])(0), *both_ways(f, [batch])(0)), name, refused)
        for what, a, b in zip(("o", "dq", "dk", "dv"), have or (), exact):
            figures[f"accuracy/{shape}/{name}/{what}"] = ((a - b).norm() / b.norm()).item()
    return figures | {f"accuracy/{shape}/{name}/refused": why for name, why in refused.items()}


def gpu(config: Config, tflops: float, tb_s: float) -> Figures:
    """Everything, in bf16."""
    figures, how = {}, ("cuda", torch.bfloat16, config.repeats)
    for shape in config.training:
        figures |= training(shape, *how, tflops)
    for latent, shapes in ((False, config.decoding), (True, config.latents)):
        for shape in shapes:
            figures |= decoding(shape, latent, *how, tb_s)
    for d_qk in (128, 192):
        figures |= accuracy(Shape(2, 1024, 8, 4, d_qk, 128), "cuda", torch.bfloat16)
    return figures


# ---- the picture ---------------------------------------------------------------------------------------------------


def points(figures: Figures) -> dict[str, tuple[float, float]]:
    """Label -> (operations a byte, TFLOP/s) of our kernels. Bytes are inputs and results, moved once.

    figures may be those of bench_kernels.py too, which has log-probs.
    """
    labelled = {}
    for key, value in figures.items():
        kind, _, behind = key.partition("/")
        name, *rest = behind.split("/")
        if kind == "logprob" and rest in (["hybrid", "seconds"], ["fused", "seconds"]):
            N, D, V = (int(x) for x in name.split("x"))  # bf16 inputs and gradients; logits made twice
            labelled[" ".join((kind, name, rest[0]))] = 8 * N * D * V / (4 * D * (N + V)), 8 * N * D * V / value / 1e12
            continue
        if kind not in ("attention", "decode", "latent") or not key.endswith("/triton/seconds"):
            continue
        shape = Shape(*(int(x) for x in name.split("x")))
        if kind == "attention":
            work, tokens = operations(shape, rest[0] == "both"), shape.rows * shape.tokens
            moved = 2 * tokens * (shape.heads + shape.kv_heads) * (shape.d_qk + shape.d_v)
            moved *= 3 if rest[0] == "both" else 1  # and read again backward, and gradients written
        else:
            work, moved = 2 * shape.rows * shape.tokens * shape.heads * (shape.d_qk + shape.d_v), cache_bytes(shape)
        labelled[" ".join((kind, name, *rest[:-2]))] = work / moved, work / value / 1e12
    return labelled


def roofline(figures: Figures, path: Path) -> None:
    """What each kernel reaches, under what the device allows at its intensity."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    x = [2.0**i for i in range(-1, 15)]
    ax.plot(x, [min(figures["tflops"], figures["tb_s"] * i) for i in x], color="black", linewidth=1)
    for label, (intensity, rate) in points(figures).items():
        ax.plot(intensity, rate, "o", label=label)
    ax.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title=figures.get("gpu", ""))
    ax.legend(fontsize=6)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(config: Config) -> Figures:
    """Measure, print, write, draw; on a GPU only."""
    if not torch.cuda.is_available():
        raise ValueError("this benchmark needs a GPU that torch can use, and there is none here")
    figures = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), **ceilings()}
    figures |= gpu(config, figures["tflops"], figures["tb_s"])
    table("attention", ["", "measured"], [[k, f"{v:.4g}" if isinstance(v, float) else v] for k, v in figures.items()])
    for path in (config.out, config.figure):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if config.out:
        replace_text(config.out, json.dumps(figures, indent=2) + "\n")
    if config.figure:
        roofline(figures, config.figure)
    return figures


if __name__ == "__main__":
    cli.run(main, Config)
