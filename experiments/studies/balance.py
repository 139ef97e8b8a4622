"""Does a moving selection bias balance experts as evenly as an auxiliary loss does, at no cost in loss?

    python -m experiments.studies.balance --seeds 0 1 2

DeepSeek-V3 (section 2.1.2, after arXiv:2408.15664) balances its experts without an auxiliary loss: it lowers the
selection bias of an overloaded expert, without a gradient. A small MoE is pre-trained on a task's corpus in four ways,
with the same data, initial weights and steps:

    none      no balancing
    sequence  α · Σ_i f_i P_i over each document (V3's complementary loss, here alone)
    batch     the same sum over the whole batch, the usual auxiliary loss
    bias      b_i <- b_i + γ·sign(mean load - load_i), once a step

The strengths α and γ of each method are chosen on the first seed (see `choose`); the other seeds run the chosen ones.
Reported losses are those of the language model alone. With --resume finished runs are skipped.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from experiments import pretrain
from experiments.studies import balance_figures
from minir1 import cli, tasks
from minir1.data import pad_rows
from minir1.device import pick
from minir1.files import write_json
from minir1.log import open_run, progress, read_metrics, table
from minir1.losses import nll
from minir1.metrics import over_seeds
from minir1.model.config import ModelConfig
from minir1.model.moe import MoE, balance_step, expert_load, maximal_violation, sequence_balance_loss
from minir1.model.transformer import Transformer
from minir1.optim import adamw, clip_gradients, muon, split_parameters, warmup_stable_decay
from minir1.reduction import token_mean, weighted_sum
from minir1.seed import seed_everything
from minir1.settings import at_least, new_file, new_folder
from minir1.tokenizer import word_level

SHAPE = ModelConfig(
    dim=96, layers=3, heads=3, kv_lora=48, ffn=192, experts=16, experts_per_token=2, shared_experts=1, expert_ffn=48
)
STRENGTHS = {"none": (0.0,), "sequence": (1e-3, 1e-2, 1e-1), "batch": (1e-3, 1e-2, 1e-1), "bias": (1e-3, 3e-3, 1e-2)}
HELD_OUT = 1_000_003  # seed of the evaluation documents; no training uses it


@dataclass(frozen=True)
class Config:
    """The comparison."""

    task: str = "countdown"  # one with a corpus
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 600
    batch: int = 1024  # tokens per step
    model: ModelConfig = field(default_factory=lambda: SHAPE)
    eval_every: int = 100  # steps
    eval_batches: int = 16  # held-out batches
    out: Path = Path("runs/balance")
    resume: bool = False
    device: str = "auto"
    results: Path = Path("docs/results/balance.json")
    figure: Path = Path("docs/results/balance.png")

    def __post_init__(self):
        at_least(self, 1, "steps", "batch", "eval_every", "eval_batches")
        at_least(self, 0, "seeds")
        new_file(self, "results", "figure")
        new_folder(self, "out")


@dataclass(frozen=True)
class Setting:
    """One run."""

    method: str
    strength: float  # α or γ
    seed: int
    base: pretrain.Config
    eval_every: int
    eval_batches: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.strength:g}-{self.seed}"


def setting(config: Config, method: str, strength: float, seed: int) -> Setting:
    """A run of the comparison; learning rates and schedule are those of pretrain.py."""
    shared = {name: getattr(config, name) for name in ("task", "device", "model", "steps", "batch")}
    base = pretrain.Config(seed=seed, **shared)
    return Setting(method, strength, seed, base, config.eval_every, config.eval_batches)


# ---- one run -----------------------------------------------------------------------------------


def forward(model: Transformer, rows: list[list[int]]):
    """The mean negative log-likelihood per token, the rows' lengths [B], and the routing of each MoE layer."""
    tokens, lengths = pad_rows(rows, model.device)
    record = []
    logp = model.logprob(tokens, lengths=lengths, record=record)
    columns = torch.arange(tokens.shape[1], device=model.device)
    mask = (columns > 0) & (columns < lengths.unsqueeze(1))
    return weighted_sum(token_mean(mask, int(mask.sum())), nll(logp)), lengths, record


