"""How many tokens do sampler and trainer send to different experts, and how far does that move the ratios?

    python -m experiments.studies.routes --checkpoint runs/base/checkpoint

The choice of experts is a step function of the router's scores, so that a difference too small to matter anywhere else
can send a token elsewhere. Rollout routing replay (arXiv:2510.11370) lets the trainer use the sampler's experts.
Measured on answers of one policy, with the trainer in fp32, each pair of a token and an MoE layer counted once:

    fp32, 0 updates   the same weights; sampler and trainer differ in how a row is computed, token by token or whole
    bf16, 0 updates   the sampler's weights and arithmetic are rounded to bf16
    fp32, k updates   one step of r1_zero.py with several mini-batches: the sampled answers of the next mini-batch under
                      the policy that k updates on the mini-batches before it have made

The ratios are those of the trained policy to the sampler, with the trainer's own choice and with the replayed one.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from experiments import r1_zero
from experiments.rl_common import act, draw, load_policy, ratio_deviation
from minir1.advantages import group_advantages
from minir1.data import by_tokens
from minir1.files import replace_text
from minir1.judge import judge_rollout
from minir1.log import table
from minir1.metrics import seed_interval
from minir1.model.moe import rerouted, routes_of
from minir1.model.transformer import Transformer
from minir1.rollout import Rollout
from minir1.tasks import countdown


@dataclass(frozen=True)
class Config:
    """The measurement."""

    checkpoint: Path = Path("runs/base/checkpoint")  # an MoE
    seeds: tuple[int, ...] = (0, 1, 2)
    prompts: int = 32  # P
    answers: int = 8  # G
    max_tokens: int = 384
    minibatches: int = 8  # updates in a step
    after: tuple[int, ...] = (1, 3, 7)  # updates, fewer than minibatches
    lr: float = 3e-4
    results: Path = Path("docs/results/routes.json")

    def __post_init__(self):
        if not all(0 < k < self.minibatches for k in self.after):
            raise ValueError(f"after = {self.after}: 1 to minibatches - 1 = {self.minibatches - 1} updates")


@torch.no_grad()
def compare(model: Transformer, rollout: Rollout, microbatch: int = 8192) -> dict[str, float]:
    """Shares of pairs and of tokens that the trainer routes otherwise; mean and largest |r - 1|, free and replayed."""
    pairs = known = tokens = 0
    off = {"free": 0.0, "replayed": 0.0}
    worst = dict(off)
    for rows in by_tokens(rollout.length.tolist(), microbatch):
        batch, record = rollout.select(torch.tensor(rows)), []
        seen = {"lengths": batch.length, "mask": batch.mask, "temperature": batch.temperature}
        logp = {"free": model.logprob(batch.tokens, **seen, record=record)}
        logp["replayed"] = model.logprob(batch.tokens, **seen, routes=batch.routes)
        real = torch.arange(batch.tokens.shape[1]) < batch.length.unsqueeze(1)
        inside = batch.mask[real] & (batch.routes[real] >= 0).all(-1).all(-1)
        changed = rerouted(batch.routes[real], routes_of(record))[inside]
        pairs, tokens, known = pairs + changed.sum(), tokens + changed.any(1).sum(), known + len(changed)
        for way, own in logp.items():
            total, most = ratio_deviation(own, batch.logp, batch.mask)
            off[way], worst[way] = off[way] + total, max(worst[way], most)
    found = {"pairs": pairs.item() / (known * model.config.moe_layers), "tokens": tokens.item() / known}
    trained = rollout.mask.sum().item()
    return found | {f"mean/{way}": off[way] / trained for way in off} | {f"largest/{way}": worst[way] for way in off}


def measure(config: Config, seed: int) -> dict[str, dict[str, float]]:
    """What `compare` finds, by sampler and number of updates since: {"fp32/0": …, "bf16/0": …, "fp32/1": …, …}."""
    settings = {"checkpoint": config.checkpoint, "prompts": config.prompts, "answers": config.answers, "seed": seed}
    settings |= {"max_tokens": config.max_tokens, "lr": config.lr, "kl": 0.0, "minibatches": 1}
    step = r1_zero.Config(**settings, max_ratio_deviation=float("inf"))
    model, tokenizer, _ = load_policy(step)
    problems = draw(step, 1)
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = {"bf16/0": compare(model, act(half, tokenizer, problems, step, 1, record_routes=True))}
    rollout = act(model, tokenizer, problems, step, 1, record_routes=True)
    found["fp32/0"] = compare(model, rollout)
    rewards = r1_zero.judge(judge_rollout(rollout, tokenizer, problems, countdown.verify), step)
    advantage = group_advantages(rewards).flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    parts = torch.arange(len(advantage)).chunk(config.minibatches)
    for done, part in enumerate(parts):
        if done in config.after:
            found[f"fp32/{done}"] = compare(model, rollout.select(part))
        r1_zero.learn(model, None, optimizer, rollout.select(part), advantage[part], step)
    return found


COLUMNS = ["sampler, updates since", "pairs", "tokens", "r off 1, mean", "replayed", "r off 1, largest", "replayed"]


def rows(found: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """A row a sampler and number of updates; shares with 95 % intervals from three seeds on, the largest of all seeds.

    found: seed -> what `measure` returns.
    """
    seeds = list(found.values())

    def share(values: list[float]) -> str:
        mean = f"{sum(values) / len(values):.3%}"
        if len(values) < 3:
            return mean
        _, low, high = seed_interval(values)
        return f"{mean} [{100 * max(low, 0):.3f}, {100 * high:.3f}]"

    lines = []
    for name in sorted(seeds[0], key=lambda name: (int(name.split("/")[1]), name.startswith("bf16"))):
        here = {key: [one[name][key] for one in seeds] for key in seeds[0][name]}
        line = [name.replace("/", ", "), share(here["pairs"]), share(here["tokens"])]
        line += [f"{sum(here[f'mean/{way}']) / len(seeds):.2e}" for way in ("free", "replayed")]
        lines.append(line + [f"{max(here[f'largest/{way}']):.1e}" for way in ("free", "replayed")])
    return lines


def main(config: Config) -> dict:
    """Measure each seed, print the table, write the results."""
    found = {str(seed): measure(config, seed) for seed in config.seeds}
    table(f"{len(found)} seeds, {config.prompts}·{config.answers} answers each", COLUMNS, rows(found))
    config.results.parent.mkdir(parents=True, exist_ok=True)
    replace_text(config.results, json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main(tyro.cli(Config))
