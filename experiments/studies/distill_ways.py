"""Ways to distil a real language model, at equal tokens: texts, whole distributions, on the student's own samples.

    python -m experiments.studies.distill_ways --teacher PATH --jobs 2

The teacher writes texts; a student of half its width, about a quarter of its parameters, starts from random weights and
learns in each way from as many tokens. Ways on policy begin with half of the tokens off policy: the samples of random
weights are no texts. Measured on texts that the teacher wrote with another seed: KL(T‖S), the perplexity of the
student beside the teacher's own; and on texts that the student writes, KL(S‖T).

Tokens are those that a loss is taken at; the seconds of a training include the teacher's part in it, but not the
writing of its texts. Each cell, a way and a seed, has a file in --out: a killed study continues with the same command.
The teacher must have a BOS token, from which it writes.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from experiments import distill, distill_on_policy
from experiments.distill import Example
from experiments.studies import distill_figures
from experiments.studies.processes import same_command
from minir1 import checkpoint, cli
from minir1.chat_data import Document, laid_out
from minir1.data import packed
from minir1.distill import reverse_kl_advantage
from minir1.files import plain, read_json, write_json
from minir1.log import markdown_table, progress, progress_line, table
from minir1.losses import nll
from minir1.metrics import over_seeds, seed_interval
from minir1.model import hf
from minir1.model.divergence import divergence, log_probs, top_log_probs
from minir1.model.transformer import Transformer
from minir1.optim import adamw, clip_gradients, warmup_cosine
from minir1.policy import logprobs
from minir1.rollout import Rollout, collect
from minir1.seed import python_random, seed_everything, stream
from minir1.settings import above, at_least, new_file, new_folder


class Way(NamedTuple):
    """What a student learns from: settings of distill.py, and of distill_on_policy.py for the second half, if any."""

    label: str
    off: dict
    on: dict | None = None


TEXTS, KL = {"ce_weight": 1.0}, {"ce_weight": 0.0}
WAYS = {
    "texts": Way("texts alone", TEXTS),
    "forward": Way("KL(T‖S)", KL),
    "js": Way("Jensen-Shannon", KL | {"beta": 0.5}),
    "reverse": Way("KL(S‖T)", KL | {"beta": 1.0}),
    "warm": Way("KL(T‖S), τ = 2", KL | {"temperature": 2.0}),
    "mixed": Way("½ texts + ½ KL(T‖S)", {"ce_weight": 0.5}),
    "top": Way("KL(T‖S), top 8 stored", KL | {"top_k": 8}),
    "sampled": Way("then on policy, sampled KL(S‖T)", KL, {"beta": None}),
    "exact": Way("then on policy, exact KL(S‖T)", KL, {"beta": 1.0}),
    "own": Way("then on policy, exact KL(T‖S)", KL, {"beta": 0.0}),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings of the study."""

    teacher: Path  # a Hugging Face folder of a pre-trained model
    ways: tuple[str, ...] = tuple(WAYS)
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 600_000  # that each student is trained on
    batch: int = 8  # texts per step
    length: int = 192  # tokens of a text, at most
    held_out: int = 128  # texts that are measured
    learning_rate: float = 4e-3  # AdamW; half of it on policy
    jobs: int = 1  # students at a time, one core each
    out: Path = Path("runs/distill-ways")
    results: Path = Path("docs/results/distill_ways.json")
    figure: Path = Path("docs/results/distill_ways.png")

    def __post_init__(self):
        at_least(self, 1, "tokens", "batch", "length", "held_out", "jobs")
        at_least(self, 0, "seeds")
        above(self, 0, "learning_rate")
        new_file(self, "results", "figure")
        new_folder(self, "out")
        if unknown := set(self.ways) - WAYS.keys():
            raise ValueError(f"ways = {', '.join(sorted(unknown))}: allowed are {', '.join(WAYS)}")


