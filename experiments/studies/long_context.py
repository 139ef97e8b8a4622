"""Does a model trained on short texts retrieve from far away, and what does YaRN change?

    python -m experiments.studies.long_context --out runs/long_context
    python -m experiments.studies.long_context --out runs/long_context-1 --seed 1 \
        --results docs/results/long_context.json

A text is filler with one `key value` pair in each of eight equal parts; at its end the keys are repeated in random
order, and each asks for its value. The model is trained on texts of up to `window` tokens, then measured on texts up to
`factor` times as long: as it is, with its RoPE rescaled (linear, NTK, YaRN; arXiv:2309.00071), and after a short tuning
on long texts, with YaRN and, as the control, without. YaRN is V3's: on the decoupled key, with mscale in the softmax
scale. At last the cost of a decode step at each length is measured for MLA, GQA and MHA.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.studies import long_context_figures as figures
from minir1 import checkpoint, cli, policy
from minir1.device import peak_memory_gib, pick
from minir1.files import read_json, write_json
from minir1.log import open_run, progress_line, steps, table
from minir1.losses import nll
from minir1.model import hf
from minir1.model.config import ModelConfig
from minir1.model.rope import RopeScaling
from minir1.model.transformer import Transformer
from minir1.optim import adamw, clip_gradients, muon, split_parameters, warmup_stable_decay
from minir1.reduction import token_mean, weighted_sum
from minir1.seed import generator, seed_everything
from minir1.settings import above, at_least, new_file, same_steps
from minir1.tokenizer import Tokenizer, word_level

PARTS = 8  # of a text, each with one pair: the depths at which accuracy is measured
WORDS = [f"{first}{vowel}" for first in "bdfgklmnprst" for vowel in "aeiou"]
KEYS, FILLER, VALUES = WORDS[:PARTS], WORDS[PARTS:40], 32  # a value is a number below VALUES
EXTENSIONS = ("none", "linear", "ntk", "yarn")
TUNED = ("none", "yarn")


@dataclass(frozen=True)
class Config:
    """Settings of the experiment; with the defaults it takes some minutes on one core."""

    window: int = 64  # longest text of the first training
    factor: int = 8  # s, the length of the longest measured texts over the window
    dim: int = 64
    layers: int = 2
    steps: int = 400
    tune_steps: int = 60  # on texts of up to factor · window tokens
    batch: int = 3072  # tokens per step
    tune_batch: int = 4096
    muon_lr: float = 0.02
    adam_lr: float = 0.01
    tune_lr: float = 0.2  # learning rates of the tuning, as a share of these two
    warmup: int = 20  # steps
    clip: float = 1.0  # largest norm of the gradient
    rows: int = 64  # texts per length in each measurement
    cost_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)  # tokens in the cache
    seed: int = 0
    out: Path = Path("runs/long_context")
    results: Path | None = None  # a JSON file of the results of all seeds; the figures are drawn beside it
    resume: bool = False
    device: str = "auto"
    microbatch: int = 8192  # most tokens per forward pass; no result depends on it
    checkpoint_every: int = 200  # steps
    wandb: str = "off"

    def __post_init__(self):
        at_least(self, 1, "steps", "tune_steps", "batch", "tune_batch", "microbatch", "checkpoint_every", "rows")
        at_least(self, 1, "dim", "layers", "cost_lengths")
        at_least(self, 0, "muon_lr", "adam_lr", "tune_lr", "warmup", "seed")
        above(self, 0, "clip")
        new_file(self, "results")
        at_least(self, 8 * PARTS, "window")
        at_least(self, 2, "factor")

    @property
    def lengths(self) -> list[int]:
        """The measured lengths: half the window, the window, and its doubles up to factor · window."""
        return [self.window // 2, *(self.window << n for n in range(self.factor.bit_length()))]


# ---- the task ----------------------------------------------------------------------------------


def build_tokenizer() -> Tokenizer:
    """One token per value, key and filler word."""
    return word_level([*KEYS, *FILLER], VALUES - 1)


def texts(tokenizer: Tokenizer, rows: int, length: int, pairs: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts of `length` tokens that end in `pairs` questions and answers, on the CPU.

    Returns tokens int64 [B, T] and part int64 [B, T]: at an answer the part of the text with its pair, 0 … pairs-1,
    elsewhere -1.
    """
    vocabulary = (KEYS, FILLER, [str(n) for n in range(VALUES)])
    keys, filler, values = (torch.tensor([tokenizer.id(word) for word in words]) for words in vocabulary)

    def shuffled(size: int) -> Tensor:
        return torch.rand(rows, size, generator=random).argsort(1)

    body = length - 2 * pairs
    tokens = filler[torch.randint(len(filler), (rows, length), generator=random)]
    key = keys[shuffled(len(keys))[:, :pairs]]
    value = values[torch.randint(VALUES, (rows, pairs), generator=random)]
    bounds = torch.arange(pairs + 1) * (body // 2) // pairs  # of the parts, in slots of two tokens
    within = torch.rand(rows, pairs, generator=random) * bounds.diff()
    position = 2 * (bounds[:-1] + within.long())
    tokens.scatter_(1, position, key).scatter_(1, position + 1, value)
    order = shuffled(pairs)
    tokens[:, body::2], tokens[:, body + 1 :: 2] = key.gather(1, order), value.gather(1, order)
    part = torch.full_like(tokens, -1)
    part[:, body + 1 :: 2] = order
    return tokens, part


def micro_batches(model: Transformer, tokens: Tensor, part: Tensor, config: Config):
    """Micro-batches of tokens and part, on the model's device."""
    rows = max(1, config.microbatch // tokens.shape[1])
    return zip(*(x.to(model.device).split(rows) for x in (tokens, part)))


@torch.no_grad()
def accuracy(model: Transformer, tokenizer: Tokenizer, length: int, config: Config) -> list[float]:
    """The share of right greedy answers in texts of one length, by the part with the pair: [PARTS]."""
    measured = texts(tokenizer, config.rows, length, PARTS, generator(0, length))  # the same for every model
    hits, asked = (torch.zeros(PARTS, device=model.device) for _ in range(2))
    for tokens, part in micro_batches(model, *measured, config):
        answer = part >= 0
        hidden = model.hidden(tokens)[:, :-1][answer[:, 1:]]
        right = model.logits(hidden).argmax(-1) == tokens[answer]
        hits.index_add_(0, part[answer], right.float())
        asked.index_add_(0, part[answer], torch.ones_like(right, dtype=torch.float32))
    return (hits / asked).tolist()


# ---- training ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """One training: the first, or a tuning."""

    name: str
    start: int  # steps of the earlier phases
    steps: int
    longest: int  # tokens of a text
    batch: int  # tokens per step
    rate: float  # factor on the learning rates


def phases(config: Config) -> list[Phase]:
    """The first training, then the tunings, each of which starts from its result."""
    result = [Phase("trained", 0, config.steps, config.window, config.batch, 1.0)]
    for n, name in enumerate(TUNED):
        start, longest = config.steps + n * config.tune_steps, config.factor * config.window
        result.append(Phase(f"{name}_tuned", start, config.tune_steps, longest, config.tune_batch, config.tune_lr))
    return result


def loss_backward(model: Transformer, tokenizer: Tokenizer, phase: Phase, step: int, config: Config) -> float:
    """Accumulate the gradient of the mean negative log-likelihood of an answer, which is returned in nats."""
    random = generator(config.seed, phase.start, step)  # a step's texts depend on nothing else
    length = int(torch.randint(phase.longest // 4, phase.longest + 1, (), generator=random))
    pairs = min(PARTS, length // 4)
    tokens, part = texts(tokenizer, max(1, phase.batch // length), length, pairs, random)
    total, value = int((part >= 0).sum()), 0.0
    for rows, rows_part in micro_batches(model, tokens, part, config):
        mask = rows_part >= 0
        loss = weighted_sum(token_mean(mask, total), nll(model.logprob(rows, mask=mask)))
        loss.backward()
        value += loss.item()
    return value


def train(model: Transformer, tokenizer: Tokenizer, phase: Phase, run, config: Config) -> float:
    """Run one phase, or resume it; returns its seconds."""
    folder = config.out / "checkpoint" / phase.name
    matrices, rest = split_parameters(model)
    parts = {"muon": muon(matrices, config.muon_lr), "adam": adamw(rest, config.adam_lr)}
    state = {"step": 0, "steps": phase.steps, "seconds": 0.0}
    if resumed := checkpoint.resume(folder) if config.resume else None:
        state = policy.restore(resumed, model, parts)
        same_steps(phase.steps, state["steps"])
    began = time.perf_counter() - state["seconds"]
    for step in steps(state["step"], phase.steps, phase.name):
        factor = phase.rate * warmup_stable_decay(step - 1, phase.steps, config.warmup)
        parts["muon"].param_groups[0]["lr"] = config.muon_lr * factor
        parts["adam"].param_groups[0]["lr"] = config.adam_lr * factor
        loss = loss_backward(model, tokenizer, phase, step, config)
        norm = clip_gradients(model, config.clip, step)
        for optimizer in parts.values():
            optimizer.step()
        model.zero_grad(set_to_none=True)
        run.log(phase.start + step, {"train/loss": loss, "train/grad_norm": norm, "train/lr": config.muon_lr * factor})
        if step % 100 == 0 or step == phase.steps:
            progress_line(step, phase.steps, [(phase.name, f"loss {loss:.3f}"), ("grad", f"{norm:.2f}")])
        if step % config.checkpoint_every == 0 or step == phase.steps:
            state = {"step": step, "steps": phase.steps, "seconds": time.perf_counter() - began}
            state |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save(folder, step, lambda path: hf.save(model, tokenizer, path), state)
    return time.perf_counter() - began


def finished(config: Config) -> int:
    """The step of the newest checkpoint, counted over all phases."""
    done = 0
    for phase in phases(config):
        path = checkpoint.latest(config.out / "checkpoint" / phase.name)
        done = phase.start + checkpoint.load_state(path)["step"] if path else done
    return done


def extended(model: Transformer, kind: str, config: Config) -> Transformer:
    """A copy of the model whose RoPE is rescaled to factor · window positions."""
    scaling = RopeScaling()
    if kind != "none":
        mscale = 1.0 if kind == "yarn" else None  # as V3: the softmax scale grows, cos and sin do not
        scaling = RopeScaling(kind, config.factor, config.window, mscale=mscale, mscale_all=mscale)
    copy = Transformer(replace(model.config, rope_scaling=scaling)).to(model.device)
    copy.load_state_dict(model.state_dict())
    return copy


# ---- the cost of length ------------------------------------------------------------------------


@torch.no_grad()
def costs(config: Config, repeats: int = 15) -> dict[str, float]:
    """Milliseconds of a decode step of one row, and MiB of its cache, at each length: the default width, untrained.

    Processor time on the CPU, the shortest of `repeats`, since other programs may be running. The cache is all zeros,
    which take as long as any numbers.
    """
    longest = max(config.cost_lengths)
    shapes = {"mla": {}, "gqa": {"attention": "gqa"}, "mha": {"attention": "gqa", "kv_heads": ModelConfig().heads}}
    result = {}
    for name, shape in shapes.items():
        model = Transformer(ModelConfig(experts=0, max_positions=longest + 1, **shape))
        cache = model.cache(1, longest + 1)
        for length in config.cost_lengths:
            seconds = []
            for _ in range(repeats):
                cache.length.fill_(length)
                cache.used = length
                began = time.process_time()
                model.hidden(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
                seconds.append(time.process_time() - began)
            result[f"decode/{name}/{length}/ms"] = 1000 * min(seconds)
            result[f"cache/{name}/{length}/mib"] = sum(layer[:, :length].nbytes for layer in cache.layers) / 2**20
    return result


# ---- the experiment ----------------------------------------------------------------------------


def main(config: Config) -> dict[str, float]:
    """Train, extend, tune, measure; writes result.json and two figures and returns the result."""
    earlier(config)  # a file that is damaged is refused before the training
    run = open_run(config.out, config, resume=config.resume, wandb=config.wandb)
    seed_everything(config.seed)
    tokenizer = build_tokenizer()
    shape = ModelConfig(
        vocab=-(-tokenizer.size // 16) * 16, dim=config.dim, layers=config.layers, experts=0, ffn=2 * config.dim,
        max_positions=config.factor * config.window, eos=tokenizer.eos, pad=tokenizer.pad,
    )  # fmt: skip
    first, *tunings = phases(config)
    device = pick(config.device)
    model = Transformer(shape).to(device)
    run.start(finished(config) if config.resume else -1)
    seconds = train(model, tokenizer, first, run, config)
    variants = {kind: extended(model, kind, config) for kind in EXTENSIONS}
    for kind, phase in zip(TUNED, tunings):
        variants[phase.name] = extended(model, kind, config)
        seconds += train(variants[phase.name], tokenizer, phase, run, config)

    result: dict[str, float] = {"window": config.window, "factor": config.factor, "seconds/train": seconds}
    for name, variant in variants.items():
        grid = {length: accuracy(variant, tokenizer, length, config) for length in config.lengths}
        result |= {f"{name}/{length}/{part}": share for length, row in grid.items() for part, share in enumerate(row)}
        for side, lengths in sides(config).items():
            result[f"{name}/{side}"] = sum(sum(grid[length]) for length in lengths) / len(lengths) / PARTS
    result |= costs(config) | {"memory/peak_gib": peak_memory_gib(device)}
    report(result, config)
    run.result(result)
    run.close()
    figures.retrieval([result], config.out / "figures" / "retrieval.png")
    figures.costs(result, config.out / "figures" / "costs.png")
    if config.results:
        collect(result, config)
    return result


def sides(config: Config) -> dict[str, list[int]]:
    """The measured lengths within the trained window (its half and itself), and those beyond it."""
    return {"inside": config.lengths[:2], "outside": config.lengths[2:]}


def report(result: dict[str, float], config: Config) -> None:
    """Print the accuracy by variant and length."""
    rows = []
    for name in figures.VARIANTS:
        means = [sum(result[f"{name}/{length}/{part}"] for part in range(PARTS)) / PARTS for length in config.lengths]
        rows.append([name, *(f"{mean:.1%}" for mean in means)])
    title = f"answers right, by tokens of the text; trained on up to {config.window}"
    table(title, ["", *map(str, config.lengths)], rows)


def earlier(config: Config) -> dict[str, dict[str, float]]:
    """The results of all seeds that are done. ValueError if the file holds something else."""
    return read_json(config.results) if config.results and config.results.exists() else {}


def collect(result: dict[str, float], config: Config) -> None:
    """Add the result under its seed to the file of all seeds; draw their mean beside it."""
    path = config.results
    results = dict(sorted((earlier(config) | {str(config.seed): result}).items()))
    write_json(path, results)
    figures.retrieval(list(results.values()), path.with_suffix(".png"))
    figures.costs(result, path.with_name(f"{path.stem}_costs.png"))


if __name__ == "__main__":
    cli.run(main, Config)
