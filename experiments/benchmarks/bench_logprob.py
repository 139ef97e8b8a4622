"""The parts of bench_kernels.py about linear_logprob and linear_kl: who is compared, where, and how exactly."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from experiments.benchmarks.bench_timing import Figures, against, attempt, cpu_peak, cuda_peak, interleaved
from minir1.ops import linear_kl, linear_logprob

Shape = tuple[int, int, int]  # N tokens, width D, vocabulary V
COPIES = 4  # of the inputs on a GPU, taken in turn


def inputs(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0, teacher: bool = False) -> list[torch.Tensor]:
    """h, w (with gradient), target, g, g_H; with `teacher` a second h, w before the target. Logits of deviation 2."""
    (N, D, V), gen = shape, torch.Generator(device).manual_seed(seed)
    normal = lambda *size: torch.randn(size, generator=gen, device=device, dtype=torch.float32)
    pairs = [x for _ in range(1 + teacher) for x in (normal(N, D).to(dtype), (normal(V, D) * 2 / D**0.5).to(dtype))]
    pairs[0].requires_grad_(), pairs[1].requires_grad_()
    return [*pairs, torch.randint(V, (N,), generator=gen, device=device), normal(N), normal(N) * 0.01]


# ---- who is compared: (h, w, target) -> logp, entropy or None -------------------------------------------------------


def naive(h, w, target):
    """What one writes first: the logits in the dtype of the model, then their log-softmax in fp32."""
    lp = torch.log_softmax((h @ w.T).float(), -1)
    return lp.gather(1, target[:, None])[:, 0], -(lp.exp() * lp).sum(-1)


def checkpointed(h, w, target):
    """naive, whose logits are recomputed in the backward pass."""
    return checkpoint(naive, h, w, target, use_reentrant=False)


def chunked(chunk_bytes: int | None = None) -> Callable:
    return lambda h, w, target: linear_logprob(h, w, target, entropy=True, impl="torch", chunk_bytes=chunk_bytes)


def triton(engine: str) -> Callable:
    return lambda h, w, target: linear_logprob(h, w, target, entropy=True, impl="triton", engine=engine)


def liger(h, w, target):
    """One sum over all tokens: gradients are made in the forward pass, and none can come from above for each token."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, h, target), None


def cut_cross_entropy(h, w, target):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(h, w, target, reduction="none"), None


