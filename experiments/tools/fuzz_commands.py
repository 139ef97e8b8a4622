"""Wrong command lines for every script: each must end in one line that says what is wrong.

    python -m experiments.tools.fuzz_commands --cases 500

A line is a script at toy size with one wrong option: a word for a number, NaN, infinity, a negative or a huge number,
an empty text, a path that is absent, a file or a damaged checkpoint, an unknown option, a missing value. It runs in
this process, as `python -m` would run it. Three outcomes:

    refused    one line on stderr, `error: …`, written by this project, and a code other than 0
    accepted   the value has a meaning: the run got through two steps, or reached what would take long here
    failed     anything else: a traceback, several lines, an error that says nothing to a user
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path
from typing import get_args, get_type_hints
from unittest.mock import patch

from experiments import pretrain
from minir1 import checkpoint, cli
from minir1.log import Run, table
from minir1.model import heads, hf
from minir1.model.config import ModelConfig
from minir1.settings import at_least

ROOT = Path(__file__).parent.parent.parent
SMALL = ModelConfig(dim=32, layers=2, heads=2, kv_lora=16, nope=8, rope=8, v_dim=16, ffn=64, experts=4, expert_ffn=16)
SHAPE = "--{0}dim 32 --{0}layers 2 --{0}heads 2 --{0}ffn 64 --{0}experts 4 --{0}expert-ffn 16"
EVALUATED = "--{0}eval-problems 2 --{0}eval-answers 1 --{0}max-completion-length 8"
ROLLOUT = "--{0}steps 1 --{0}prompts 2 --{0}num-generations 2 --{0}min-mixed 0 " + EVALUATED
RL = ROLLOUT.format("") + " --checkpoint {base}"
PAIRS = "--checkpoint {base} --pairs {pairs} --held-out {pairs} --steps 1 --batch 2"
CELLS = "--checkpoint {base} --seeds 0 --out {out}"
TOY = {  # options at toy size of the scripts that run; of the others only the options are read
    "pretrain": "--steps 1 --batch 256 " + SHAPE.format("model."),
    "train_tokenizer": "--data {texts} --preset code --size 300 --against {base} --kinds prose {texts} --out {out}",
    "pretrain_text": "--data {texts} --tokenizer {base} --steps 1 --batch 64 --window 8 --sample-tokens 4 "
    + SHAPE.format("model."),
    "demo": "--base-from {run} --problems 2 --num-generations 2 " + ROLLOUT.format("rl."),
    "dpo": PAIRS + " " + EVALUATED.format(""),
    "reward_model": PAIRS,
    "sft": "--checkpoint {base} --data {dialogues} --held-out 0 --steps 1 --batch 2",
    "distill": "--student {base} --teacher {base} --data {dialogues} --held-out 0 --steps 1 --batch 2",
    "distill_on_policy": "--student {base} --teacher {base} --steps 1 --prompts 2 --num-generations 2 "
    + EVALUATED.format(""),
    "self_verify": "--checkpoint {base} --problems 2 --answers 2 --test-problems 2 --num-generations 2 --steps 1 "
    "--max-completion-length 8",
    "budget": "--checkpoints {base} --problems 2 --num-generations 2 --max-completion-length 8 --limits 2 "
    "--answer-length 4",
    "preference_pairs": "--checkpoint {base} --problems 2 --num-generations 2 --max-completion-length 8",
    "evaluate": "--checkpoint {base} --problems 2 --num-generations 2 --max-completion-length 8",
    "reject_sample": "--checkpoint {base} --problems 2 --num-generations 2 --max-completion-length 8",
    "chat": "{base}",
    "doctor": "--checkpoint {base} --prompts 2 --num-generations 2 --max-completion-length 8 --eval-problems 2",
    "gallery": "--only 'group of one' --seeds 0 --base-steps 1 --results {out}/gallery.json --stored {folder}",
    "count": "deepseek-v3",
    "plan": "minir1",
    "report": "{run} --no-measure",
    "inspect_tokens": "{run}",
    **dict.fromkeys(("r1_zero", "ppo", "reinforce"), RL),
    **{f"variants.{path.stem}": RL for path in sorted((ROOT / "experiments/variants").glob("[a-z]*.py"))},
    "variants.dapo": RL + " --overlong-buffer 4",
    "variants.hybrid": RL + " --sft-data {dialogues}",
    "all_scenarios": RL + " --preference-steps 1 --general-prompts 1 --general-task countdown --reward-model {scalar}",
    "studies.balance": "--seeds 0 --steps 1 --batch 256 --eval-batches 1 " + SHAPE.format("model."),
    "studies.long_context": "--dim 32 --steps 1 --tune-steps 1 --batch 512 --tune-batch 512 --rows 1 --cost-lengths 32",
    "studies.routes": "--checkpoint {base} --seeds 0 --prompts 2 --num-generations 2 --max-completion-length 8",
    "studies.comparison": "--policy {base} --base {base} --problems 2 --num-generations 2 --max-completion-length 8",
    **{f"studies.{name}": CELLS for name in ("algorithms", "curriculum", "group_size", "kl", "overoptimization")},
    **dict.fromkeys(("studies.hybrid", "studies.reduction", "studies.self_check"), CELLS),
    "studies.distill_ways": "--teacher {base} --tokens 64 --batch 2 --length 8 --held-out 2 --seeds 0 --out {out}",
    "studies.distill_vs_rl": "--teachers {run} --out {out}",
    "studies.thinking": "--pipelines {run} --out {out}",
    "studies.preferences": "--checkpoint {base} --seeds 0 --pairs.problems 2 --pairs.num-generations 2 "
    "--pairs.max-completion-length 8 --out {out}",
    "serve": "{base} --port 0 --rows 2",
    "studies.seeds": "--out {out}",
    "tools.variants": "rloo",
    "tools.render_docs": "--check",
    "benchmarks.profile_step": "--prompts 1 --num-generations 2 --max-completion-length 4 --repeats 1 --decode-rows 1",
    "benchmarks.bench_chat": "{base} --problems 2 --turns 0 1 --max-completion-length 8",
    "benchmarks.growth": "--rows 1 --lengths 1 --widths 16 --experts 2 --at-rows 1 --steps 1",
    **dict.fromkeys(("benchmarks.attention_tiles", "benchmarks.decode_splits", "benchmarks.prefill"), ""),
}
SLOW = ("subprocess.run", "multiprocessing.get_context", "builtins.input")  # other processes, or a user's words
if find_spec("uvicorn"):
    SLOW = ("uvicorn.Server.run", *SLOW)  # it serves until it is stopped; its import calls others of these

WRONG = {  # of each type of a field: kind -> words
    int: {"word": ["x"], "fraction": ["1.5"], "empty": [""], "nan": ["nan"], "negative": ["-1"], "zero": ["0"],
          "one": ["1"], "huge": [str(10**30), str(2**63)], "large": [str(10**9)]},
    float: {"word": ["x"], "empty": [""], "nan": ["nan"], "infinite": ["inf", "-inf", "1e400"], "negative": ["-1"]},
    bool: {"value": ["yes"]},
    str: {"empty": [""], "unknown": ["nosuch", "countdown:nosuch", "☃", "a\nb"]},
    Path: {"empty": [""], "absent": ["absent", "absent/☃", "a\nb", "n" * 300], "file": ["{file}", "{file}/inside"],
           "folder": ["{folder}"], "damaged": ["{damaged}"]},
}  # fmt: skip
TASKS = ("gsm8k", "gsm8k --data=absent", "gsm8k --data={file}", "gsm8k --data={folder}", "aime --data={file}",
         "nosuch.py", "{file}", "countdown+gsm8k", "countdown+countdown", "math --data={file}", "mmlu --data={folder}",
         "arc --data=absent", "gpqa --data={file}", "tinyzero --data={damaged}", "humaneval", "mbpp --data={file}",
         "humaneval --allow-code --data={damaged}", "mbpp --allow-code --data={file}",
         "reasoning_gym:nosuch")  # fmt: skip
MEANT = ("steps", "warmup", "seed", "prompts", "problems", "eval_problems", "eval_every", "microbatch", "max_length",
         "max_completion_length", "checkpoint_every", "lora_rank", "reference_reset")  # may be large  # fmt: skip


class Accepted(BaseException):
    """The line is valid: what follows is work."""


@dataclass(frozen=True)
class Config:
    """How many lines."""

    cases: int = 500
    seed: int = 0  # of the choice among all wrong lines
    verbose: bool = False  # print each line with what it ended in

    def __post_init__(self):
        at_least(self, 1, "cases")
        at_least(self, 0, "seed")


def scripts() -> dict[str, type]:
    """Name below experiments/ -> the dataclass of its options, of each module that calls cli.run."""
    configs = {}
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        if called := re.search(r"^    cli\.run\(main, (\w+)", path.read_text(encoding="utf-8"), re.M):
            name = ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)
            configs[name] = getattr(importlib.import_module(f"experiments.{name}"), called[1])
    return configs


# ---- the lines ---------------------------------------------------------------------------------


def options(config: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(--option, type of one value) of every field, those of nested dataclasses included."""
    hints = get_type_hints(config)
    for field in fields(config):
        kind = next((part for part in (hints[field.name], *get_args(hints[field.name])) if part in WRONG), None)
        if is_dataclass(hints[field.name]):
            yield from options(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"--{prefix}{field.name}".replace("_", "-"), kind or str


def wrong_lines(name: str, config: type, rng: random.Random) -> list[tuple[str, list[str]]]:
    """(kind, words) of one script: every option with every kind of wrong value, in random order."""
    lines = [("unknown option", ["--no-such-option", "3"]), ("surplus word", ["surplus"]), ("no options", None)]
    for option, kind in options(config):
        wrong = [(label, word) for label, words in WRONG[kind].items() for word in words]
        ends = re.split("[.]|^--", option)[-1].replace("-", "_") in MEANT
        lines += [(label, [f"{option}={word}"]) for label, word in wrong if ends or label != "large"]
        lines += [("no value", [option])] * (kind is not bool)
        lines += [("task", f"{option}={words}".split()) for words in TASKS if option == "--task"]
    rng.shuffle(lines)
    return [(label, [] if words is None else [*shlex.split(TOY.get(name, "")), *words]) for label, words in lines]


def damage(step: Path, rng: random.Random) -> None:
    """Spoil a checkpoint in one of the ways that happen."""
    config = json.loads((step / "config.json").read_text())
    text = lambda name, content: (step / name).write_text(content)
    edits = [
        *(partial(os.remove, step / name) for name in ("tokenizer.json", "model.safetensors", "config.json")),
        *(partial(os.truncate, step / name, 100) for name in ("tokenizer.json", "model.safetensors", "config.json")),
        *(partial(text, "config.json", content) for content in ("", "[1, 2]", "null", '{"architectures": ["Nosuch"]}')),
        *(partial(text, "config.json", json.dumps(config | {"hidden_size": size})) for size in (48, "x", None, -1)),
        partial((step / "config.json").write_bytes, b"\xff\xfe{}"),
        partial(text, "tokenizer_config.json", "{}"),
        partial(text, "latest", "step-000009\n"),
    ]
    rng.choice(edits)()


def material(folder: Path, base: Path, rng: random.Random) -> dict[str, Path]:
    """What the words in braces stand for, below `folder`, where the line may overwrite it."""
    pairs = [{"prompt": "make 24 from 11,3,3", "chosen": f"11+3={n}", "rejected": "11-3=8"} for n in (14, 15)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dialogues = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    (folder / "dialogues.jsonl").write_text("".join(json.dumps(dialogue) + "\n" for dialogue in dialogues))
    texts = [{"text": f"make 24 from 11,3,{n}"} for n in range(9)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (folder / "file").write_text("text\n")
    (folder / "empty").mkdir()
    shutil.copytree(checkpoint.resolve(base), folder / "damaged")
    damage(folder / "damaged", rng)
    return {"run": base, "base": checkpoint.resolve(base), "pairs": folder / "pairs.jsonl", "file": folder / "file",
            "dialogues": folder / "dialogues.jsonl", "folder": folder / "empty", "damaged": folder / "damaged",
            "out": folder / "run", "scalar": base / "scalar", "texts": folder / "texts.jsonl"}  # fmt: skip


# ---- their outcomes ----------------------------------------------------------------------------


def outcome(name: str, words: list[str]) -> tuple[str, str]:
    """("refused" | "accepted" | "failed", what the script said) of one line, run in a folder that is empty at first."""
    log, read = Run.log, cli._options

    def accepted(*_, **__):
        raise Accepted

    def log_two(run: Run, step: int, metrics: dict) -> None:
        log(run, step, metrics)
        if step > 1:
            raise Accepted

    def options_only(*args):
        read(*args)
        raise Accepted

    stderr = io.StringIO()
    with contextlib.ExitStack() as stack:
        for target in SLOW:
            stack.enter_context(patch(target, accepted))
        stack.enter_context(patch.object(Run, "log", log_two))
        if name not in TOY:
            stack.enter_context(patch.object(cli, "_options", options_only))
        stack.enter_context(patch.object(sys, "argv", [f"experiments/{name}.py", *words]))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
            return "accepted", ""
        except Accepted:
            return "accepted", ""
        except SystemExit as end:
            said = stderr.getvalue() + (f"{end.code}\n" if isinstance(end.code, str) else "")
            one_line = said.startswith("error: ") and said.count("\n") == 1 and len(said) < 700
            ours = one_line and "(--debug shows where)" not in said
            return ("accepted" if not end.code else "refused" if ours else "failed"), said
        except BaseException:
            return "failed", traceback.format_exc()


def cases(config: Config) -> list[tuple[str, str, list[str]]]:
    """(script, kind, words): the same number of every script, as far as it has so many."""
    rng = random.Random(f"lines {config.seed}")
    each = [[(name, *line) for line in wrong_lines(name, one, rng)] for name, one in scripts().items()]
    return [case for case in chain(*zip_longest(*each)) if case][: config.cases]


def main(config: Config) -> dict[str, Counter]:
    """Run the lines, print the table of their kinds; SystemExit if a line failed."""
    counts: dict[str, Counter] = {}
    failures, home, rng = [], Path.cwd(), random.Random(f"paths {config.seed}")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, hard))  # what is too large must fail, and harm nothing else
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        with contextlib.redirect_stdout(io.StringIO()):
            pretrain.main(replace(pretrain.Config(), model=SMALL, steps=1, batch=256, out=base))
        trunk, tokenizer = hf.load(checkpoint.resolve(base))
        heads.save(heads.ScalarModel(trunk, heads.ValueHead(SMALL.dim)), tokenizer, base / "scalar")
        try:
            for number, (name, kind, words) in enumerate(cases(config)):
                here = Path(scratch) / f"{number}"
                here.mkdir()
                os.chdir(here)
                paths = material(here, base, rng)
                words = [re.sub(r"\{(\w+)\}", lambda match: str(paths[match[1]]), word) for word in words]
                ended, said = outcome(name, words)
                counts.setdefault(kind, Counter())[ended] += 1
                shown = f"{ended}: {name} {shlex.join(words)}\n    {said.strip()}"
                failures += [shown] * (ended == "failed")
                if config.verbose or ended == "failed":
                    print(shown.replace(scratch, "…"), flush=True)
                os.chdir(home)
                shutil.rmtree(here)
        finally:
            os.chdir(home)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    ends = ("refused", "accepted", "failed")
    total = sum(counts.values(), Counter())
    table("wrong command lines", ["", *ends], [[kind, *(counts[kind][end] for end in ends)] for kind in sorted(counts)])
    print(f"{total.total()} lines of {len(scripts())} scripts: {', '.join(f'{total[end]} {end}' for end in ends)}")
    if failures:
        sys.exit(f"error: {len(failures)} lines failed")
    return counts


if __name__ == "__main__":
    cli.run(main, Config)
