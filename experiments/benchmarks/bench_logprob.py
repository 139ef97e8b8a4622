"""The part of bench_kernels.py about linear_logprob and linear_kl: time, memory, accuracy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from experiments.benchmarks.bench_timing import (
    Figures,
    accuracy,
    against,
    cpu_peak,
    interleaved,
    largest,
    measure,
    relative,
)
from minir1.ops import linear_kl, linear_logprob
from minir1.ops.chunks import upcast

Shape = tuple[int, int, int]  # N tokens, width D, vocabulary V
COPIES = 4  # of the inputs on a GPU, used in turn


def inputs(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0, teacher: bool = False) -> list[Tensor]:
    """h, w (with gradient), target, g, g_H; with `teacher` a second h, w before the target. Logits deviate by 2."""
    (N, D, V), gen = shape, torch.Generator(device).manual_seed(seed)
    normal = lambda *size: torch.randn(size, generator=gen, device=device, dtype=torch.float32)
    pairs = [x for _ in range(1 + teacher) for x in (normal(N, D).to(dtype), (normal(V, D) * 2 / D**0.5).to(dtype))]
    pairs[0].requires_grad_(), pairs[1].requires_grad_()
    return [*pairs, torch.randint(V, (N,), generator=gen, device=device), normal(N), normal(N) * 0.01]


# ---- implementations: (h, w, target) -> logp, entropy or None -------------------------------------------------------


def naive(h, w, target):
    """The usual code: logits in the dtype of the model, then their log-softmax in fp32 (fp64 for fp64)."""
    lp = torch.log_softmax((h @ w.T).to(upcast(h)), -1)
    return lp.gather(1, target[:, None])[:, 0], -(lp.exp() * lp).sum(-1)


def checkpointed(h, w, target):
    """naive, with logits recomputed in the backward pass."""
    return checkpoint(naive, h, w, target, use_reentrant=False)


def ours(impl: str = "torch", **how) -> Callable:
    return lambda h, w, target: linear_logprob(h, w, target, entropy=True, impl=impl, **how)


def engines() -> dict[str, Callable]:
    return {engine: ours("triton", engine=engine) for engine in ("hybrid", "fused")}


def liger(h, w, target):
    """The sum over all tokens: Liger computes gradients in the forward pass, so that tokens cannot be weighted."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, h, target), None


def cut_cross_entropy(h, w, target):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(h, w, target, reduction="none"), None


