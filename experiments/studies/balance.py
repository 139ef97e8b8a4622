"""Does moving a selection bias keep experts as evenly used as an auxiliary loss does, at no cost in loss?

    python -m experiments.studies.balance --seeds 0 1 2

DeepSeek-V3 (section 2.1.2, after arXiv:2408.15664) balances its experts without an auxiliary loss: an expert that is
used too much has its bias for selection lowered, and no gradient takes part. Compared here, in pre-training of a small
MoE on the Countdown corpus, same data, same initial weights, same steps:

    none      nothing
    sequence  α · Σ_i f_i P_i over each document (V3's complementary loss, here as the only means)
    batch     the same sum over the whole batch, the usual auxiliary loss
    bias      b_i <- b_i + γ·sign(mean load - load_i), once a step

The strengths α and γ are chosen by method on the first seed, `choose` says how; the other seeds run the chosen ones.
Losses are those of the language model alone. A finished run is skipped with --resume.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro

from experiments import pretrain
from experiments.studies import balance_figures
from minir1.data import pad_rows
from minir1.files import replace_text
from minir1.log import open_run, progress, read_metrics, table
from minir1.losses import nll
from minir1.metrics import seed_interval
from minir1.model.config import ModelConfig
from minir1.model.moe import MoE, balance_step, expert_load, maximal_violation, sequence_balance_loss
from minir1.model.transformer import Transformer
from minir1.optim import Muon, clip_gradients, split_parameters, warmup_stable_decay
from minir1.reduction import token_mean
from minir1.seed import seed_everything

SHAPE = ModelConfig(
    dim=96, layers=3, heads=3, kv_lora=48, ffn=192, experts=16, experts_per_token=2, shared_experts=1, expert_ffn=48
)
STRENGTHS = {"none": (0.0,), "sequence": (1e-3, 1e-2, 1e-1), "batch": (1e-3, 1e-2, 1e-1), "bias": (1e-3, 3e-3, 1e-2)}
HELD_OUT = 1_000_003  # seed of the documents for evaluation: no training uses it


@dataclass(frozen=True)
class Config:
    """The comparison."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 600
    batch: int = 1024  # tokens a step
    model: ModelConfig = field(default_factory=lambda: SHAPE)
    eval_every: int = 100  # steps
    eval_batches: int = 16  # held-out batches
    out: Path = Path("runs/balance")
    resume: bool = False
    results: Path = Path("docs/results/balance.json")
    figure: Path = Path("docs/results/balance.png")


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
    base = pretrain.Config(model=config.model, steps=config.steps, batch=config.batch, seed=seed)
    return Setting(method, strength, seed, base, config.eval_every, config.eval_batches)


# ---- one run -----------------------------------------------------------------------------------


def forward(model: Transformer, rows: list[list[int]]):
    """Mean negative log-likelihood of a token, the rows' lengths [B], and the routing of each MoE layer."""
    tokens, lengths = pad_rows(rows)
    record = []
    logp = model.logprob(tokens, lengths=lengths, record=record)
    columns = torch.arange(tokens.shape[1])
    mask = (columns > 0) & (columns < lengths.unsqueeze(1))
    return (token_mean(mask, int(mask.sum())) * nll(logp)).sum(), lengths, record


def auxiliary(method: str, record, lengths) -> torch.Tensor | float:
    """Σ_i f_i P_i summed over layers: a document each, or the whole batch as if it were one; 0 for other methods."""
    spans = {"sequence": lengths, "batch": lengths.sum(0, keepdim=True)}.get(method)
    return 0.0 if spans is None else sum(sequence_balance_loss(routing, spans) for routing in record)


@torch.no_grad()
def measure(model: Transformer, batches: list[list[list[int]]]) -> dict[str, float]:
    """Loss on held-out batches, and how unevenly all of them together use the experts."""
    losses, loads, tokens = 0.0, 0, 0
    for rows in batches:
        loss, lengths, record = forward(model, rows)
        count = int((lengths - 1).sum())
        losses, tokens = losses + loss.item() * count, tokens + count
        loads = loads + torch.stack([expert_load(routing) for routing in record])
    violations = [maximal_violation(load) for load in loads]
    return {
        "eval/loss": losses / tokens,
        "eval/max_violation": sum(violations) / len(violations),
        "eval/max_violation_worst": max(violations),
        "eval/unused": (loads == 0).float().mean().item(),
    }


