"""How much GPU time does a rollout lose while it waits for its longest answers?

    python -m experiments.studies.long_tail --before runs/demo/base/checkpoint --after runs/demo/rl/checkpoint

The lengths of answers are measured, before and after RL; the time that a large model would lose with them is simulated.
They are stretched to those of a reasoning model, and a step of decoding takes what minir1/plan.py gives for --model on
--gpu: it reads the weights, however few rows still run, and the cache of those rows.

    wait       a GPU starts its next answers when all that run have ended; rows that have ended are dropped
    refill     an answer that has ended is replaced at once (continuous batching)
    lost       1 - t* / t, where t* is the time of the same tokens if every step had all its rows

On several GPUs the update waits for the slowest. Prompts are dealt out as they come, or balanced: the one with the
longest expected answers goes to the GPU with the fewest expected tokens, where other answers to the same prompt, such
as those of the epoch before, say what to expect.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.count import find
from experiments.studies import long_tail_figure
from minir1 import checkpoint, cli, plan, tasks
from minir1.device import pick
from minir1.files import read_json, write_json
from minir1.gpus import gpu
from minir1.log import markdown_table, progress
from minir1.model import hf
from minir1.rollout import collect
from minir1.settings import at_least, new_file
from minir1.templates import encode

ROWS = (8, 16, 32, 64, 128, 256)  # rows of a GPU at once
GPUS = (1, 2, 4, 8, 16, 32, 64)
WAYS = ("wait", "refill")


@dataclass(frozen=True)
class Config:
    """Lengths, and the machine that is simulated."""

    before: Path = Path("runs/demo/base/checkpoint")  # policies whose answers are measured, unless results has them
    after: Path = Path("runs/demo/rl/checkpoint")
    task: str = "countdown"
    problems: int = 128  # prompts whose answers are measured
    num_generations: int = 32  # answers per prompt: half are simulated, half are what is known of the prompt before
    max_completion_length: int = 384
    stretch: int = 20  # factor on the lengths
    model: str = "qwen2.5-7b"  # a preset
    gpu: str = "h100"
    answers: int = 1024  # of a rollout, for each GPU
    repeats: int = 20  # simulated rollouts, drawn from the measured prompts
    seed: int = 0
    device: str = "auto"
    results: Path = Path("docs/results/long_tail.json")
    figure: Path = Path("docs/results/long_tail.png")

    def __post_init__(self):
        at_least(self, 2, "problems", "num_generations")
        at_least(self, 1, "max_completion_length", "stretch", "repeats")
        at_least(self, max(ROWS), "answers")
        at_least(self, 0, "seed")
        new_file(self, "results", "figure")


# ---- the simulator -------------------------------------------------------------------------------


def running(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows that run at each step, int64 [steps], from the first step of each answer and its length."""
    ends = starts + lengths
    change = np.bincount(starts, minlength=ends.max() + 1) - np.bincount(ends, minlength=ends.max() + 1)
    return change.cumsum()[:-1]


def wait(lengths: np.ndarray, rows: int) -> np.ndarray:
    """`running` where `rows` answers at a time run until the longest has ended."""
    groups = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    begins = np.cumsum([0] + [group.max() for group in groups[:-1]])
    return running(np.repeat(begins, [len(group) for group in groups]), lengths)


def refill(lengths: np.ndarray, rows: int) -> np.ndarray:
    """`running` where the next answer takes the row of one that has ended."""
    free, starts = [0] * min(rows, len(lengths)), []
    for length in lengths.tolist():
        starts.append(heapq.heappop(free))
        heapq.heappush(free, starts[-1] + length)
    return running(np.array(starts), lengths)


def lost(ranks: list[np.ndarray], cost: np.ndarray) -> float:
    """The share of all GPUs' time that is lost. ranks: `running` of each; cost: seconds of a step by rows, [rows + 1].

    1 - Σ tokens / rows · cost(rows) / (n · t), with t the time of the slowest of n ranks
    """
    rows = len(cost) - 1
    slowest = max(cost[one].sum() for one in ranks)
    return 1 - sum(one.sum() for one in ranks) / rows * cost[rows] / (len(ranks) * slowest)


