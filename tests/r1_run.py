"""A made-up run of experiments/r1.py: folders with the files of its stages, filled without training."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

from experiments import evaluate
from minir1 import answer_file, tasks
from minir1.files import write_json
from minir1.judge import Answer
from minir1.model import hf
from minir1.model.config import ModelConfig
from minir1.model.transformer import Transformer
from minir1.tasks.world_language import say
from minir1.tokenizer import word_level

SMALL = ModelConfig(dim=32, layers=2, heads=2, kv_lora=16, nope=8, rope=8, v_dim=16, ffn=64, experts=4, expert_ffn=16,
                    max_positions=256)  # fmt: skip
TESTED = {  # stage -> accuracy, length, language consistency, repetition, tidiness, format, truncated
    "base": (0.2, 30, 0.7, 0.20, 0.2, 0.5, 0.2), "r1-zero": (0.7, 60, 0.72, 0.18, 0.3, 0.95, 0.05),
    "sft-1": (0.62, 45, 0.97, 0.03, 0.95, 0.98, 0.02), "rl-1": (0.7, 50, 0.99, 0.02, 0.97, 1.0, 0.0),
    "sft-2": (0.68, 48, 0.985, 0.02, 0.97, 0.99, 0.01), "rl-2": (0.74, 50, 0.992, 0.015, 0.99, 1.0, 0.0),
}  # fmt: skip
SECONDS = {"base": 600, "r1-zero": 420, "cold-start": 35, "sft-1": 40, "rl-1": 200, "general-data": 20, "rejection": 60,
           "sft-2": 90, "pairs": 25, "reward-model": 45, "rl-2": 180}  # fmt: skip
OWN = {name: seconds - 3 for name, seconds in SECONDS.items()}  # without the time in which a script starts
HOSTILE = '<think>```` <script>alert("x")</script> & \u202e \x00 |pipe| <img src=http://x.y/z>'  # never closed
WORLD = tasks.load("world")
SETTINGS = {"task": "world", "split": "test", "problems": 60}  # of the test
PROBLEMS = tasks.spread(WORLD.problems("test"), 60)


def build(path: Path, stages=tuple(SECONDS), tested=tuple(TESTED), checkpoint: bool = True) -> Path:
    """The folders of these stages, and of the tests of those that were tested."""
    for name in stages:
        write_stage(path / name, name)
    if checkpoint and "base" in stages:
        step = path / "base" / "checkpoint" / "step-000010"
        step.mkdir(parents=True)
        tokenizer = word_level(*WORLD.vocabulary())
        hf.save(Transformer(sized(tokenizer.size)), tokenizer, step)
        (path / "base" / "checkpoint" / "latest").write_text("step-000010\n")
    write_json(path / "result.json", {f"seconds/{name}": SECONDS[name] for name in stages})
    for name in tested:
        write_test(path, name)
    return path


def sized(vocabulary: int) -> ModelConfig:
    """The small model with room for a vocabulary."""
    return ModelConfig(**{**vars(SMALL), "vocab": -(-vocabulary // 16) * 16})


def write_stage(folder: Path, name: str) -> None:
    """Metrics, settings and result, as the script of this stage leaves them."""
    rng, steps = random.Random(name), 60
    rows = [{"step": step} for step in range(steps + 1)]
    config, result = {"seed": 0, "steps": steps}, {}
    if name == "base":
        config |= {"batch": 4096, "task": "world"}
        result = {"seconds/pretrain": OWN[name], "skill/sums": 0.97}
        for row in rows[1:]:
            row["train/loss"] = 0.6 + 3 * math.exp(-row["step"] / 10) + rng.gauss(0, 0.02)
    elif name in ("r1-zero", "rl-1", "rl-2"):
        config |= {"task": "world", "epochs": 1, "max_completion_length": 160}
        config["temperature"] = 0.7 if name == "rl-2" else 1.0
        result = {"seconds/rl": OWN[name]}
        for row in rows[1:]:
            share = 0.2 + 0.5 * (1 - math.exp(-row["step"] / 15)) if name == "r1-zero" else 0.65
            row |= {"train/reward": share + 0.1 + rng.gauss(0, 0.03), "train/sampled_tokens": 9000}
            if row["step"] % 10 == 0:
                row["eval/pass@1"] = share
        rows[0]["eval/pass@1"] = 0.2 if name == "r1-zero" else 0.65
    elif name in ("sft-1", "sft-2"):
        result = {"before/loss": 0.9, "after/loss": 0.3, "tokens": 250_000, "seconds/sft": OWN[name]}
        for row in rows:
            row["train/loss"] = 0.3 + 0.6 * math.exp(-row["step"] / 12) + rng.gauss(0, 0.03)
            if row["step"] % 20 == 0:
                row["eval/loss"] = 0.32 + 0.55 * math.exp(-row["step"] / 12)
        del rows[0]["train/loss"]
    elif name in ("cold-start", "general-data", "rejection"):
        removed = {"removed/truncated": 100, "removed/wrong": 2000, "removed/mixed": 700, "removed/duplicate": 300}
        result = {"sampled": 4000, **removed, "kept": 900, "tokens": 200_000, "seconds": OWN[name]}
        folder.mkdir(parents=True)
        (folder / "kept.jsonl").write_text('{"messages": []}\n')
    elif name == "pairs":
        result = {"train/pairs": 400, "tokens": 30_000}  # its seconds are in the result of the whole
    else:
        result = {"eval/accuracy": 0.86, "eval/accuracy_low": 0.8, "eval/accuracy_high": 0.91}
        result["seconds/train"] = OWN[name]
    write_json(folder / "result.json", result)
    if name not in ("cold-start", "general-data", "rejection", "pairs"):
        write_json(folder / "config.json", config)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer_to(problem: tasks.Problem, right: bool, tokens: int, hostile: bool) -> Answer:
    """One answer, judged as asked."""
    line = say("11-3=8,8*3=24:24{yes}", problem.language)
    text = f"<think>{line}</think><answer>{problem.reference if right else '7'}</answer>"
    return Answer(HOSTILE if hostile else text, tokens, hostile, right and not hostile, not hostile)


def write_test(path: Path, name: str) -> None:
    """answers.jsonl and result.json of the reasoning test, and those of the general prompts."""
    accuracy, length, consistency, repetition, tidiness, form, truncated = TESTED[name]
    rng = random.Random(f"test {name}")
    ease = {"easy": 0.2, "middle": 0.0, "hard": -0.25}
    grids = {}
    for kind, count, lower in (("sampled", 4, 0.0), ("greedy", 1, 0.0), ("forced", 4, 0.55)):
        grids[kind] = []
        for index, problem in enumerate(PROBLEMS):
            chance = accuracy - lower * accuracy + ease[problem.level] * accuracy
            row = [answer_to(problem, rng.random() < chance, max(3, int(rng.gauss(length, 6))),
                             index == 0 and name in ("base", "sft-1")) for _ in range(count)]  # fmt: skip
            grids[kind].append(row)
    file = path / "test" / name / "answers.jsonl"
    answer_file.begin(file, SETTINGS | {"checkpoint": str(path / name)}, PROBLEMS, resume=False)
    for kind, grid in grids.items():
        answer_file.append(file, kind, range(len(PROBLEMS)), PROBLEMS, grid)
    config = evaluate.Config(task="world", num_generations=4)
    values = evaluate.figures(WORLD, PROBLEMS, grids, config)
    readable = {"language_consistency": consistency, "repetition": repetition, "tidiness": tidiness}
    readable |= {"format": form, "truncated": truncated, "words": length / 2, "reflections": length / 90}
    readable |= {"tries": length / 18, "checks": length / 16, "corrections": 0.8, "false_yes": 0.3 - accuracy / 3}
    for level, factor in (("easy", 0.7), ("middle", 1.0), ("hard", 1.6)):
        readable |= {f"{key}_{level}": factor * readable[key] for key in ("tries", "checks", "reflections")}
        readable |= {f"{key}_{level}": readable[key] for key in ("corrections", "false_yes")}
        readable[f"length_{level}"] = factor * length
    write_json(path / "test" / name / "result.json", values | readable)
    write_general(path / "general" / name, accuracy)


def write_general(folder: Path, accuracy: float) -> None:
    """answers.jsonl and result.json of the general prompts: the preference is 0.4 + accuracy / 2."""
    talk = PROBLEMS[:4]
    scores = {"preference": 0.4 + accuracy / 2}
    grid = [[replace(answer_to(problem, True, 9, False), scores=scores)] * 2 for problem in talk]
    answer_file.begin(folder / "answers.jsonl", {"task": "world:talk"}, talk, resume=False)
    answer_file.append(folder / "answers.jsonl", "sampled", range(len(talk)), talk, grid)
    general = {"pass@1": accuracy, "pass@1_low": accuracy - 0.1, "pass@1_high": accuracy + 0.1}
    liked = scores["preference"]
    general |= {"preference": liked, "preference_low": liked - 0.01, "preference_high": liked + 0.01}
    write_json(folder / "result.json", general)
