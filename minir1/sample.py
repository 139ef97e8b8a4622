"""Batched generation with a cache: one prefill per prompt, finished rows are dropped, each row has its own noise."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from minir1.data import pad_rows
from minir1.device import widest
from minir1.model.moe import routes_of
from minir1.model.transformer import Transformer

EOS, STOP, BUDGET = 0, 1, 2  # why a row ended
PREFILL_CHUNK = 2048  # columns of a prompt at a time
BUCKETS = (1, *sorted(size << n for size in (2, 3) for n in range(30)))  # 1, 2, 3, 4, 6, 8, 12 …: sizes of a batch


@dataclass(frozen=True)
class Sampled:
    """The answers of B rows, those of a prompt adjacent. Entries past count[b] are 0; fp32 is fp64 of an fp64 model."""

    tokens: Tensor  # int64 [B, T], T the longest answer
    logp: Tensor  # fp32 [B, T], log-prob of each token under the distribution it was drawn from
    entropy: Tensor  # fp32 [B, T], nats, of that distribution
    count: Tensor  # int64 [B], tokens generated, the stop token included
    stop: Tensor  # int64 [B]: EOS | STOP | BUDGET
    routes: Tensor | None = None  # int16 [B, T', L_moe, K_r], experts of [prompt | answer | pad], if recorded


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), elementwise on int64."""

    def shift(x: Tensor, bits: int) -> Tensor:  # logical; >> on int64 is arithmetic
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ shift(x, 31)


def uniform(seed: int, rows: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for every (seed, row, position), independent of the batch.

    rows, positions: int64, broadcast against each other; returns fp64 of their common shape with 53 random bits (on a
    device without fp64: fp32 with 24).
    """
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    key = _mix(torch.full((), (seed + 1) * 0x9E3779B9 % 2**63, dtype=torch.int64, device=rows.device))
    bits = _mix(_mix(_mix(key + rows * golden) + positions) + golden)
    dtype = widest(rows.device)
    digits = 53 if dtype == torch.float64 else 24  # bits of the mantissa
    return ((bits >> (64 - digits)) & (2**digits - 1)).to(dtype) * 2.0**-digits


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set logits outside the k best, and outside the smallest set whose mass reaches p, to -inf. logits: fp32 [B, V].

    Tokens equal to the k-th best stay, and always the best. A mass reaches p up to rounding, as .5 + .3 reaches 0.8.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    return nucleus(logits, top_p) if top_p < 1.0 else logits


def nucleus(logits: Tensor, top_p: float | Tensor) -> Tensor:
    """The part of `truncate` that cuts at a mass p below 1: the smallest set V^(p) of tokens with
    Σ_{v in V^(p)} p_v >= p remains (arXiv:1904.09751, section 3.1). top_p: one number, or one of each row, fp64 [B, 1].
    """
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = ranked.softmax(-1, dtype=widest(ranked.device))  # an fp32 sum of many small numbers is off by 1e-5
    before = probs.cumsum(-1) - probs  # the mass of the better tokens, by rank
    outside = before >= top_p * (1 - 1e-6)  # as exact as probabilities of fp32 logits are
    outside[:, 0] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))


def draw(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invert the cumulative distribution at `noise` u; -inf logits are never drawn.

        x = min {v : F(v) > u},    F(v) = Σ_{v' <= v} p_v'

    logits: fp32 or fp64 [B, V]; noise: [B] in [0, 1), from `uniform`. Returns tokens int64 [B], and their logp [B] and
    the entropy [B] in the logits' dtype. Where a row has a NaN or +inf, or only -inf, its logp is NaN.
    """
    logp = logits.log_softmax(-1)
    p = logp.exp()
    cumulative = p.cumsum(-1, dtype=widest(p.device))
    tokens = torch.searchsorted(cumulative, (noise * cumulative[:, -1]).unsqueeze(1), right=True)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    entropy = -(p * logp.nan_to_num(neginf=0.0)).sum(-1)
    return tokens.squeeze(1), logp.gather(-1, tokens).squeeze(1), entropy


def choose(logits: Tensor, noise: Tensor, temperature: float, top_k: int, top_p: float):
    """Draw at a temperature, or take the best token when it is 0 (then logp and entropy are those at temperature 1)."""
    if temperature == 0:
        logp = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
        entropy = -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)
        return tokens, logp.gather(-1, tokens.unsqueeze(1)).squeeze(1), entropy
    return draw(truncate(logits / temperature, top_k, top_p), noise)


def bucket(running: int, device: torch.device) -> int:
    """The batch size for that many running rows: the same number; on CUDA, where each size may need its own kernels,
    the next of 1, 2, 3, 4, 6, 8, 12, 16 … (2^n and 3·2^n)."""
    return BUCKETS[bisect_left(BUCKETS, running)] if device.type == "cuda" else running