def dealt(expected: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Indices of the prompts of each rank: the same number of neighbours."""
    return np.array_split(np.arange(len(expected)), ranks)


def balanced(expected: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Indices of the prompts of each rank, by expected length: the longest to the rank that has the fewest tokens.

    Each rank takes the same number of prompts, or one more or less, in the order of falling expected length.
    """
    most = -(-len(expected) // ranks)
    loads, chosen = [(0.0, rank) for rank in range(ranks)], [[] for _ in range(ranks)]
    for prompt in np.argsort(-expected, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        chosen[rank].append(prompt)
        if len(chosen[rank]) < most:
            heapq.heappush(loads, (load + expected[prompt], rank))
    return [np.array(prompts, dtype=np.int64) for prompts in chosen]


# ---- lengths and costs ---------------------------------------------------------------------------


def measure(path: Path, config: Config) -> np.ndarray:
    """Tokens of the answers of a policy: int64 [P, G]."""
    task = tasks.load(config.task)
    model, tokenizer = hf.load(checkpoint.resolve(path), pick(config.device))
    prompts = encode(tokenizer, tasks.spread(task.problems("test"), config.problems), "chat")
    settings = {"answers": config.num_generations, "max_tokens": config.max_completion_length}
    settings |= {"stop": tokenizer.stops, "seed": config.seed}
    parts = []
    with progress(len(prompts), path.parent.name) as advance:
        for i in range(0, len(prompts), 16):
            rollout = collect(model, prompts[i : i + 16], **settings)
            parts.append((rollout.length - rollout.prompt_len).view(-1, config.num_generations).cpu().numpy())
            advance(len(parts[-1]))
    return np.concatenate(parts)


def costs(config: Config, rows: int, mean: float) -> np.ndarray:
    """Seconds of a decoding step with 0 … rows rows that hold half of a mean answer, [rows + 1]."""
    job = plan.Job(find(config.model), gpu(config.gpu))
    return np.array([0.0] + [plan.decode_seconds(job, n, job.prompt + mean / 2) for n in range(1, rows + 1)])


def rollouts(table: np.ndarray, config: Config, gpus: int):
    """(lengths [P, G/2], expected length [P]) of simulated rollouts: prompts drawn again from the measured ones."""
    half, rng = table.shape[1] // 2, np.random.default_rng(config.seed)
    for _ in range(config.repeats):
        drawn = table[rng.integers(len(table), size=gpus * config.answers // half)]
        yield drawn[:, :half], drawn[:, half:].mean(1)


def simulate(table: np.ndarray, config: Config) -> dict[str, float]:
    """The lost share by way and rows, on one GPU; and by way, assignment and number of GPUs, with 64 rows each."""
    mean, shares = table.mean(), {}
    for rows in ROWS:
        cost = costs(config, rows, mean)
        for way, function in (("wait", wait), ("refill", refill)):
            each = [lost([function(lengths.ravel(), rows)], cost) for lengths, _ in rollouts(table, config, 1)]
            shares[f"rows/{rows}/{way}"] = float(np.mean(each))
    cost = costs(config, 64, mean)
    for gpus in GPUS:
        for way, function in (("wait", wait), ("refill", refill)):
            for name, assign in (("dealt", dealt), ("balanced", balanced)):
                each = []
                for lengths, expected in rollouts(table, config, gpus):
                    each.append(lost([function(lengths[p].ravel(), 64) for p in assign(expected, gpus)], cost))
                shares[f"gpus/{gpus}/{way}/{name}"] = float(np.mean(each))
    return shares


# ---- the document --------------------------------------------------------------------------------


def page(results: dict) -> str:
    """Two tables: by rows on one GPU, by number of GPUs."""
    share = lambda when, key: f"{results[f'{when}/{key}']:.0%}"
    rows = [
        [name, *(f"{results[f'{when}/{key}']:.0f}" for key in ("mean", "median", "p90", "p99")),
         share(when, "truncated")]
        for when, name in (("before", "before RL"), ("after", "after RL"))
    ]  # fmt: skip
    text = markdown_table(["tokens of an answer", "mean", "median", "90 %", "99 %", "truncated"], rows)
    cases = [(when, way) for when in ("before", "after") for way in WAYS]
    lines = [[f"{n}", *(share(when, f"rows/{n}/{way}") for when, way in cases)] for n in ROWS]
    names = [f"{when} RL: {way}" for when, way in cases]
    text += "\n\n" + markdown_table(["rows at once, one GPU", *names], lines, words=0)
    cases = [(way, name) for way in WAYS for name in ("dealt", "balanced")]
    lines = [[f"{n}", *(share("after", f"gpus/{n}/{way}/{name}") for way, name in cases)] for n in GPUS]
    head = ["GPUs, 64 rows each, after RL", *(f"{way}, {name}" for way, name in cases)]
    text += "\n\n" + markdown_table(head, lines, words=0)
    waiting, refilling = (share("after", f"rows/64/{way}") for way in WAYS)
    plain, even = (share("after", f"gpus/{max(GPUS)}/refill/{name}") for name in ("dealt", "balanced"))
    text += f"\n\nAfter RL and with 64 rows, waiting loses {waiting} of one GPU's time, and refilling {refilling}. "
    return text + f"On {max(GPUS)} GPUs refilling loses {plain}, and {even} with prompts that are balanced."


def main(config: Config) -> dict:
    """Measure the lengths, unless the results have them; simulate, write and draw."""
    old = read_json(config.results) if config.results.exists() else {}
    results = {}
    for when, path in (("before", config.before), ("after", config.after)):
        if f"{when}/lengths" in old:
            table = np.array([[int(n) for n in line.split()] for line in old[f"{when}/lengths"]])
        else:
            table = measure(path, config)
        results[f"{when}/lengths"] = [" ".join(map(str, line)) for line in table.tolist()]
        results[f"{when}/mean"], results[f"{when}/median"] = float(table.mean()), float(np.median(table))
        results |= {f"{when}/p{q}": float(np.quantile(table, q / 100)) for q in (90, 99)}
        results[f"{when}/truncated"] = float((table >= config.max_completion_length).mean())
        shares = simulate(table * config.stretch, config)
        results |= {f"{when}/{key}": value for key, value in shares.items()}
    write_json(config.results, results)
    long_tail_figure.draw(results, config.figure)
    print(page(results))
    return results


if __name__ == "__main__":
    cli.run(main, Config)
