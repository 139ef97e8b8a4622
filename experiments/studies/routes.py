"""How many tokens do sampler and trainer route to different experts, and how much does that change the ratios?

    python -m experiments.studies.routes --checkpoint runs/base/checkpoint

The choice of experts is a step function of the router's scores, so a difference too small to matter elsewhere can
route a token to another expert. With rollout routing replay (arXiv:2510.11370) the trainer uses the sampler's experts.
Measured on the answers of one policy, with the trainer in fp32, counting pairs of a token and an MoE layer:

    fp32, 0 updates   the same weights: the sampler computes a row token by token, the trainer as a whole
    bf16, 0 updates   the sampler's weights and arithmetic are rounded to bf16
    fp32, k updates   within a step of r1_zero.py with several mini-batches: the answers of the next mini-batch, after
                      k updates on earlier mini-batches

The ratios are those of the trained policy to the sampler, with the trainer's own choice and with the replayed one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from experiments import r1_zero
from minir1 import cli, tasks
from minir1.advantages import group_advantages
from minir1.data import by_tokens
from minir1.device import pick
from minir1.files import write_json
from minir1.judge import judge_rollout
from minir1.log import table
from minir1.metrics import over_seeds
from minir1.model.moe import rerouted, routes_of
from minir1.model.transformer import Transformer
from minir1.optim import adamw
from minir1.policy import load_policy
from minir1.rollout import Rollout, collect
from minir1.seed import python_random, stream
from minir1.settings import at_least, new_file
from minir1.templates import TEMPLATES, encode


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    checkpoint: Path = Path("runs/base/checkpoint")  # an MoE
    task: str = "countdown"
    data: str | None = None  # what the task reads
    template: Literal[TEMPLATES] = "chat"
    seeds: tuple[int, ...] = (0, 1, 2)
    prompts: int = 32  # P
    num_generations: int = 8  # G
    max_completion_length: int = 384
    num_minibatches: int = 8  # updates per step
    after: tuple[int, ...] = (1, 3, 7)  # numbers of updates to measure after, below num_minibatches
    learning_rate: float = 3e-4
    device: str = "auto"
    results: Path = Path("docs/results/routes.json")

    def __post_init__(self):
        at_least(self, 1, "prompts", "num_generations", "max_completion_length", "num_minibatches", "after")
        at_least(self, 0, "seeds", "learning_rate")
        new_file(self, "results")
        if not all(0 < k < self.num_minibatches for k in self.after):
            raise ValueError(f"after = {self.after}: 1 to num_minibatches - 1 = {self.num_minibatches - 1} updates")


@torch.no_grad()
def compare(model: Transformer, rollout: Rollout, microbatch: int = 8192) -> dict[str, float]:
    """Shares of pairs and tokens that the trainer routes differently; mean and largest |r - 1|, free and replayed."""
    changed, off = [], {"free": [], "replayed": []}
    for rows in by_tokens(rollout.length.tolist(), microbatch):
        batch, record = rollout.select(torch.tensor(rows, device=rollout.length.device)), []
        settings = {"lengths": batch.length, "mask": batch.mask, "temperature": batch.temperature}
        logp = {"free": model.logprob(batch.tokens, **settings, record=record)}
        logp["replayed"] = model.logprob(batch.tokens, **settings, routes=batch.routes)
        real = torch.arange(batch.tokens.shape[1], device=batch.length.device) < batch.length.unsqueeze(1)
        known = batch.mask[real] & (batch.routes[real] >= 0).all(-1).all(-1)
        changed.append(rerouted(batch.routes[real], routes_of(record))[known])
        for way, own in logp.items():
            off[way].append(((own - batch.logp).exp() - 1).abs()[batch.mask])
    changed, off = torch.cat(changed).float(), {way: torch.cat(parts) for way, parts in off.items()}
    result = {"pairs": changed.mean().item(), "tokens": changed.amax(1).mean().item()}
    result |= {f"mean/{way}": deviation.mean().item() for way, deviation in off.items()}
    return result | {f"largest/{way}": deviation.max().item() for way, deviation in off.items()}


def measure(config: Config, seed: int) -> dict[str, dict[str, float]]:
    """The result of `compare` by sampler and number of updates since: {"fp32/0": …, "bf16/0": …, "fp32/1": …, …}."""
    device, task = pick(config.device), tasks.load(config.task, config.data)
    model, tokenizer, _ = load_policy(config.checkpoint, device, torch.float32)
    train = task.problems("train")
    if config.prompts > len(train):
        raise ValueError(f"prompts = {config.prompts}: the task has {len(train)} training problems")
    problems = python_random(seed, 1).sample(train, config.prompts)
    prompts = encode(tokenizer, problems, config.template)
    sampling = {"answers": config.num_generations, "max_tokens": config.max_completion_length, "stop": tokenizer.stops}
    sampling |= {"seed": stream(seed, 1), "record_routes": True}
    half = copy.deepcopy(model).to(torch.bfloat16)
    results = {"bf16/0": compare(model, collect(half, prompts, **sampling))}
    rollout = collect(model, prompts, **sampling)
    results["fp32/0"] = compare(model, rollout)
    step = r1_zero.Config(max_completion_length=config.max_completion_length, num_minibatches=1, beta=0.0, seed=seed)
    rewards = r1_zero.reward(judge_rollout(rollout, tokenizer, task, problems, config.template), step)
    advantage = group_advantages(rewards).flatten().to(device)
    optimizer = adamw(model.parameters(), config.learning_rate)
    for done, part in enumerate(torch.arange(len(advantage), device=device).chunk(config.num_minibatches)):
        if done in config.after:
            results[f"fp32/{done}"] = compare(model, rollout.select(part))
        r1_zero.learn(model, optimizer, rollout.select(part), advantage[part], None, step, 1)
    return results


COLUMNS = ["sampler, updates since", "pairs", "tokens", "r off 1, mean", "replayed", "r off 1, largest", "replayed"]


def rows(results: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """A row per sampler and number of updates: shares, with 95 % intervals from three seeds on, and ratios.

    results: seed -> the result of `measure`.
    """
    seeds, lines = list(results.values()), []
    for name in sorted(seeds[0], key=lambda name: (int(name.split("/")[1]), name.startswith("bf16"))):
        values = {key: [one[name][key] for one in seeds] for key in seeds[0][name]}
        line = [name.replace("/", ", "), *(over_seeds(values[key], ".3%") for key in ("pairs", "tokens"))]
        line += [f"{sum(values[f'mean/{way}']) / len(seeds):.2e}" for way in ("free", "replayed")]
        lines.append(line + [f"{max(values[f'largest/{way}']):.1e}" for way in ("free", "replayed")])
    return lines


def main(config: Config) -> dict:
    """Measure each seed, print the table, write the results."""
    results = {str(seed): measure(config, seed) for seed in config.seeds}
    title = f"{len(results)} seeds, {config.prompts}·{config.num_generations} answers each"
    table(title, COLUMNS, rows(results))
    write_json(config.results, results)
    return results


if __name__ == "__main__":
    cli.run(main, Config)
