"""Rollout: sampled rows with the masks and log-probs that losses take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minir1.data import pad_rows
from minir1.distributed import exchanged, my_share, world
from minir1.model.shards import gathered
from minir1.model.transformer import Transformer
from minir1.sample import BUDGET, EOS, STOP, generate

__all__ = ["BUDGET", "EOS", "STOP", "Rollout", "answers_of", "collect", "concatenate"]


@dataclass(frozen=True)
class Rollout:
    """B rows `[prompt | answer | pad]` of at most T tokens. Entry [b, t] describes token t; column 0 is not trained."""

    tokens: Tensor  # int64 [B, T]
    prompt_len: Tensor  # int64 [B]
    length: Tensor  # int64 [B], prompt and answer
    mask: Tensor  # bool [B, T], answer tokens, the chosen EOS included
    logp: Tensor  # fp32 [B, T] (fp64 of an fp64 model), of the sampler, at `temperature`; 0 outside the mask
    entropy: Tensor  # fp32 [B, T], nats, of the sampler; 0 outside the mask
    stop: Tensor  # int64 [B]: EOS | STOP | BUDGET
    group: Tensor  # int64 [B], index of the row's prompt
    temperature: float
    routes: Tensor | None = None  # int16 [B, T, L_moe, K_r], the sampler's experts; -1 at the last token and padding

    def select(self, rows: Tensor) -> Rollout:
        """These rows only, without the columns that are padding in all of them. rows: int64 [B'], on any device."""
        rows = rows.to(self.length.device)
        longest = int(self.length[rows].max())
        grids = {name: grid[rows, :longest] for name in GRIDS if (grid := getattr(self, name)) is not None}
        return replace(self, **grids, **{name: getattr(self, name)[rows] for name in LISTS})

    def to(self, device: torch.device | str) -> Rollout:
        """The same on a device."""
        tensors = {name: x for name in (*GRIDS, *LISTS) if (x := getattr(self, name)) is not None}
        return replace(self, **{name: x.to(device) for name, x in tensors.items()})


GRIDS = {"tokens": 0, "mask": False, "logp": 0.0, "entropy": 0.0, "routes": -1}  # [B, T, ...], and the value at padding
LISTS = ("prompt_len", "length", "stop", "group")  # [B]


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """All rows in order, padded to the longest, for example to refill a batch with more groups.

    Groups are renumbered 0, 1, 2 … without gaps, rollout after rollout, within each in the order of their numbers.
    Groups of different rollouts stay separate, even if the prompts are the same. Routes are None unless every rollout
    has them. ValueError for no rollout at all, or different temperatures: those rows come from different policies.
    """
    temperatures = sorted({rollout.temperature for rollout in rollouts})
    if len(temperatures) != 1:
        raise ValueError(f"temperatures {temperatures} of {len(rollouts)} rollouts: expected one, shared by all")
    longest = max(rollout.tokens.shape[1] for rollout in rollouts)

    def stack(name: str) -> Tensor | None:
        parts = [getattr(rollout, name) for rollout in rollouts]
        if any(part is None for part in parts):
            return None
        whole = parts[0].new_full((sum(map(len, parts)), longest, *parts[0].shape[2:]), GRIDS[name])
        for rows, part in zip(whole.split([len(part) for part in parts]), parts):
            rows[:, : part.shape[1]] = part
        return whole

    lists = {name: torch.cat([getattr(rollout, name) for rollout in rollouts]) for name in LISTS}
    # Pairs (rollout, group) in rising order are numbered.
    source = torch.cat([torch.full_like(rollout.group, i) for i, rollout in enumerate(rollouts)])
    lists["group"] = torch.stack((source, lists["group"])).unique(dim=1, return_inverse=True)[1]
    return Rollout(**{name: stack(name) for name in GRIDS}, **lists, temperature=temperatures[0])


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
    record_routes: bool = False,
) -> Rollout:
    """Sample `answers` answers of at most max_tokens to each prompt; arguments as for `minir1.sample.generate`.

    Of several ranks each samples the answers to every W-th prompt, in the order of the prompts' lengths, and all return
    all: the rows of one process, since a row's noise depends on its id alone.
    """
    settings = {"answers": answers, "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k}
    settings |= {"top_p": top_p, "min_tokens": min_tokens, "stop": stop, "seed": seed, "record_routes": record_routes}
    if world() == 1:
        return _collect(model, prompts, rows=rows, **settings)
    P, device = len(prompts), model.device
    ids = (torch.arange(P * answers) if rows is None else rows).view(P, answers)
    order = sorted(range(P), key=lambda p: len(prompts[p]))
    own, part = my_share(order), None
    with gathered(model):  # by all ranks, also one for which no prompt is left
        if own:
            part = _collect(model, [prompts[p] for p in own], rows=ids[own].flatten(), **settings)
    parts = [part for part in exchanged(part and part.to("cpu")) if part is not None]
    block = torch.tensor([p for r in range(world()) for p in order[r :: world()]]).argsort()  # of each prompt's rows
    every = concatenate(parts).select((block.unsqueeze(1) * answers + torch.arange(answers)).flatten())
    return replace(every, group=torch.arange(P).repeat_interleave(answers)).to(device)


def _collect(model: Transformer, prompts: list[list[int]], *, answers: int, **settings) -> Rollout:
    """`collect` on this rank alone."""
    sampled = generate(model, prompts, answers=answers, **settings)
    prompt_rows, prompt_lengths = pad_rows(prompts, sampled.tokens.device)
    group = torch.arange(len(prompts), device=sampled.tokens.device).repeat_interleave(answers)
    prompt_len = prompt_lengths[group]
    length = prompt_len + sampled.count
    columns = torch.arange(int(length.max()), device=length.device)
    after = columns - prompt_len.unsqueeze(1)  # [B, T], index in the answer; negative in the prompt
    mask = (after >= 0) & (columns < length.unsqueeze(1))

    def shifted(values: Tensor) -> Tensor:
        """Entry t of answer b in column prompt_len[b] + t, 0 elsewhere. [B, longest answer] -> [B, T]."""
        return values.gather(1, after.clamp(0, values.shape[1] - 1)).masked_fill(~mask, 0)

    prompt = F.pad(prompt_rows, (0, len(columns) - prompt_rows.shape[1]))[group]
    return Rollout(
        tokens=torch.where(after < 0, prompt, shifted(sampled.tokens)),
        prompt_len=prompt_len,
        length=length,
        mask=mask,
        logp=shifted(sampled.logp),
        entropy=shifted(sampled.entropy),
        stop=sampled.stop,
        group=group,
        temperature=settings["temperature"],
        routes=None if sampled.routes is None else sampled.routes[:, : len(columns)],
    )
