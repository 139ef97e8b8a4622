"""Log-probability and entropy from hidden states and the vocabulary matrix, by the kernel or its twin."""
import math

import torch
from torch import Tensor

from .choose import use_triton
from .logprob_twin import logprob as twin
from .tiles import wants_grad

ENGINES = ("auto", "hybrid", "fused")
CHUNK_BYTES = 48 << 20  # of logits that the twin keeps for the backward pass; what does not fit is made again


def linear_logprob(
    h: Tensor,
    w: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    impl: str = "auto",
    engine: str = "auto",
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of the targets, and entropy, from hidden states and the vocabulary matrix.

        z = softcap(logit_scale · h wᵀ) / temperature,    softcap(x) = c · tanh(x / c)
        logp_n = z_{n,t_n} - log Σ_v exp z_{n,v},         H_n = -Σ_v p_{n,v} log p_{n,v}

    h [N, D], w [V, D], target [N] int64 -> logp [N], entropy [N] (None if not asked for); fp32, whatever the
    dtype of h and w (fp64 if one of them is fp64). Both are differentiable in h and w. A row whose target is
    ignore_index has value 0 and gradient 0 and costs nothing; to know whether there is one, a GPU is waited for once.
    ValueError for what does not fit, and on the CPU for targets out of range; on a GPU those give NaN or a device
    assertion.

    engine, of the Triton kernel: "hybrid" (auto) or "fused", whose logp and entropy of a row have the same bits in any
    batch. chunk_bytes: how much of [N, V] is held. The twin keeps that much of the logits for the backward pass (None:
    48 MiB), and in the memory that dw will take if that is at most twice as much, and makes the others again there;
    each call holds its own until its backward pass. Triton keeps none, and holds that much of their gradients (None:
    128 MiB). Rows may have any strides, 0 as well.
    """
    _check(h, w, target, temperature, softcap, logit_scale, engine, chunk_bytes)
    triton = use_triton(impl, h, w)
    if engine != "auto" and not triton:
        raise ValueError(f"engine={engine!r}: only Triton has engines, and here the twin in torch runs; impl='triton' "
                         "says why the kernel cannot")
    kept = target != ignore_index
    rows = None if bool(kept.all()) else kept.nonzero().squeeze(1)
    if rows is not None:
        h, target = h.index_select(0, rows), target.index_select(0, rows)
    if not target.is_cuda and target.numel():
        low, high = target.aminmax()
        if low < 0 or high >= w.shape[0]:
            allowed = f"0 to {w.shape[0] - 1} and {ignore_index}"
            raise ValueError(f"target in [{low}, {high}]: allowed are {allowed}")
    if triton:
        logp, ent = _triton(h, w, target, temperature, softcap, logit_scale, entropy, engine, chunk_bytes)
    else:
        kept_bytes = (chunk_bytes or CHUNK_BYTES) if wants_grad(h, w) else 0
        logp, ent = twin(h, w, target, temperature, softcap, logit_scale, entropy, kept_bytes)
    if rows is not None:
        logp = logp.new_zeros(kept.shape).index_copy(0, rows, logp)
        ent = ent.new_zeros(kept.shape).index_copy(0, rows, ent) if entropy else None
    return logp, ent


def _triton(h, w, target, temperature, softcap, logit_scale, entropy, engine, chunk_bytes):
    from minir1.kernels import logprob as kernel  # lazily: triton may not be there

    return kernel.linear_logprob(
        h, w, target, temperature=temperature, softcap=softcap, logit_scale=logit_scale, entropy=entropy,
        engine="hybrid" if engine == "auto" else engine, dx_bytes=chunk_bytes or kernel.DX_BYTES,
    )


def _check(h, w, target, temperature, softcap, logit_scale, engine, chunk_bytes) -> None:
    if h.dim() != 2 or w.dim() != 2 or h.shape[1] != w.shape[1] or target.shape != h.shape[:1]:
        raise ValueError(f"h {tuple(h.shape)}, w {tuple(w.shape)}, target {tuple(target.shape)}: "
                         "want [N, D], [V, D], [N]")
    if target.dtype != torch.int64 or not h.is_floating_point() or not w.is_floating_point():
        raise ValueError(f"h {h.dtype}, w {w.dtype}, target {target.dtype}: want floats, floats, torch.int64")
    if not h.device == w.device == target.device:
        raise ValueError(f"h on {h.device}, w on {w.device}, target on {target.device}: want one device")
    if 0 in w.shape:
        raise ValueError(f"w {tuple(w.shape)}: wants a vocabulary and a width")
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: choose one of {', '.join(ENGINES)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap}: must be above 0 and finite, or None")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale={logit_scale}: must be finite")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes={chunk_bytes}: must be above 0, or None")