def auxiliary(method: str, record, lengths) -> torch.Tensor | float:
    """Σ_i f_i P_i summed over layers, for each document or for the whole batch as one; 0 for other methods."""
    spans = {"sequence": lengths, "batch": lengths.sum(0, keepdim=True)}.get(method)
    return 0.0 if spans is None else sum(sequence_balance_loss(routing, spans) for routing in record)


def imbalance(loads, side: str) -> dict[str, float]:
    """MaxVio of the loads of each layer: the mean and the largest."""
    violations = [maximal_violation(load) for load in loads]
    mean = sum(violations) / len(violations)
    return {f"{side}/max_violation": mean, f"{side}/max_violation_worst": max(violations)}


@torch.no_grad()
def measure(model: Transformer, batches: list[list[list[int]]]) -> dict[str, float]:
    """The loss on held-out batches, and how unevenly all of them together use the experts."""
    losses, loads, tokens = 0.0, 0, 0
    for rows in batches:
        loss, lengths, record = forward(model, rows)
        count = int((lengths - 1).sum())
        losses, tokens = losses + loss.item() * count, tokens + count
        loads = loads + torch.stack([expert_load(routing) for routing in record])
    unused = (loads == 0).float().mean().item()
    return {"eval/loss": losses / tokens, "eval/unused": unused} | imbalance(loads, "eval")


