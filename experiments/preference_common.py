"""What the scripts that learn from comparisons do beside their objective: read pairs, batch them, watch, resume.

Each function takes the script's own `Config` and reads the fields that both have: pairs, held_out, longest, steps,
batch, lr, warmup, eval_every, label_smoothing, microbatch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minir1 import checkpoint
from minir1.data import by_tokens, pad_rows
from minir1.metrics import bootstrap
from minir1.preference import agreement
from minir1.preference_data import Rows, load
from minir1.tokenizer import Tokenizer


def check(config) -> None:
    """ValueError for settings with which neither script can run, naming the field, its value and what is allowed."""
    for name in ("steps", "batch", "eval_every", "longest", "microbatch"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)}: at least 1")
    if not 0 <= config.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {config.label_smoothing}: 0 to below 0.5")


def load_pairs(config, tokenizer: Tokenizer) -> tuple[list[Rows], list[Rows]]:
    """Training and held-out pairs as tokens; says what was left out."""
    found = []
    for path in (config.pairs, config.held_out):
        rows, left_out = load(path, tokenizer, config.longest)
        print(f"{path}: {len(rows):,} pairs" + (f", {len(left_out):,} left out ({left_out[0]})" if left_out else ""))
        found.append(rows)
    return found[0], found[1]


def padded(pairs: list[Rows]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens int64 [2N, T], the chosen rows before the rejected ones; lengths int64 [2N]; the answers, bool [2N, T]."""
    tokens, lengths = pad_rows([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    begin = torch.tensor([pair.prompt_len for pair in pairs]).repeat(2).unsqueeze(1)
    columns = torch.arange(tokens.shape[1])
    return tokens, lengths, (columns >= begin) & (columns < lengths.unsqueeze(1))


def in_parts(
    pairs: list[Rows], budget: int, score: Callable[[list[Rows]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`score` of micro-batches of at most `budget` tokens, put together: each [N] in the order of the pairs."""
    parts = by_tokens([2 * pair.longest for pair in pairs], budget)
    found = [score([pairs[i] for i in part]) for part in parts]
    place = torch.tensor([i for part in parts for i in part]).argsort()
    return {name: torch.cat([one[name].detach() for one in found])[place] for name in found[0]}


def by_prompt(values: Tensor, pairs: list[Rows]) -> list[float]:
    """The mean of each prompt's pairs, the independent draws that an interval needs. values: [N], a pair each."""
    groups = defaultdict(list)
    for pair, value in zip(pairs, values.tolist()):
        groups[tuple(pair.chosen[: pair.prompt_len])].append(value)
    return [sum(group) / len(group) for group in groups.values()]


def accuracy(chosen: Tensor, rejected: Tensor, pairs: list[Rows]) -> dict[str, float]:
    """How often the chosen answer has the higher reward, a prompt at a time, with its bootstrap interval."""
    values = bootstrap(by_prompt(agreement(chosen, rejected), pairs))
    return dict(zip(("accuracy", "accuracy_low", "accuracy_high"), values))


def resume(path: Path, steps: int, kept: dict) -> dict:
    """Put what a checkpoint holds beside the weights into place, `kept` by name; returns its state."""
    state = checkpoint.load_state(path)
    if state["steps"] != steps:
        raise ValueError(f"steps = {steps}: the learning rate follows it, so {path} goes on with {state['steps']} only")
    for name, part in kept.items():
        part.load_state_dict(state[name])
    return state