def liger_grpo(h, w, target, g):
    """Liger's chunked GRPO as a loss with the gradient of Σ_n g_n logp_n, by token and to the last factor.

    It takes rows of tokens and an advantage a row, and makes gradients in the forward pass. Here each token is a row,
    with the advantage -N g_n; the old policy is the new one, so that the ratio is 1 and nothing is clipped; there is no
    KL, and "bnpo" divides by the N tokens. 2,048 tokens a chunk are what it cuts a longer row into by itself.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", chunk_size=min(2048, len(h)))
    target = target[:, None]
    return loss(h[:, None], w, target, torch.ones_like(target), -len(h) * g)[0]


def others(batches: list[list[torch.Tensor]]) -> dict[str, Callable[[int], object]]:
    """Forward and backward of the packages that are installed. None has an entropy: they do less; nor does Liger give
    log-probs."""
    figures = {}
    if importlib.util.find_spec("liger_kernel"):
        figures |= {"liger": both_ways(liger, batches), "liger_grpo": whole_loss(liger_grpo, batches)}
    if importlib.util.find_spec("cut_cross_entropy"):
        figures["cut_cross_entropy"] = both_ways(cut_cross_entropy, batches)
    return figures


def both_ways(f: Callable, batches: list[list[torch.Tensor]]) -> Callable[[int], list]:
    """Forward and backward with the inputs of round i."""

    def run(i: int):
        h, w, *rest, g, g_H = batches[i % len(batches)]
        logp, ent = f(h, w, *rest)
        loss = (logp * g).sum() if ent is None else (logp * g).sum() + (ent * g_H).sum()
        return torch.autograd.grad(loss, (h, w))

    return run


def whole_loss(f: Callable, batches: list[list[torch.Tensor]]) -> Callable[[int], tuple]:
    """The same of a function that returns the loss itself, and takes g."""

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


def our_kl(kind: str = "forward", chunk_bytes: int | None = None, impl: str = "torch") -> Callable:
    return lambda h, w, h_t, w_t, _: (linear_kl(h, w, h_t, w_t, kind=kind, chunk_bytes=chunk_bytes, impl=impl), None)


# ---- on the CPU ----------------------------------------------------------------------------------------------------


def _work(name: str, shape: Shape, chunk_bytes: int):
    """For cpu_peak, which starts a process and cannot be given a function of this one."""
    f = {"naive": naive, "torch": chunked(chunk_bytes), "kl/naive": full_softmax_kl,
         "kl/torch": our_kl(chunk_bytes=chunk_bytes)}
    run = both_ways(f[name], [inputs(shape, "cpu", torch.float32, teacher=name.startswith("kl"))])
    both_ways(f[name], [inputs((8, 8, 8), "cpu", torch.float32, teacher=name.startswith("kl"))])(0)  # what loads once
    return lambda: run(0)


def cpu_large(shape: Shape, chunks_mib: tuple[int, ...], repeats: int, kl: bool) -> Figures:
    """Time and peak memory (both gradients counted) of the naive way, and of ours by the size of a chunk."""
    base, ours = ("kl/naive", "kl/torch") if kl else ("naive", "torch")
    batch = [inputs(shape, "cpu", torch.float32, teacher=kl)]
    sizes = {f"{ours}/{mib}": mib << 20 for mib in chunks_mib}
    ways = {base: full_softmax_kl if kl else naive}
    ways |= {name: our_kl(chunk_bytes=size) if kl else chunked(size) for name, size in sizes.items()}
    times = interleaved({name: both_ways(f, batch) for name, f in ways.items()}, repeats, "cpu")
    figures = {}
    for name, (seconds, ratio) in against(times, base).items():
        peak = cpu_peak(_work, base if name == base else ours, shape, sizes.get(name, 1))
        figures |= {f"{name}/seconds": seconds, f"{name}/time_ratio": ratio, f"{name}/peak_mib": peak}
    for name in ways:
        figures[f"{name}/memory_ratio"] = figures[f"{name}/peak_mib"] / figures[f"{base}/peak_mib"]
    return figures


def cpu_small(shapes: tuple[Shape, ...], repeats: int, kl: bool) -> Figures:
    """Small vocabularies, where one chunk holds all tokens: time against naive."""
    figures = {}
    for shape in shapes:
        batch = [inputs(shape, "cpu", torch.float32, teacher=kl)]
        ways = {"naive": full_softmax_kl, "torch": our_kl()} if kl else {"naive": naive, "torch": chunked()}
        times = interleaved({name: both_ways(f, batch) for name, f in ways.items()}, repeats, "cpu")
        for name, (seconds, ratio) in against(times, "naive").items():
            key = "small/{}{}x{}x{}/{}".format("kl/" if kl else "", *shape, name)
            figures |= {f"{key}/seconds": seconds, f"{key}/time_ratio": ratio}
    return figures


def accuracy(shape: Shape, device: str, variants: dict[str, Callable], dtype: torch.dtype) -> Figures:
    """Of each variant against fp64 on the same inputs: the largest error of logp and of the entropy, and the norm of
    the error of each gradient relative to that of the gradient."""
    batch = inputs(shape, device, dtype)
    exact_batch = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in batch]
    exact = (*_values(_naive64, exact_batch), *both_ways(_naive64, [exact_batch])(0))
    figures, refused = {}, {}
    for name, f in variants.items():
        ours = attempt(lambda: (*_values(f, batch), *both_ways(f, [batch])(0)), name, refused) or ()
        worst = [(a - b).abs().max().item() for a, b in zip(ours[:2], exact[:2])]
        norms = [((a - b).norm() / b.norm()).item() for a, b in zip(ours[2:], exact[2:])]
        figures |= dict(zip((f"accuracy/{name}/{which}" for which in ("logp", "entropy", "dh", "dw")), worst + norms))
    return figures | {f"accuracy/{name}/refused": why for name, why in refused.items()}


def _naive64(h, w, target):
    lp = torch.log_softmax(h @ w.T, -1)
    return lp.gather(1, target[:, None])[:, 0], -(lp.exp() * lp).sum(-1)


@torch.no_grad()
def _values(f, batch):
    return f(*batch[:-2])


# ---- on a GPU ------------------------------------------------------------------------------------------------------


def gpu(shape: Shape, repeats: int, tflops: float) -> Figures:
    """Forward and backward in bf16 of every way there is; the floor is 8 NDV operations at the measured ceiling."""
    N, D, V = shape
    ways = {"naive": naive, "compiled": torch.compile(naive), "checkpointed": checkpointed, "torch": chunked()}
    ways |= {"hybrid": triton("hybrid"), "fused": triton("fused")}
    batches = [inputs(shape, "cuda", torch.bfloat16, seed) for seed in range(COPIES)]
    runs = {name: both_ways(f, batches) for name, f in ways.items()} | others(batches)
    return _beside(runs, "logprob/{}x{}x{}".format(*shape), repeats, 8 * N * D * V / (tflops * 1e12))


def gpu_kl(shape: Shape, repeats: int, tflops: float) -> Figures:
    """The same of forward KL, both models of width D; the floor is 12 NDV, two products forward and four backward."""
    N, D, V = shape
    ways = {"naive": full_softmax_kl, "compiled": torch.compile(full_softmax_kl), "torch": our_kl()}
    ways |= {"triton": our_kl(impl="triton")}
    batches = [inputs(shape, "cuda", torch.bfloat16, seed, teacher=True) for seed in range(COPIES)]
    runs = {name: both_ways(f, batches) for name, f in ways.items()}
    return _beside(runs, "kl/{}x{}x{}".format(*shape), repeats, 12 * N * D * V / (tflops * 1e12))


def _beside(runs: dict[str, Callable[[int], object]], key: str, repeats: int, floor: float) -> Figures:
    """Peak, seconds and their ratio to the floor of every way; or why there are none."""
    figures, refused = {f"{key}/floor/seconds": floor}, {}
    for name, times in interleaved(runs, repeats, "cuda", refused).items():
        seconds = statistics.median(times)
        figures |= {f"{key}/{name}/seconds": seconds, f"{key}/{name}/of_floor": seconds / floor}
        if (peak := attempt(lambda: cuda_peak(runs[name]), name, refused)) is not None:
            figures[f"{key}/{name}/peak_mib"] = peak
    return figures | {f"{key}/{name}/refused": why for name, why in refused.items()}
