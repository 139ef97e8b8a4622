"""How far a student's distributions are from its teacher's, with [tokens, vocabulary] never in memory at once.

All functions take the states of both models at the same tokens, from `Transformer.states`, [M, D_s] and [M, D_t]: of
the student with gradient, of the teacher without, in its own dtype. Where the vocabularies differ in size, as between
models of one family with different padding, both are cut to the smaller one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minir1.distill import generalised_js, with_rest
from minir1.model.transformer import Transformer
from minir1.ops import linear_kl, linear_logprob, linear_top
from minir1.ops.chunks import no_autocast, token_chunks, upcast
from minir1.ops.top import log_softmax_into


def divergence(
    student: Transformer, h_s: Tensor, teacher: Transformer, h_t: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """D_β(T, S) of every token (`distill.generalised_js`), fp32 [M] (fp64 of fp64). ValueError for β outside 0 … 1."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta = {beta}: 0 (KL(T‖S)) to 1 (KL(S‖T))")
    kind, V = {0.0: "forward", 1.0: "reverse"}.get(beta, "js"), min(student.config.vocab, teacher.config.vocab)
    share = beta if kind == "js" else 0.5
    return linear_kl(h_s, student.head.weight[:V], h_t, teacher.head.weight[:V], temperature, kind, share)


@torch.no_grad()
def top_log_probs(
    teacher: Transformer, h_t: Tensor, k: int, temperature: float = 1.0, vocab: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k likeliest of the first `vocab` tokens (None: of all), int64 [M, k], and their log-probs, fp32 [M, k].

    ValueError if there are not k of them, and others.
    """
    w = teacher.head.weight[:vocab]
    if not 1 <= k < len(w):
        raise ValueError(f"k = {k}: from 1 to {len(w) - 1}, below the vocabulary")
    dtype = upcast(h_t, w)
    chunks = token_chunks(len(h_t), len(w), dtype, None)
    buffer = h_t.new_empty(chunks[0].stop, len(w), dtype=dtype)
    with no_autocast(h_t):
        parts = [log_softmax_into(h_t[n], w, temperature, buffer[: n.stop - n.start]).topk(k) for n in chunks]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def top_divergence(
    student: Transformer, h_s: Tensor, ids: Tensor, lp_t: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """D_β over the teacher's stored tokens and, as one more, all others together (`distill.with_rest`): [M].

    ids [M, k], lp_t [M, k]: from `top_log_probs` at the same temperature, of a teacher whose vocabulary is at least
    the student's. A lower bound of `divergence`.
    """
    lp_s = linear_top(h_s, student.head.weight, ids, temperature)
    return generalised_js(with_rest(lp_s), with_rest(lp_t.to(lp_s.dtype)), beta)


def log_probs(model: Transformer, h: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(x_t | x_<t) of the tokens [M] themselves, from the same states: as `Transformer.logprob`, fp32 [M]."""
    return linear_logprob(h, model.head.weight, targets, temperature=temperature)[0]