def train(run: Setting, out: Path) -> dict[str, float]:
    """One pre-training. Logs every step; returns the last evaluation and means over the last sixth of the steps."""
    base, log = run.base, open_run(out, run, resume=True)
    seed_everything(run.seed)
    task = tasks.load(base.task)
    tokenizer = word_level(*task.vocabulary())
    model = pretrain.build_model(base, tokenizer).to(pick(base.device))
    documents = pretrain.token_batches(replace(base, seed=HELD_OUT), task, tokenizer)
    held_out = list(itertools.islice(documents, run.eval_batches))
    matrices, rest = split_parameters(model)
    optimizers = ((muon(matrices, base.muon_lr), base.muon_lr), (adamw(rest, base.adam_lr), base.adam_lr))
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    log.start()
    began, last = time.perf_counter(), []
    with progress(base.steps, run.name) as advance:
        corpus = itertools.islice(pretrain.token_batches(base, task, tokenizer), base.steps)
        for step, rows in enumerate(corpus, start=1):
            factor = warmup_stable_decay(step - 1, base.steps, base.warmup)
            for optimizer, lr in optimizers:
                optimizer.param_groups[0]["lr"] = lr * factor
            loss, lengths, record = forward(model, rows)
            (loss + run.strength * auxiliary(run.method, record, lengths)).backward()
            clip_gradients(model, base.clip, step)
            for optimizer, _ in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            loads = [expert_load(routing) for routing in record]
            if run.method == "bias":
                for layer, load in zip(layers, loads):
                    balance_step(layer.bias, load, run.strength)
            row = {"train/loss": loss.item()} | imbalance(loads, "train")
            if step % run.eval_every == 0 or step == base.steps:
                row |= measure(model, held_out)
            log.log(step, row)
            last = [*last, row][-max(1, base.steps // 6) :]
            advance()
    means = {key: sum(row[key] for row in last) / len(last) for key in last[-1] if key.startswith("train/")}
    result = {key: value for key, value in last[-1].items() if key.startswith("eval/")} | means
    result |= {"steps": base.steps, "seconds": time.perf_counter() - began}
    log.result(result)
    log.close()
    return result


# ---- the comparison ----------------------------------------------------------------------------


def run(config: Config, method: str, strength: float, seed: int) -> dict[str, float]:
    """Train unless it is done; a killed run starts anew. ValueError if there is a run but no --resume."""
    chosen = setting(config, method, strength, seed)
    out = config.out / chosen.name
    if out.exists() and not config.resume:
        raise ValueError(f"{out} already holds a run: continue with --resume, or choose another --out")
    if not (out / "result.json").exists():
        print(f"running {out}", flush=True)
        return train(chosen, out)
    result = json.loads((out / "result.json").read_text())
    if result["steps"] != config.steps:
        raise ValueError(f"{out} was run for {result['steps']} steps, not {config.steps}: choose another --out")
    return result


def choose(results: dict[float, dict[str, float]]) -> float:
    """The strength with the lowest held-out loss among those with at most 1.25 times the smallest MaxVio.

    results: strength -> result. Each method is thus compared near its best balance.
    """
    most_even = min(result["eval/max_violation"] for result in results.values())
    near = {s: r for s, r in results.items() if r["eval/max_violation"] <= 1.25 * most_even}
    return min(near, key=lambda strength: near[strength]["eval/loss"])


def compare(config: Config) -> dict:
    """Tune on the first seed, run the rest: {"tuning": {method: {strength: result}}, "methods": {method: {"strength",
    "seeds": {seed: result}}}}."""
    first, *others = config.seeds
    tuning = {m: {s: run(config, m, s, first) for s in strengths} for m, strengths in STRENGTHS.items()}
    methods = {}
    for method, results in tuning.items():
        strength = choose(results)
        seeds = {first: results[strength]} | {seed: run(config, method, strength, seed) for seed in others}
        methods[method] = {"strength": strength, "seeds": seeds}
    return {"steps": config.steps, "batch": config.batch, "tuning": tuning, "methods": methods}


def label(method: str, strength: float) -> str:
    """sequence loss, α = 0.01"""
    names = {"none": "no balancing", "sequence": "loss by sequence", "batch": "loss by batch", "bias": "selection bias"}
    return names[method] + (f", {'γ' if method == 'bias' else 'α'} = {strength:g}" if strength else "")


def rows(results: dict) -> list[list[str]]:
    """A row per method: held-out loss, its difference to no balancing (paired by seed), and MaxVio.

    Means, with 95 % intervals from three seeds on. results: from `compare`, or as read from its JSON.
    """
    plain, lines = results["methods"]["none"]["seeds"], []
    for method, one in results["methods"].items():
        runs = one["seeds"]
        costs = [run["eval/loss"] - plain[seed]["eval/loss"] for seed, run in runs.items()]
        line = [label(method, one["strength"]), over_seeds([run["eval/loss"] for run in runs.values()], ".4f")]
        line.append("-" if method == "none" else over_seeds(costs, "+.4f"))
        for key in ("eval/max_violation", "eval/max_violation_worst", "train/max_violation"):
            line.append(over_seeds([run[key] for run in runs.values()], ".2f", least=0.0))
        lines.append(line)
    return lines


COLUMNS = ["", "held-out loss, nats", "cost", "MaxVio", "of the worst layer", "of a batch"]
TUNING = ["", "held-out loss, nats", "MaxVio", "of the worst layer"]


def tuning_rows(results: dict) -> list[list[str]]:
    """A row per setting of the tuning on the first seed."""
    keys = (("eval/loss", 4), ("eval/max_violation", 2), ("eval/max_violation_worst", 2))
    return [
        [label(method, float(strength)), *(f"{run[key]:.{digits}f}" for key, digits in keys)]
        for method, runs in results["tuning"].items()
        for strength, run in runs.items()
    ]


def main(config: Config) -> dict:
    """Run what is missing, print the tables, write the results and the figure."""
    results = compare(config)
    table(f"strengths, seed {config.seeds[0]}", TUNING, tuning_rows(results))
    table(f"{len(config.seeds)} seeds, {config.steps} steps of {config.batch} tokens", COLUMNS, rows(results))
    write_json(config.results, results)
    curves = {}
    for method, one in results["methods"].items():
        names = [setting(config, method, one["strength"], seed).name for seed in one["seeds"]]
        curves[label(method, one["strength"])] = [read_metrics(config.out / name) for name in names]
    balance_figures.balance(curves, config.figure)
    return json.loads(config.results.read_text())


if __name__ == "__main__":
    cli.run(main, Config)
