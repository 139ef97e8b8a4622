"""Rejection sampling: sample several answers to each problem, keep the good ones as data for supervised fine-tuning.

    python -m experiments.reject_sample --checkpoint runs/r1-zero/checkpoint --task countdown --out runs/rejection
    python -m experiments.reject_sample --checkpoint runs/r1-zero/checkpoint --rewrite --tidy --out runs/cold-start
    python -m experiments.reject_sample --checkpoint Qwen2.5-0.5B --task gsm8k --data gsm8k --template r1_zero

DeepSeek-R1 (arXiv:2501.12948) makes two data sets in this way: the cold start from answers of R1-Zero (section 2.3.1)
and, after the first RL, the reasoning data of the second fine-tuning, mixed with general data (section 2.3.3). An
answer goes through these filters in this order, and each counts what it removes:

    truncated        by the token budget
    unjudged         the verifier failed
    wrong            by the task's verifier
    not_rewritten    with --rewrite: the task cannot rewrite it
    wrong_rewritten  with --rewrite: the verifier does not call the rewritten text right
    malformed        no format reward
    mixed            language consistency below --min-language
    repetitive       repetition above --max-repetition
    untidy           with --tidy: tidiness below 1
    too_long         more than --max-length tokens
    duplicate        equal, but for white space, to an earlier answer to the same problem
    surplus          not among the --per-problem answers that the seed draws for each problem

--rewrite puts right answers into the form that the task's own rules define (`rewrite` in minir1/tasks). In the paper,
people and DeepSeek-V3 do this work; here it is rules alone, so the content stays that of the policy, and the verifier
judges the new text again.

kept.jsonl is chat data for sft.py, in the order of the problems: one line per kept answer, with its prompt and, like
every text here, with a <think> that the template opened. With --general, the lines of those files are added, all or as
large a share of the result as --general-share says, and everything is shuffled by the seed. answers.jsonl has all
sampled answers: a killed run continues with --resume, and a complete one is filtered again, with other filters if they
are given. result.json has the counts; figures/funnel.png shows them.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.reject_sample_figure import draw_funnel
from experiments.reject_sample_filters import select
from minir1 import answer_file, chat_data, checkpoint, cli, rewards, tasks, templates
from minir1.device import pick, pick_dtype
from minir1.files import replace_text, write_json
from minir1.judge import Answer, rights, sample_batches
from minir1.log import progress, table
from minir1.metrics import share_interval
from minir1.model import hf
from minir1.model.transformer import Transformer
from minir1.seed import python_random
from minir1.settings import at_least, fraction, new_folder, no_training
from minir1.tasks import Problem, Task
from minir1.tasks.published import records
from minir1.templates import TEMPLATES
from minir1.tokenizer import Tokenizer

SAMPLING = (  # the settings on which the answers depend
    *("task", "data", "template", "split", "problems", "num_generations", "max_completion_length"),
    *("temperature", "seed", "dtype"),
)
FILTERS = ("rewrite", "min_language", "max_repetition", "tidy", "max_length", "per_problem")  # those with settings
GENERAL = -1  # key of the seed's stream for the general data; the others are indices of problems


@dataclass(frozen=True)
class Config:
    """What is sampled, and what is kept."""

    checkpoint: Path = Path("runs/r1-zero/checkpoint")  # a Hugging Face folder, or a folder of checkpoints
    task: str = "countdown"  # a name, names joined by +, or the path of a .py file: see minir1/tasks
    data: str | None = None  # the folder or file that the task reads
    allow_code: bool = False  # the task may run programs that the model wrote, in a sandbox
    template: Literal[TEMPLATES] = "chat"  # give sft.py the same
    split: str = "train"
    problems: int | None = 1000  # at most, evenly spread; None: all
    num_generations: int = 8  # sampled answers per problem
    max_completion_length: int = 384  # token budget of an answer
    temperature: float = 1.0
    rewrite: bool = False  # put right answers into the form that the task's rules define
    min_language: float = 0.0  # language consistency of a kept answer, at least; 0: off
    max_repetition: float = 1.0  # repetition of a kept answer, at most; 1: off
    tidy: bool = False  # keep only answers of tidiness 1
    max_length: int | None = None  # tokens of a kept answer, the end token included; None: no limit
    per_problem: int | None = None  # kept answers to one problem, at most, drawn by the seed; None: no limit
    general: tuple[Path, ...] = ()  # chat JSONL files of general data, mixed in
    general_share: float | None = None  # of general data in the result, drawn by the seed; None: all lines
    rows_at_once: int = 512  # answers sampled together; no answer depends on it
    seed: int = 0
    out: Path = Path("runs/rejection")
    resume: bool = False
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None: bfloat16 on CUDA, else float32

    def __post_init__(self):
        at_least(self, 1, "problems", "num_generations", "max_completion_length", "rows_at_once")
        at_least(self, 1, "max_length", "per_problem")
        at_least(self, 0, "seed")
        at_least(self, 1e-6, "temperature")  # or the answers to a problem are all the same
        fraction(self, "min_language", "max_repetition", "general_share")
        if self.general_share is not None and not self.general:
            raise ValueError(f"general_share = {self.general_share}: give the general data with --general")
        if self.general_share == 1:
            raise ValueError("general_share = 1.0: below 1, or no sampled answer has a share")
        new_folder(self, "out")
        no_training(self, "out")


# ---- what is written ---------------------------------------------------------------------------


def line(task: Task, index: int, problem: Problem, answer: Answer) -> dict:
    """One kept answer as chat data."""
    said = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": answer.text}]
    about = {"task": problem.task or task.name, "subject": problem.subject, "level": problem.level}
    return {"messages": said, **about, "language": problem.language, "index": index}


def read_general(paths: Sequence[Path]) -> list[dict]:
    """The lines of chat JSONL files, in any layout of minir1/chat_data.py.

    ValueError, naming file and line, for one without an answer of the assistant.
    """
    lines = []
    for where, row in (record for path in paths for record in records(path)):
        try:
            if "assistant" not in dict(chat_data.read(row)):
                raise ValueError(f"has no answer of the assistant: {str(row)[:60]}")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        lines.append(row)
    return lines


def mixed(solved: list[dict], general: list[dict], share: float | None, seed: int) -> list[dict]:
    """The kept answers and the general data, shuffled; a `share` of the result is general, None: all of it is there.

    ValueError if the general data is too small for its share.
    """
    if not general:
        return solved
    rng = python_random(seed, GENERAL)
    if share is not None:
        count = round(len(solved) * share / (1 - share))
        if count > len(general):
            raise ValueError(
                f"general_share = {share}: needs {count:,} general lines beside {len(solved):,} kept answers, and "
                f"there are {len(general):,}; continue with --resume and a smaller share"
            )
        general = rng.sample(general, count)
    lines = solved + general
    rng.shuffle(lines)
    return lines


def figures(
    problems: Sequence[Problem],
    grid: Sequence[Sequence[Answer]],
    chosen: Sequence[tuple[int, Answer]],
    removed: dict[str, int],
    config: Config,
) -> dict[str, float]:
    """The measured values, flat; grid, chosen and removed as for `select` and by it.

    Kept answers also by level, subject, language and task: kept/level/2, kept/language/en, …, 0 where there are none.
    """
    answers = [answer for row in grid for answer in row]
    values = {"problems": len(problems), "sampled": len(answers)}
    values |= {f"removed/{name}": count for name, count in removed.items()}
    values |= {"kept": len(chosen), "covered": len({p for p, _ in chosen}) / len(problems)}
    for name in ("level", "subject", "language", "task"):
        of_problem = [getattr(problem, name) for problem in problems]
        number = Counter(of_problem[p] for p, _ in chosen)
        values |= {f"kept/{name}/{value}": number[value] for value in sorted(set(of_problem)) if value}
    share = rights(grid)
    if not np.isnan(share).all():
        interval = share_interval(share[~np.isnan(share)], seed=config.seed)
        values |= dict(zip(("pass@1", "pass@1_low", "pass@1_high"), interval))
    values |= {"tokens": sum(a.tokens for a in answers), "length": sum(a.tokens for a in answers) / len(answers)}
    return values | ({"length_kept": sum(a.tokens for _, a in chosen) / len(chosen)} if chosen else {})


# ---- the script --------------------------------------------------------------------------------


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    config: Config,
    path: Path,
    saved: answer_file.Answers,
) -> tuple[list[list[Answer]], float]:
    """Judged answers [P][n], and sampled tokens a second, 0 if `saved` has all answers.

    Each batch is added to the file at `path` once it is judged.
    """
    settings = {"answers": config.num_generations, "max_tokens": config.max_completion_length}
    settings |= {"temperature": config.temperature, "seed": config.seed, "template": config.template}
    settings |= {"rows_at_once": config.rows_at_once}
    done, tokens, began = dict(saved.get("sampled", {})), 0, time.perf_counter()
    with progress(len(problems), "sampled answers") as advance:
        advance(len(done))
        for indices, part in sample_batches(model, tokenizer, task, problems, skip=done, **settings):
            answer_file.append(path, "sampled", indices, [problems[p] for p in indices], part)
            done |= zip(indices, part)
            tokens += sum(a.tokens for row in part for a in row)
            advance(len(part), note=f"{tokens / (time.perf_counter() - began):,.0f} tokens/s")
    return [done[p] for p in range(len(problems))], tokens / (time.perf_counter() - began)


def main(config: Config) -> dict[str, float]:
    """Sample, judge, filter, write; the counts, as in result.json. RuntimeError if no answer is kept."""
    began = time.perf_counter()
    task = tasks.load(config.task, config.data, allow_code=config.allow_code)
    if config.rewrite and task.rewrite is None:
        raise ValueError(f"rewrite: task {task.name} has no rewrite(problem, text); leave the option out")
    general = read_general(config.general)
    listed = task.problems(config.split)
    problems = tasks.spread(listed, config.problems or len(listed))
    if config.min_language:
        for language in {problem.language for problem in problems}:
            rewards.language_consistency("", language)  # one that is not known is refused here, before the sampling
    device = pick(config.device)
    dtype = pick_dtype(config.dtype, device)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    source, path = checkpoint.resolve(config.checkpoint, prefer="best"), config.out / "answers.jsonl"
    asked = asdict(config)
    settings = {name: asked[name] for name in SAMPLING}
    settings |= {"checkpoint": str(source), "weights": checkpoint.digests(source)}
    saved = answer_file.begin(path, settings, problems, config.resume)
    model, tokenizer = hf.load(source, device, dtype)
    grid, tokens_per_s = sample(model, tokenizer, task, problems, config, path, saved)

    def length(problem: Problem, text: str) -> int:  # of an answer as the sampler counts it, with the end token
        begun = templates.opened(templates.prompt(tokenizer, problem.prompt, config.template))
        return len(tokenizer.encode(text.removeprefix(begun))) + 1

    kept, removed = select(task, problems, grid, config, length)
    lines = mixed([line(task, p, problems[p], a) for p, a in kept], general, config.general_share, config.seed)
    values = figures(problems, grid, kept, removed, config) | {"general": len(lines) - len(kept), "lines": len(lines)}
    values |= {"tokens_per_s": tokens_per_s} if tokens_per_s else {}  # else nothing was left to sample
    values |= {name: getattr(config, name) for name in FILTERS} | {"seconds": time.perf_counter() - began}
    title = f"{task.name}, {config.split}"
    draw_funnel(values["sampled"], removed, title, str(source), config.out / "figures" / "funnel.png")
    show(f"{title}: {len(problems)} problems", values)
    if not kept:  # no result: nobody may take the general data alone for the whole
        raise RuntimeError(
            f"none of {values['sampled']} answers was kept: the table says which filter removed them; try other "
            "filters with --resume, or sample from another checkpoint"
        )
    replace_text(config.out / "kept.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines))
    write_json(config.out / "result.json", values)
    print(f"{len(lines):,} lines are in {config.out / 'kept.jsonl'}, {values['general']:,} of them general data")
    return values


def show(title: str, values: dict[str, float]) -> None:
    """Print what each filter removed and left."""
    left, rows = values["sampled"], [["sampled", "", f"{values['sampled']:,}", "100.0%"]]
    for key, count in values.items():
        if key.startswith("removed/"):
            left -= count
            name = key.removeprefix("removed/").replace("_", " ")
            rows.append([name, f"{count:,}", f"{left:,}", f"{left / values['sampled']:.1%}"])
    table(title, ["filter", "removed", "left", "of all"], rows)
    print(f"problems with a kept answer: {values['covered']:.1%}")


if __name__ == "__main__":
    cli.run(main, Config)