def rows_to_keep(ended: Tensor) -> list[int]:
    """Rows of the next batch, in order: the running ones and, on CUDA, ended ones up to a bucket; [] if all have ended.

    Running rows from the end move to the indices of ended ones, the others stay. ended: bool [B]. Waits for the device.
    """
    flags = ended.tolist()
    running = flags.count(False)
    size = min(len(flags), bucket(running, ended.device)) if running else 0
    spare = [row for row in range(size, len(flags)) if not flags[row]]
    return [spare.pop() if flags[row] and spare else row for row in range(size)]


def check(
    model, prompts, answers, max_tokens, temperature, top_k, top_p, min_tokens, stop, seed, rows=None, check_every=8
) -> tuple[list[int], Tensor]:
    """The stop tokens as a list, and the row ids int64 [B]; ValueError as for `generate`."""
    integers = {"answers": (answers, 1), "max_tokens": (max_tokens, 1), "check_every": (check_every, 1)}
    integers |= {"top_k": (top_k, 0), "min_tokens": (min_tokens, 0), "seed": (seed, 0)}
    for name, (value, low) in integers.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value < 2**63:
            raise ValueError(f"{name} = {value!r}: an integer of at least {low}, below 2^63")
    if temperature != 0 and not 1e-6 <= temperature < float("inf"):  # below, logits / temperature may overflow
        raise ValueError(f"temperature = {temperature}: 0 (greedy), or finite and at least 1e-6")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: above 0, at most 1")
    if len(prompts) == 0 or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: need at least one, each of at least one token")
    stop, vocab = [stop] if isinstance(stop, Integral) else list(stop), model.config.vocab
    used = {*stop}.union(*prompts)
    if wrong := [token for token in used if not isinstance(token, Integral) or not 0 <= token < vocab]:
        raise ValueError(f"token {min(wrong, key=repr)!r}: the model's vocabulary is 0 to {vocab - 1}, integers")
    if min_tokens and len({*stop}) == vocab:
        raise ValueError(f"min_tokens = {min_tokens}: must be 0 where all {vocab} tokens of the vocabulary are stops")
    count = len(prompts) * answers
    rows = torch.arange(count, device=model.device) if rows is None else rows.to(model.device)
    if rows.shape != (count,) or rows.dtype != torch.int64:
        raise ValueError(f"rows {rows.dtype} {tuple(rows.shape)}: must be int64 [{count}], an id for each row")
    return stop, rows


def check_drawn(logp: Tensor, answers: int, first: int = 0) -> None:
    """ValueError naming the row if logp [B, T], of tokens from `first` on, is NaN: see `draw`. Waits for the device."""
    if logp.isnan().any():
        row, step = logp.isnan().nonzero()[0].tolist()
        where = f"row {row}, an answer to prompt {row // answers}: the logits of its token {first + step}"
        raise ValueError(f"{where} hold NaN or +inf, or only -inf: none can be drawn, the weights may be damaged")


