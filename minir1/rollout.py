"""What was sampled, as the losses need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minir1.data import pad_rows
from minir1.model.transformer import Transformer
from minir1.sample import BUDGET, EOS, STOP, generate

__all__ = ["BUDGET", "EOS", "STOP", "Rollout", "collect", "answers_of"]


@dataclass(frozen=True)
class Rollout:
    """B rows `[prompt | answer | pad]` of at most T tokens. Entry [b, t] speaks of token t; column 0 is not trained."""

    tokens: Tensor  # int64 [B, T]
    prompt_len: Tensor  # int64 [B]
    length: Tensor  # int64 [B], prompt and answer
    mask: Tensor  # bool [B, T], answer tokens, the chosen EOS included
    logp: Tensor  # fp32 [B, T], of the sampler, at `temperature`; 0 outside the mask
    entropy: Tensor  # fp32 [B, T], nats, of the sampler; 0 outside the mask
    stop: Tensor  # int64 [B]: EOS | STOP | BUDGET
    group: Tensor  # int64 [B], index of the row's prompt
    temperature: float
    routes: Tensor | None = None  # experts chosen by the sampler, where recorded

    def select(self, rows: Tensor) -> Rollout:
        """These rows only, cut to their longest. rows: int64 [B']."""
        longest = int(self.length[rows].max())
        grids = {name: getattr(self, name)[rows, :longest] for name in ("tokens", "mask", "logp", "entropy")}
        lists = {name: getattr(self, name)[rows] for name in ("prompt_len", "length", "stop", "group")}
        return replace(self, **grids, **lists)


def answers_of(rollout: Rollout) -> list[list[int]]:
    """The answer tokens of each row, the stop token included."""
    spans = zip(rollout.tokens.tolist(), rollout.prompt_len.tolist(), rollout.length.tolist())
    return [row[start:end] for row, start, end in spans]


def collect(
    model: Transformer,
    prompts: list[list[int]],
    *,
    answers: int,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_tokens: int = 0,
    stop: int | Sequence[int],
    seed: int,
    rows: Tensor | None = None,
) -> Rollout:
    """Sample `answers` answers of at most max_tokens to each prompt; the rows of a prompt are adjacent.

    The arguments are those of `minir1.sample.generate`.
    """
    sampled = generate(
        model,
        prompts,
        answers=answers,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_tokens=min_tokens,
        stop=stop,
        seed=seed,
        rows=rows,
    )
    device = sampled.tokens.device
    group = torch.arange(len(prompts), device=device).repeat_interleave(answers)
    asked, lengths = pad_rows(prompts, device)
    prompt_len = lengths[group]
    length = prompt_len + sampled.count
    columns = torch.arange(int(length.max()), device=device)
    mask = (columns >= prompt_len.unsqueeze(1)) & (columns < length.unsqueeze(1))

    def place(values: Tensor) -> Tensor:
        """Entry t of answer b goes to column prompt_len[b] + t. Both [B, T]."""
        source = (columns - prompt_len.unsqueeze(1)).clamp(0, values.shape[1] - 1)
        return values.gather(1, source).masked_fill(~mask, 0)

    tokens = place(sampled.tokens)
    longest = asked.shape[1]
    tokens[:, :longest] += asked[group] * (columns[:longest] < prompt_len.unsqueeze(1))
    return Rollout(
        tokens, prompt_len, length, mask, place(sampled.logp), place(sampled.entropy), sampled.stop, group, temperature
    )
