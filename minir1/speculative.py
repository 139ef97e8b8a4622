"""Self-speculative decoding: the MTP modules draft, one pass of the model verifies; the distribution is the model's.

After Leviathan et al. (arXiv:2211.17192, section 2.3) and Chen et al. (arXiv:2302.01318, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minir1.data import pad_rows
from minir1.model.cache import Cache
from minir1.model.packing import packing
from minir1.model.transformer import Transformer
from minir1.sample import BUDGET, EOS, STOP, Sampled, check, check_drawn, draw, rows_to_keep, truncate, uniform

DRAFT, ACCEPT, REDRAW = 0, 1, 2  # uses of the three random numbers of a position


@dataclass(frozen=True)
class Drafts:
    """Counts of the drafts for B rows by D modules. A draft after a rejected one is not tried."""

    tried: Tensor  # int64 [B, D]
    accepted: Tensor  # int64 [B, D]
    forwards: Tensor  # int64 [B], passes of the model after the prompt

    @property
    def rate(self) -> float:
        """Accepted drafts / tried ones; 0 if none was tried."""
        return self.accepted.sum().item() / max(1, self.tried.sum().item())


# ---- one step of the algorithm: from p, q and a draft to an exact sample of p -------------------


def accept_probability(p_x: Tensor, q_x: Tensor) -> Tensor:
    """min(1, p(x) / q(x)), elementwise, for x drawn from q."""
    return (p_x / q_x).clamp(max=1.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The distribution after a rejection: (p - q)₊ / Σ (p - q)₊, which is p itself if q is 0. p, q: [..., V].

    Σ_x q(x) · [accept(x) δ_x + (1 - accept(x)) residual] = p, whatever q is.
    """
    excess = (p - q).clamp(min=0.0)
    mass = excess.sum(-1, keepdim=True)
    return torch.where(mass > 0, excess / mass, p)  # no mass: p = q, only rounding rejects


def judge(p: Tensor, q: Tensor, drafts: Tensor, accept_noise: Tensor, draw_noise: Tensor) -> tuple[Tensor, Tensor]:
    """How many of n drafts are accepted, one after the other, and the token after them.

    p: [B, n + 1, V], the model's distributions; q: [B, n, V], those that drafts, int64 [B, n], were drawn from; noise
    in [0, 1): [B, n] and [B, n + 1]. Returns int64 [B] twice: accepted, and a token from the residual of the first
    rejected draft, or from p after the last draft.
    """
    index = drafts.unsqueeze(-1)
    p_x, q_x = p[:, :-1].gather(-1, index).squeeze(-1), q.gather(-1, index).squeeze(-1)
    accepted = (accept_noise < accept_probability(p_x, q_x)).long().cumprod(1).sum(1)
    row = torch.arange(len(p), device=p.device)
    next_p = residual(p[row, accepted], F.pad(q, (0, 0, 0, 1))[row, accepted])  # q = 0 after the last draft
    return accepted, draw(next_p.log(), draw_noise[row, accepted])[0]