def liger_grpo(h, w, target, g):
    """Liger's chunked GRPO, set up such that its gradient is that of Σ_n g_n logp_n.

    It takes rows of tokens with one advantage per row, and computes gradients in the forward pass. Here each token is a
    row, with the advantage -N g_n. The old policy is the new one, so that the ratio is 1 and nothing is clipped; there
    is no KL, and "bnpo" divides by the N tokens. Its own chunks of a longer row have 2,048 tokens too.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", chunk_size=min(2048, len(h)))
    target = target[:, None]
    return loss(h[:, None], w, target, torch.ones_like(target), -len(h) * g)[0]


def others(batches: list[list[Tensor]]) -> dict[str, Callable[[int], object]]:
    """Forward and backward of the packages that are installed. They compute no entropy, and Liger no log-probs."""
    runs = {}
    if importlib.util.find_spec("liger_kernel"):
        runs |= {"liger": both_ways(liger, batches), "liger_grpo": whole_loss(liger_grpo, batches)}
    if importlib.util.find_spec("cut_cross_entropy"):
        runs["cut_cross_entropy"] = both_ways(cut_cross_entropy, batches)
    return runs


def both_ways(f: Callable, batches: list[list[Tensor]]) -> Callable[[int], list]:
    """Forward and backward with the inputs of round i."""

    def run(i: int):
        h, w, *rest, g, g_H = batches[i % len(batches)]
        logp, ent = f(h, w, *rest)
        loss = (logp * g).sum() if ent is None else (logp * g).sum() + (ent * g_H).sum()
        return torch.autograd.grad(loss, (h, w))

    return run


def whole_loss(f: Callable, batches: list[list[Tensor]]) -> Callable[[int], tuple]:
    """The same for a function that takes g and returns the loss itself."""

    def run(i: int):
        h, w, target, g, _ = batches[i % len(batches)]
        return torch.autograd.grad(f(h, w, target, g), (h, w))

    return run


def full_softmax_kl(h, w, h_t, w_t, _):
    """Two full log-softmaxes."""
    s = torch.log_softmax((h @ w.T).float(), -1)
    with torch.no_grad():
        t = torch.log_softmax((h_t @ w_t.T).float(), -1)
    return (t.exp() * (t - s)).sum(-1), None


def our_kl(impl: str = "torch", **how) -> Callable:
    return lambda h, w, h_t, w_t, _: (linear_kl(h, w, h_t, w_t, kind="forward", impl=impl, **how), None)


def naive_and_ours(kl: bool) -> tuple[Callable, Callable[..., Callable]]:
    return (full_softmax_kl, our_kl) if kl else (naive, ours)


# ---- on the CPU ----------------------------------------------------------------------------------------------------


def passes(kl: bool, name: str, shape: Shape, chunk_bytes: int):
    """A forward and backward pass of one way, ready to run: an argument of cpu_peak, which a new process imports."""
    base, make = naive_and_ours(kl)
    f = base if name == "naive" else make(chunk_bytes=chunk_bytes)
    run, small = (both_ways(f, [inputs(size, "cpu", torch.float32, teacher=kl)]) for size in (shape, (8, 8, 8)))
    small(0)  # loads libraries
    return lambda: run(0)


def cpu_large(shape: Shape, chunks_mib: tuple[int, ...], repeats: int, kl: bool) -> Figures:
    """Time and peak memory, gradients included, of the naive code and of ours for several chunk sizes."""
    base, make = naive_and_ours(kl)
    prefix, batch = "kl/" if kl else "", [inputs(shape, "cpu", torch.float32, teacher=kl)]
    sizes = {f"torch/{mib}": mib << 20 for mib in chunks_mib}
    ways = {"naive": base} | {name: make(chunk_bytes=size) for name, size in sizes.items()}
    times = interleaved({name: both_ways(f, batch) for name, f in ways.items()}, repeats, "cpu")
    peaks = {name: cpu_peak(passes, kl, name, shape, sizes.get(name, 1)) for name in ways}
    figures = {}
    for name, (seconds, ratio) in against(times, "naive").items():
        key = f"{prefix}{name}"
        figures |= {f"{key}/seconds": seconds, f"{key}/time_ratio": ratio}
        figures |= {f"{key}/peak_mib": peaks[name], f"{key}/memory_ratio": peaks[name] / peaks["naive"]}
    return figures


def cpu_small(shapes: tuple[Shape, ...], repeats: int, kl: bool) -> Figures:
    """Time on small vocabularies, where one chunk contains all tokens."""
    base, make = naive_and_ours(kl)
    figures = {}
    for shape in shapes:
        batch = [inputs(shape, "cpu", torch.float32, teacher=kl)]
        runs = {"naive": both_ways(base, batch), "torch": both_ways(make(), batch)}
        for name, (seconds, ratio) in against(interleaved(runs, repeats, "cpu"), "naive").items():
            key = "small/{}{}x{}x{}/{}".format("kl/" if kl else "", *shape, name)
            figures |= {f"{key}/seconds": seconds, f"{key}/time_ratio": ratio}
    return figures


def errors(shape: Shape, device: str, ways: dict[str, Callable], dtype: torch.dtype) -> Figures:
    """Against fp64: the largest error of log-probs and entropies, and the relative error of the gradients."""

    def results(f: Callable, batch: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            values = f(*batch[:-2])
        return *values, *both_ways(f, [batch])(0)

    kinds = {"logp": largest, "entropy": largest, "dh": relative, "dw": relative}
    return accuracy("accuracy", ways, naive, results, inputs(shape, device, dtype), kinds)


# ---- on a GPU ------------------------------------------------------------------------------------------------------


def gpu(shape: Shape, repeats: int, tflops: float) -> Figures:
    """Forward and backward in bf16 of every implementation; the floor is 8 NDV operations."""
    ways = {"naive": naive, "compiled": torch.compile(naive), "checkpointed": checkpointed, "torch": ours()}
    return _compare("logprob", shape, repeats, 8, tflops, ways | engines())


def gpu_kl(shape: Shape, repeats: int, tflops: float) -> Figures:
    """The same for forward KL, both models of width D; the floor is 12 NDV, two products forward and four backward."""
    ways = {"naive": full_softmax_kl, "compiled": torch.compile(full_softmax_kl), "torch": our_kl()}
    return _compare("kl", shape, repeats, 12, tflops, ways | {"triton": our_kl("triton")})


def _compare(kind: str, shape: Shape, repeats: int, factor: int, tflops: float, ways: dict[str, Callable]) -> Figures:
    N, D, V = shape
    key, work = f"{kind}/{N}x{D}x{V}", factor * N * D * V
    batches = [inputs(shape, "cuda", torch.bfloat16, seed, teacher=kind == "kl") for seed in range(COPIES)]
    runs = {name: both_ways(f, batches) for name, f in ways.items()} | (others(batches) if kind == "logprob" else {})
    floor = {f"{key}/floor/seconds": work / (tflops * 1e12)}
    return floor | measure(key, runs, repeats, "cuda", work, tflops, peak=True)