def student_of(teacher: Transformer, seed: int) -> Transformer:
    """A model of the teacher's architecture and half its width, with random weights."""
    seed_everything(seed)
    c = teacher.config
    halves = {"dim": c.dim // 2, "ffn": c.ffn // 2, "heads": max(1, c.heads // 2)}
    if c.kv_heads:
        halves["kv_heads"] = max(1, c.kv_heads // 2)
    return Transformer(replace(c, **halves))


def write_texts(model: Transformer, count: int, config: Config, seed: int) -> Rollout:
    """Texts that a model writes from its BOS token, up to the next one."""
    bos = model.config.bos
    return collect(model, [[bos]], answers=count, max_tokens=config.length - 1, stop=bos, seed=seed)


def examples_of(rollout: Rollout) -> list[Example]:
    """The texts as documents of which all tokens but the first are trained."""
    rows = [row[:length] for row, length in zip(rollout.tokens.tolist(), rollout.length.tolist())]
    return [Example(Document(row, [False, *[True] * (len(row) - 1)], ""), None) for row in rows]


@torch.no_grad()
def with_top(teacher: Transformer, examples: list[Example], k: int) -> list[Example]:
    """The documents with the teacher's k likeliest tokens."""
    result = []
    for example in examples:
        tokens, cu_seqlens, trained = laid_out([example.document])
        states = teacher.states(tokens, cu_seqlens=cu_seqlens, mask=trained)
        result.append(Example(example.document, top_log_probs(teacher, states, k)))
    return result


@torch.no_grad()
def measure(
    student: Transformer, teacher: Transformer, texts: list[Example], beta: float
) -> tuple[float, float, float]:
    """(D_β, cross-entropy of the student, and of the teacher) on texts, in nats per token."""
    sums = torch.zeros(3)
    for rows in packed([len(text.document.tokens) for text in texts], 8192):
        tokens, cu_seqlens, trained = laid_out([texts[i].document for i in rows])
        h_s, h_t = (model.states(tokens, cu_seqlens=cu_seqlens, mask=trained) for model in (student, teacher))
        ce = [nll(log_probs(model, h, tokens[trained])) for model, h in ((student, h_s), (teacher, h_t))]
        sums += torch.stack([x.sum() for x in (divergence(student, h_s, teacher, h_t, beta), *ce)])
    return tuple((sums / distill.trained_tokens(texts)).tolist())


def train(student: Transformer, teacher: Transformer, texts: list[Example], way: Way, config: Config, seed: int) -> int:
    """One pass over the texts, or over half of them and on policy as many tokens. Returns the trained tokens."""
    settings = distill.Config(teacher=None if way.off == TEXTS else config.teacher, **way.off)
    batches = (texts[i : i + config.batch] for i in range(0, len(texts), config.batch))
    on = distill_on_policy.Config(num_minibatches=1, **way.on) if way.on else None
    total = distill.trained_tokens(texts)
    steps, off, trained = math.ceil(len(texts) / config.batch), total / 2 if way.on else total, 0
    optimizer = adamw(student.parameters(), config.learning_rate)
    for step in itertools.count():
        if trained >= total:
            return trained
        rate = config.learning_rate * warmup_cosine(steps * trained / total, steps, 20)
        if trained < off:
            batch = next(batches)
            distill.loss_backward(student, teacher if settings.teacher else None, batch, settings)
            optimizer.param_groups[0]["lr"] = rate
            clip_gradients(student, 1.0, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            trained += distill.trained_tokens(batch)
        else:
            rollout = write_texts(student, config.batch, config, stream(seed, step))
            advantage = torch.zeros_like(rollout.logp)
            if on.beta is None:
                advantage = reverse_kl_advantage(rollout.logp, logprobs(teacher, rollout, 8192))
            optimizer.param_groups[0]["lr"] = rate / 2
            distill_on_policy.learn(student, teacher, optimizer, rollout, advantage, on, step)
            trained += int(rollout.mask.sum())
        if step % 50 == 49:
            progress_line(step + 1, steps, [("way", way.label), ("seed", str(seed))])


def cell(config: Config, name: str, seed: int) -> dict[str, float]:
    """One student, unless its file is there; what it reached."""
    path, way = config.out / f"{name}-{seed}.json", WAYS[name]
    if path.exists():
        return read_json(path)
    torch.set_num_threads(1)
    teacher = hf.load(config.teacher)[0].requires_grad_(False)
    texts, held_out = (torch.load(config.out / f"{part}.pt") for part in ("texts", "held_out"))
    texts, held_out = ([Example(Document(*document), None) for document in part] for part in (texts, held_out))
    python_random(seed).shuffle(texts)
    student, began = student_of(teacher, seed), time.perf_counter()
    if k := way.off.get("top_k"):
        texts = with_top(teacher, texts, k)
    trained = train(student, teacher, texts, way, config, seed)
    seconds = time.perf_counter() - began
    forward, ce, own = measure(student, teacher, held_out, 0.0)
    written = examples_of(write_texts(student, len(held_out), config, stream(seed, 1 << 20)))
    reverse, _, theirs = measure(student, teacher, written, 1.0)
    result = {"forward_kl": forward, "perplexity": math.exp(ce), "teacher_perplexity": math.exp(own)}
    result |= {"reverse_kl": reverse, "teacher_of_student": theirs, "tokens": trained, "seconds": seconds}
    result |= {"parameters": sum(p.numel() for p in student.parameters())}
    write_json(path, result)
    return result


def prepare(config: Config) -> None:
    """Let the teacher write its texts, unless they are there. ValueError if --out is of other settings."""
    free = ("ways", "seeds", "jobs", "out", "results", "figure")
    asked = {name: value for name, value in plain(asdict(config)).items() if name not in free}
    same_command(config.out, json.dumps(asked | {"teacher": checkpoint.digests(config.teacher)}))
    teacher = hf.load(config.teacher)[0].requires_grad_(False)
    if teacher.config.bos is None:
        raise ValueError(f"{config.teacher} has no BOS token to write from")
    config.out.mkdir(parents=True, exist_ok=True)
    for name, seed in (("held_out", 1), ("texts", 2)):
        path = config.out / f"{name}.pt"
        if path.exists():
            continue
        texts, wanted = [], config.tokens if name == "texts" else config.held_out * config.length
        with progress(wanted, f"the teacher writes {name.replace('_', '-')} texts") as advance:
            while distill.trained_tokens(texts) < wanted:
                part = examples_of(write_texts(teacher, 512, config, stream(seed, len(texts))))
                advance(distill.trained_tokens(part))
                texts += part
        texts = texts[: config.held_out] if name == "held_out" else texts
        torch.save([tuple(text.document) for text in texts], path.with_suffix(".unfinished"))
        path.with_suffix(".unfinished").replace(path)


KEYS = (  # key, label, format
    ("forward_kl", "KL(T‖S) on the teacher's texts", ".3f"), ("perplexity", "perplexity on them", ".2f"),
    ("reverse_kl", "KL(S‖T) on the student's texts", ".3f"), ("tokens", "tokens trained", ",.0f"),
    ("seconds", "seconds", ".0f"),
)  # fmt: skip


def page(results: dict[str, list[dict[str, float]]]) -> str:
    """The block of docs/distillation.md."""
    return markdown_table(["", *(label for _, label, _ in KEYS)], rows(results)) + "\n\n" + finding(results)


def rows(results: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """A row per way: label, and over its seeds the mean of each key, of what was reached with its interval, and the
    median of tokens and seconds, which a training that was suspended for a while does not change.
    """

    def cell(runs: list[dict[str, float]], key: str, form: str) -> str:
        values = [run[key] for run in runs]
        return f"{np.median(values):{form}}" if key in ("tokens", "seconds") else over_seeds(values, form, least=0.0)

    return [[WAYS[name].label, *(cell(runs, key, form) for key, _, form in KEYS)] for name, runs in results.items()]


def finding(results: dict[str, list[dict[str, float]]]) -> str:
    """The study in words, from the numbers."""
    any_run = next(iter(results.values()))[0]
    said = lambda key: "; ".join(WAYS[name].label for name in lowest(results, key))
    return (
        f"The teacher's perplexity on its texts is {any_run['teacher_perplexity']:.2f}. Of {len(results)} ways, lowest "
        f"in KL(T‖S) on the teacher's texts: {said('forward_kl')}. Lowest in perplexity on them: {said('perplexity')}. "
        f"Lowest in KL(S‖T) on the student's own texts: {said('reverse_kl')}. Ways are named together where the "
        "differences of their seeds do not tell them apart (95 % intervals)."
    )


def lowest(results: dict[str, list[dict[str, float]]], key: str) -> list[str]:
    """The way of the lowest mean, and those whose paired difference from it has an interval with 0 in it."""
    values = {name: np.array([run[key] for run in runs]) for name, runs in results.items()}
    best = min(values, key=lambda name: values[name].mean())
    if len(values[best]) < 3:
        return [best]
    gaps = {name: x - values[best] for name, x in values.items() if name != best}
    return [best, *(name for name, gap in gaps.items() if seed_interval(gap)[1] <= 0)]


def main(config: Config) -> dict[str, list[dict[str, float]]]:
    """Train what is missing, print and write the table and the figure; the results of each way, in order of seeds."""
    prepare(config)
    cells = [(name, seed) for seed in config.seeds for name in config.ways]
    with ProcessPoolExecutor(config.jobs, multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(cell, itertools.repeat(config), *zip(*cells)))
    results = {name: [run for (of, _), run in zip(cells, done) if of == name] for name in config.ways}
    table("ways to distil", ["", *(label for _, label, _ in KEYS)], rows(results))
    print(finding(results))
    write_json(config.results, results)
    distill_figures.draw_ways({WAYS[name].label: runs for name, runs in results.items()}, config.figure)
    return results


if __name__ == "__main__":
    cli.run(main, Config)