@dataclass(frozen=True)
class Rule:
    """Temperature, truncation and minimum length: from logits to the sampled distribution, for model and drafts."""

    temperature: float
    top_k: int
    top_p: float
    min_tokens: int
    stop: Tensor  # int64 [S]

    def __call__(self, logits: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """logits: fp32 [B, n, V]; step: int64 [B, n], tokens of the answer so far -> log-probs to report, p; [B, n, V].

        At temperature 0, p is 1 at the best token and the log-probs are those at temperature 1, as in `generate`.
        """
        if self.min_tokens and len(self.stop):
            closed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            closed = closed.index_fill(0, self.stop, True) & (step < self.min_tokens).unsqueeze(-1)
            logits = logits.masked_fill(closed, float("-inf"))
        if self.temperature == 0:
            return logits.log_softmax(-1), F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        z = truncate(logits.flatten(0, 1) / self.temperature, self.top_k, self.top_p)
        logp = z.log_softmax(-1).view_as(logits)
        return logp, logp.exp()


@dataclass
class State:
    """Where the modules continue: B rows had n tokens before the last pass, which gave `taken` more."""

    hidden: Tensor  # [B, D + 1, dim], h^0 from position n - 1; not used after the accepted tokens
    ahead: Tensor  # int64 [B, 2D + 1], the tokens from position n: the taken ones, then the drafts
    taken: Tensor  # int64 [B], 1 to D + 1
    carry: list[Tensor]  # for module k = 2 … D: h^{k-1} at position n - k, [B, 1, dim]

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in place."""
        self.hidden, self.ahead, self.taken = self.hidden[rows], self.ahead[rows], self.taken[rows]
        self.carry = [x[rows] for x in self.carry]


def prefill(model: Transformer, tokens: Tensor, lengths: Tensor, cache: Cache) -> list[Tensor]:
    """Prompts through the blocks and the modules, into an empty cache.

    tokens: int64 [B, T]; lengths: int64 [B]. Returns for k = 0 … D - 1 the last state h^k of the prompt, at position
    lengths - 1 - k, each [B, 1, dim]; zeros for prompts that are too short.
    """
    layout = packing(*tokens.shape, lengths, tokens.device)
    grid = model.hidden(tokens, lengths=lengths, cache=cache)
    row = torch.arange(len(tokens), device=tokens.device)
    last = [grid[row, lengths - 1].unsqueeze(1)]
    hidden = layout.pack(grid)
    for k, (index, state) in enumerate(model.look_ahead(layout.pack(tokens), hidden, layout, cache), start=1):
        grid = layout.pad(torch.zeros_like(hidden).index_copy(0, index, state))
        last.append(grid[row, (lengths - 1 - k).clamp(min=0)].unsqueeze(1) * (lengths > k).view(-1, 1, 1))
    return last[:-1]


def draft(
    model: Transformer, matrix: Tensor, state: State, cache: Cache, rule: Rule, step: Tensor, noise: Tensor
) -> Tensor:
    """Draft one token with each module, into state.ahead after the taken ones. Returns q: fp32 [B, D, V].

    The cache entry of module k at position i depends on t_{i+k}, so with n tokens before the last pass, the entries
    below n - k are final. The module continues there, over the taken tokens and k - 1 drafts; the next call overwrites
    the entries of drafts.

    matrix: `model.head_matrix()`; step: int64 [B], tokens of the answer so far; noise: fp64 [B, D]. The cache holds all
    tokens but the last.
    """
    depth, row = len(model.mtp), torch.arange(len(step), device=step.device)
    start = cache.length + 1 - state.taken  # n
    out, carry, q = state.hidden, [], []
    for k, module in enumerate(model.mtp, start=1):
        if k > 1:
            carry.append(out[row, state.taken - 1].unsqueeze(1))  # final: depends on no draft
            out = torch.cat((state.carry[k - 2], out), dim=1)
        # For a prompt shorter than k tokens the first positions are negative: they wrap to unused slots at the end.
        positions = ((start - k).unsqueeze(1) + torch.arange(depth + k, device=step.device)) % cache.slots
        embedded = model.embed(state.ahead[:, : depth + k])
        out = module.decode(embedded, out, model.freqs_cis(positions), cache, positions, cache.bias(positions))
        logits = model.logits(out[row, state.taken + k - 2], matrix)
        _, q_k = rule(logits.unsqueeze(1), (step + k - 1).unsqueeze(1))
        token, _, _ = draw(q_k[:, 0].log(), noise[:, k - 1])
        state.ahead[row, state.taken + k - 1] = token
        q.append(q_k)
    state.carry = carry
    return torch.cat(q, dim=1)


class Answers:
    """The answers of B rows so far, with extra columns for drafts that exceed the budget."""

    def __init__(self, rows: int, max_tokens: int, depth: int, stop: Tensor, dtype: torch.dtype):
        device = stop.device
        self.max_tokens, self.stop = max_tokens, stop
        self.tokens = torch.zeros(rows, max_tokens + depth + 1, dtype=torch.int64, device=device)
        self.logp, self.entropy = (torch.zeros(self.tokens.shape, dtype=dtype, device=device) for _ in range(2))
        self.count, self.forwards = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.why = torch.full((rows,), BUDGET, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.tried, self.accepted = (torch.zeros(rows, depth, dtype=torch.int64, device=device) for _ in range(2))

    def add(self, alive: Tensor, new: Tensor, accepted: Tensor, logp: Tensor) -> None:
        """Append the first accepted + 1 of new, int64 [B', n + 1], to rows `alive` [B'], up to a stop or the budget.

        logp: [B', n + 1, V], of the distributions that the tokens are drawn from.
        """
        drafts = new.shape[1] - 1
        order = torch.arange(drafts + 1, device=new.device)
        step = self.count[alive].unsqueeze(1) + order
        hit = new.unsqueeze(-1) == self.stop  # [B', n + 1, S]
        drawn = logp.gather(-1, new.unsqueeze(-1)).squeeze(-1)
        stops = (hit.any(-1) | drawn.isnan()).long()
        valid = (order <= accepted.unsqueeze(1)) & (step < self.max_tokens) & (stops.cumsum(1) == stops)
        valid &= ~self.ended[alive].unsqueeze(1)
        index = alive.unsqueeze(1), step
        p_log_p = logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)  # 0 where p is 0
        self.tokens[index] = torch.where(valid, new, 0)
        self.logp[index] = torch.where(valid, drawn, 0.0)
        self.entropy[index] = torch.where(valid, -p_log_p.sum(-1), 0.0)
        self.tried[alive, :drafts] += valid[:, :drafts]
        self.accepted[alive, :drafts] += valid[:, :drafts] & (order[:drafts] < accepted.unsqueeze(1))
        self.forwards[alive] += (valid[:, 0] & (drafts > 0)).long()
        self.count[alive] += valid.sum(1)
        stopped = valid & stops.bool()
        eos = (stopped & hit[..., :1].any(-1)).any(1)
        self.why[alive] = torch.where(stopped.any(1), torch.where(eos, EOS, STOP), self.why[alive])
        self.ended[alive] |= stopped.any(1) | (self.count[alive] >= self.max_tokens)

    def result(self) -> tuple[Sampled, Drafts]:
        """The columns up to the longest answer."""
        longest = int(self.count.max())
        grids = (x[:, :longest] for x in (self.tokens, self.logp, self.entropy))
        return Sampled(*grids, self.count, self.why), Drafts(self.tried, self.accepted, self.forwards)


@torch.no_grad()
def speculate(
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
) -> tuple[Sampled, Drafts]:
    """Sample as `generate` does, in fewer passes of the model: its D modules draft D tokens, which one pass verifies.

    Arguments and errors as for `sample.generate`; ValueError also for a model without MTP modules. The answers have the
    same distribution but not the same tokens, except at temperature 0 (up to ties within rounding). Log-probs and
    entropies are the model's. A row's noise depends on (seed, row, position) alone. The prefill is one chunk.
    """
    truncation = temperature, top_k, top_p, min_tokens
    stop, rows = check(model, prompts, answers, max_tokens, *truncation, stop, seed, rows, check_every)
    if not model.mtp:
        raise ValueError("mtp_depth = 0: the model has no modules to draft with; take sample.generate")
    device, depth, count = model.device, len(model.mtp), len(rows)
    grid, lengths = pad_rows(prompts, device)
    prompt_cache = model.cache(*grid.shape, mtp=True)
    last = [x.repeat_interleave(answers, dim=0) for x in prefill(model, grid, lengths, prompt_cache)]
    # Extra slots: for drafts of a row at its budget, and because `used` overestimates between two calls of `trim`.
    cache = prompt_cache.repeat(answers, grid.shape[1] + max_tokens + (min(check_every, max_tokens) + 2) * (depth + 1))
    begin = cache.length
    matrix, hidden, carry = model.head_matrix(), last[0], last[1:]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    answered = Answers(count, max_tokens, depth, torch.tensor(stop, dtype=torch.int64, device=device), dtype)
    rule = Rule(*truncation, answered.stop)
    alive = torch.arange(count, device=device)  # the rows that are still in the batch
    order = torch.arange(depth + 1, device=device)

    def noise(what: int, width: int) -> Tensor:
        """fp64 [B', width] for the next `width` positions of each row."""
        positions = (begin[alive] + answered.count[alive]).unsqueeze(1) + order[:width]
        return uniform(seed, rows[alive].unsqueeze(1), 3 * positions + what)

    drafts = torch.zeros(count, 0, dtype=torch.int64, device=device)  # the first token has no draft
    q = torch.zeros(count, 0, model.config.vocab, dtype=dtype, device=device)
    for turn in range(max_tokens):
        width = hidden.shape[1]
        logp, p = rule(model.logits(hidden, matrix), answered.count[alive].unsqueeze(1) + order[:width])
        accepted, token = judge(p, q, drafts, noise(ACCEPT, width - 1), noise(REDRAW, width))
        new = F.pad(drafts, (0, 1)).scatter(1, accepted.unsqueeze(1), token.unsqueeze(1))
        running = ~answered.ended[alive]
        answered.add(alive, new, accepted, logp)
        if turn > 0:
            cache.rewind(torch.where(running, depth - accepted, depth + 1))
        if turn + 1 == max_tokens:
            break
        hidden, ahead = F.pad(hidden, (0, 0, 0, depth + 1 - width)), F.pad(new, (0, 2 * depth + 1 - width))
        state = State(hidden, ahead, accepted + 1, carry)
        if (turn + 1) % check_every == 0:
            keep = rows_to_keep(answered.ended[alive])
            if len(keep) == 0:
                break
            if len(keep) < len(alive):
                cache.keep(keep)
                state.keep(keep)
                alive = alive[keep]
            cache.trim()
        q = draft(model, matrix, state, cache, rule, answered.count[alive], noise(DRAFT, depth))
        window = state.ahead.gather(1, (state.taken - 1).unsqueeze(1) + order)  # the last token taken, and the drafts
        drafts, carry = window[:, 1:], state.carry
        hidden = model.hidden(window, cache=cache)
    check_drawn(answered.logp, answers)
    return answered.result()