def train(run: Setting, out: Path) -> dict[str, float]:
    """One pre-training; logs every step, returns the last evaluation and means of the last sixth of the steps."""
    base, log = run.base, open_run(out, run, resume=True)
    log.cut_back(-1)
    seed_everything(run.seed)
    tokenizer = pretrain.build_tokenizer(base.level)
    model = pretrain.build_model(base, tokenizer)
    held_out = list(itertools.islice(pretrain.token_batches(replace(base, seed=HELD_OUT), tokenizer), run.eval_batches))
    matrices, rest = split_parameters(model)
    adam = torch.optim.AdamW(rest, lr=base.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizers = ((Muon(matrices, lr=base.muon_lr), base.muon_lr), (adam, base.adam_lr))
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    began, last = time.perf_counter(), []
    with progress(base.steps, run.name) as bar:
        for step, rows in enumerate(itertools.islice(pretrain.token_batches(base, tokenizer), base.steps), start=1):
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
            violations = [maximal_violation(load) for load in loads]
            row = {"train/loss": loss.item(), "train/max_violation": sum(violations) / len(violations)}
            row["train/max_violation_worst"] = max(violations)
            if step % run.eval_every == 0 or step == base.steps:
                row |= measure(model, held_out)
            log.log(step, row)
            last = [*last, row][-max(1, base.steps // 6) :]
            bar.advance()
    means = {key: sum(row[key] for row in last) / len(last) for key in last[-1] if key.startswith("train/")}
    result = {key: value for key, value in last[-1].items() if key.startswith("eval/")} | means
    result |= {"steps": base.steps, "seconds": time.perf_counter() - began}
    log.result(result)
    return result


# ---- the comparison ----------------------------------------------------------------------------


def run(config: Config, method: str, strength: float, seed: int) -> dict[str, float]:
    """Train unless it is done; a run that was cut short starts anew. ValueError if it is there and may not go on."""
    chosen = setting(config, method, strength, seed)
    out = config.out / chosen.name
    if out.exists() and not config.resume:
        raise ValueError(f"{out} already holds a run: go on with --resume, or choose another --out")
    if not (out / "result.json").exists():
        print(f"running {out}", flush=True)
        return train(chosen, out)
    result = json.loads((out / "result.json").read_text())
    if result["steps"] != config.steps:
        raise ValueError(f"{out} was run for {result['steps']} steps, not {config.steps}: choose another --out")
    return result


def choose(found: dict[float, dict[str, float]]) -> float:
    """The strength with the lowest held-out loss among those nearly as even as the most even one (at most 1.25 times).

    found: strength -> result. So each method is shown where it balances about as well as it can, at its best price.
    """
    evenest = min(result["eval/max_violation"] for result in found.values())
    near = {s: r for s, r in found.items() if r["eval/max_violation"] <= 1.25 * evenest}
    return min(near, key=lambda strength: near[strength]["eval/loss"])


def compare(config: Config) -> dict:
    """Tune on the first seed, run the rest: {"tuning": {method: {strength: result}}, "methods": {method: {"strength",
    "seeds": {seed: result}}}}."""
    first, *others = config.seeds
    tuning = {m: {s: run(config, m, s, first) for s in strengths} for m, strengths in STRENGTHS.items()}
    methods = {}
    for method, found in tuning.items():
        strength = choose(found)
        seeds = {first: found[strength]} | {seed: run(config, method, strength, seed) for seed in others}
        methods[method] = {"strength": strength, "seeds": seeds}
    return {"steps": config.steps, "batch": config.batch, "tuning": tuning, "methods": methods}


def label(method: str, strength: float) -> str:
    """sequence loss, α = 0.01"""
    names = {"none": "no balancing", "sequence": "loss by sequence", "batch": "loss by batch", "bias": "selection bias"}
    return names[method] + (f", {'γ' if method == 'bias' else 'α'} = {strength:g}" if strength else "")


def rows(found: dict) -> list[list[str]]:
    """A row a method: held-out loss, what it costs against no balancing (paired by seed), and MaxVio.

    Means, with 95 % intervals from three seeds on. found: as `compare` returns it, or as read from its JSON.
    """
    plain = found["methods"]["none"]["seeds"]

    def cell(values: list[float], digits: int, sign: str = "", least: float = -math.inf) -> str:
        mean = f"{sum(values) / len(values):{sign}.{digits}f}"
        if len(values) < 3:
            return mean
        _, low, high = seed_interval(values)
        return f"{mean} [{max(low, least):{sign}.{digits}f}, {high:{sign}.{digits}f}]"

    lines = []
    for method, one in found["methods"].items():
        results = one["seeds"]
        costs = [result["eval/loss"] - plain[seed]["eval/loss"] for seed, result in results.items()]
        line = [label(method, one["strength"]), cell([r["eval/loss"] for r in results.values()], 4)]
        line.append("-" if method == "none" else cell(costs, 4, "+"))
        keys = ("eval/max_violation", "eval/max_violation_worst", "train/max_violation")
        lines.append(line + [cell([r[key] for r in results.values()], 2, least=0.0) for key in keys])
    return lines


COLUMNS = ["", "held-out loss, nats", "cost", "MaxVio", "of the worst layer", "of a batch"]
TUNING = ["", "held-out loss, nats", "MaxVio", "of the worst layer"]


def tuning_rows(found: dict) -> list[list[str]]:
    """A row a setting that was tried on the first seed."""
    keys = (("eval/loss", 4), ("eval/max_violation", 2), ("eval/max_violation_worst", 2))
    return [
        [label(method, float(strength)), *(f"{result[key]:.{digits}f}" for key, digits in keys)]
        for method, results in found["tuning"].items()
        for strength, result in results.items()
    ]


def main(config: Config) -> dict:
    """Run what is missing, print the tables, write results and figure."""
    found = compare(config)
    table(f"strengths, seed {config.seeds[0]}", TUNING, tuning_rows(found))
    table(f"{len(config.seeds)} seeds, {config.steps} steps of {config.batch} tokens", COLUMNS, rows(found))
    config.results.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(json.dumps(found))
    replace_text(config.results, json.dumps(found, indent=2) + "\n")
    curves = {}
    for method, one in found["methods"].items():
        names = [setting(config, method, one["strength"], int(seed)).name for seed in one["seeds"]]
        curves[label(method, one["strength"])] = [read_metrics(config.out / name) for name in names]
    balance_figures.balance(curves, config.figure)
    return found


if __name__ == "__main__":
    main(tyro.cli(Config))
