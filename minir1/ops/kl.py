"""Divergence of a student from a teacher over the whole vocabulary, from hidden states, without [N, V]."""
from torch import Tensor

from .choose import use_triton
from .kl_twin import kl as twin
from .tiles import wants_grad

KINDS = ("forward", "reverse", "js")
CHUNK_BYTES = 40 << 20  # of [N, V] that the twin keeps for the backward pass


def linear_kl(
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor,
    w_t: Tensor,
    temperature: float = 1.0,
    kind: str = "forward",
    *,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """The divergence of two next-token distributions, p_s = softmax(h_s w_sᵀ / temperature) and p_t likewise.

        forward   KL(p_t ‖ p_s) = Σ_v p_t (log p_t - log p_s)
        reverse   KL(p_s ‖ p_t)
        js        ½ KL(p_s ‖ m) + ½ KL(p_t ‖ m),   m = ½ (p_s + p_t)

    h_s [N, D_s], w_s [V, D_s] of the student, h_t [N, D_t], w_t [V, D_t] of the teacher -> [N] fp32 (fp64 if an input
    is). Differentiable in h_s and w_s; the teacher is a constant and gets no gradient, even if it is the same model.
    Nothing is multiplied by temperature² (Hinton et al., arXiv:1503.02531, section 2, does, to keep the size of the
    gradient): that is the caller's.

    chunk_bytes: the twin keeps that much of [N, V] for the backward pass (None: 40 MiB; log-probs of both models, or
    gradients of small vocabularies), and in the memory that dw will take if that is at most twice as much, and makes
    the rest again there; each call holds its own until its backward pass. Triton keeps none, and holds that much of the
    gradients of the student's logits (128 MiB). Rows may have any strides, 0 as well. ValueError for what does not fit.
    """
    _check(h_s, w_s, h_t, w_t, temperature, kind, chunk_bytes)
    if use_triton(impl, h_s, w_s) and use_triton(impl, h_t, w_t):
        from minir1.kernels import kl as kernel  # lazily: triton may not be there

        return kernel.linear_kl(h_s, w_s, h_t, w_t, temperature=temperature, kind=kind,
                                dx_bytes=chunk_bytes or kernel.DX_BYTES)
    kept_bytes = (chunk_bytes or CHUNK_BYTES) if wants_grad(h_s, w_s) else 0
    return twin(h_s, w_s, h_t, w_t, temperature, kind, kept_bytes)


def _check(h_s, w_s, h_t, w_t, temperature, kind, chunk_bytes) -> None:
    pairs = {"h_s": h_s, "w_s": w_s, "h_t": h_t, "w_t": w_t}
    told = lambda what: ", ".join(f"{name} {what(x)}" for name, x in pairs.items())
    if any(x.dim() != 2 for x in pairs.values()) or not (
        len(h_s) == len(h_t) and len(w_s) == len(w_t) and h_s.shape[1] == w_s.shape[1] and h_t.shape[1] == w_t.shape[1]
    ):
        raise ValueError(f"{told(lambda x: tuple(x.shape))}: want [N, D_s], [V, D_s], [N, D_t], [V, D_t]")
    if 0 in (*w_s.shape, *w_t.shape):
        raise ValueError(f"w_s {tuple(w_s.shape)}, w_t {tuple(w_t.shape)}: want a vocabulary and a width")
    if not all(x.is_floating_point() for x in pairs.values()):
        raise ValueError(f"{told(lambda x: x.dtype)}: want floats")
    if len({x.device for x in pairs.values()}) > 1:
        raise ValueError(f"{told(lambda x: x.device)}: want one device")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes={chunk_bytes}: must be above 0, or None")