def prefilled(model: Transformer, matrix: Tensor, prompts, answers: int, max_tokens: int, record_routes: bool):
    """One prefill per prompt, whose cache is then repeated `answers` times with max_tokens free slots after it.

    matrix: `model.head_matrix()`. Returns the logits of the first token fp32 [B, V], the cache, and routes int16
    [B, T + max_tokens, L_moe, K_r] with -1 where there is no token yet, or None.
    """
    grid, lengths = pad_rows(prompts, model.device)
    prompt_cache, routes = model.cache(*grid.shape), None
    if record_routes:
        size = model.config.moe_layers, model.config.experts_per_token
        if size[0] == 0:
            raise ValueError("record_routes: a dense model has no routes")
        routes = torch.empty(*grid.shape, *size, dtype=torch.int16, device=model.device)
    last = model.prefill(grid, lengths=lengths, cache=prompt_cache, chunk=PREFILL_CHUNK, routes_to=routes)
    cache = prompt_cache.repeat(answers, grid.shape[1] + max_tokens)
    if record_routes:
        routes = F.pad(routes.repeat_interleave(answers, dim=0), (0, 0, 0, 0, 0, max_tokens), value=-1)
    return model.logits(last, matrix).repeat_interleave(answers, dim=0), cache, routes


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    answers: int = 1,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_tokens: int = 0,
    stop: int | Sequence[int] = (),
    seed: int = 0,
    rows: Tensor | None = None,
    check_every: int = 8,
    record_routes: bool = False,
) -> Sampled:
    """Sample `answers` continuations of each of P prompts, B = P·answers rows, those of a prompt adjacent.

    stop: tokens that end a row, the first of them the EOS; none is drawn among the first min_tokens. A row's noise
    depends on (seed, its id in `rows` (int64 [B], default 0 … B-1), position) alone. temperature 0 is greedy.
    With record_routes the experts of each token are recorded, those of a prompt for each of its answers. The last token
    of an answer never enters the model: its route is -1, like that of padding.

    Every `check_every` steps finished rows are dropped (see `bucket`). Only there the host waits for the device, except
    inside kernels: torch's grouped product waits on CUDA unless the experts are in bfloat16, and experts in fp64 run
    one by one.
    ValueError on empty prompts, unknown tokens, settings out of range, and routes of a dense model; at the end also for
    a row whose logits held NaN or +inf, or only -inf: such a row ends at once.
    """
    truncation = temperature, top_k, top_p, min_tokens
    stop, rows = check(model, prompts, answers, max_tokens, *truncation, stop, seed, rows, check_every)
    device, count, matrix = model.device, len(rows), model.head_matrix()
    logits, cache, routes = prefilled(model, matrix, prompts, answers, max_tokens, record_routes)

    tokens = torch.zeros(count, max_tokens, dtype=torch.int64, device=device)
    logp, entropy = (torch.zeros(count, max_tokens, dtype=logits.dtype, device=device) for _ in range(2))
    ended = torch.full((count,), max_tokens, device=device)  # length of the answers that have ended
    why = torch.full((count,), BUDGET, device=device)
    stops = torch.tensor(stop, dtype=torch.int64, device=device)
    alive = torch.arange(count, device=device)  # the rows that are still in the batch
    begin = cache.length
    new = None  # the token that each row of the batch has drawn last, int64 [B']

    for start in range(0, max_tokens, check_every):
        end = min(start + check_every, max_tokens)
        order = torch.arange(start, end, device=device)
        noise = uniform(seed, rows[alive].unsqueeze(1), begin[alive].unsqueeze(1) + order)
        drawn = []
        for step in range(start, end):
            if step > 0:
                record = [] if record_routes else None
                hidden = model.hidden(new.unsqueeze(1), cache=cache, record=record)
                logits = model.logits(hidden[:, 0], matrix)
                if record_routes:
                    routes[alive, cache.length - 1] = routes_of(record)
            if step < min_tokens:
                logits[:, stops] = float("-inf")
            drawn.append(choose(logits, noise[:, step - start], temperature, top_k, top_p))
            new = drawn[-1][0]

        grids = [torch.stack(part, dim=1) for part in zip(*drawn)]  # tokens, log-probs, entropies, [B', end - start]
        hit = grids[0].unsqueeze(-1) == stops
        stopped = hit.any(-1) | grids[1].isnan()
        valid = (stopped.cumsum(1) - stopped.long() == 0) & (ended[alive] > start).unsqueeze(1)  # up to the stop token
        for whole, part in zip((tokens, logp, entropy), grids):
            whole[alive, start:end] = torch.where(valid, part, 0)
        final = stopped & valid
        ended[alive] = torch.where(final.any(1), start + valid.sum(1), ended[alive])
        reason = torch.where((final & hit[..., :1].any(-1)).any(1), EOS, STOP)
        why[alive] = torch.where(final.any(1), reason, why[alive])

        keep = rows_to_keep(ended[alive] <= end) if end < max_tokens else []
        if not keep:
            break
        if len(keep) < len(alive):
            cache.keep(keep)
            alive, new = alive[keep], new[keep]
    if record_routes:  # the last token of an answer has not entered the model
        columns = torch.arange(routes.shape[1], device=device)
        routes.masked_fill_((columns >= (begin + ended - 1).unsqueeze(1))[..., None, None], -1)
    check_drawn(logp, answers)
    longest = int(ended.max())
    return Sampled(tokens[:, :longest], logp[:, :longest], entropy[:, :longest], ended, why, routes)


@torch.no_grad()
def stream(
    model: Transformer,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_tokens: int = 0,
    stop: int | Sequence[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Yield the tokens of an answer as they are drawn, the stop token included: row 0 of `generate`, and its errors."""
    stop, row = check(model, [prompt], 1, max_tokens, temperature, top_k, top_p, min_tokens, stop, seed)
    cache, matrix = model.cache(1, len(prompt) + max_tokens), model.head_matrix()
    hidden = model.prefill(torch.tensor([prompt], device=model.device), cache=cache, chunk=PREFILL_CHUNK)
    for step in range(max_tokens):
        logits = model.logits(hidden, matrix)
        if step < min_tokens:
            logits[:, stop] = float("-inf")
        token, logp, _ = choose(logits, uniform(seed, row, cache.length), temperature, top_k, top_p)
        check_drawn(logp.unsqueeze(1), 1, step)
        yield (number := int(token))
        if number in stop or step + 1 == max_tokens:
            return
        hidden = model.hidden(token.unsqueeze(1), cache=cache)[:, 0]
