"""Runs of scripts on several ranks, for `ranks.on_ranks`; imports nothing that registers a device."""

import contextlib
import copy
import importlib
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from minir1 import checkpoint, distributed, memory
from minir1.distributed import local
from minir1.model.config import ModelConfig, dense
from minir1.model.heads import ScalarModel, ValueHead
from minir1.model.shards import gathered, shard
from minir1.model.transformer import Transformer
from minir1.optim import adamw
from minir1.rollout import collect


def run_all(runs: dict, out: Path) -> None:
    """Every run, to its own folder in `out`."""
    if dist.is_initialized():
        distributed.second_group()  # as distributed.group does
    for name, (script, config) in runs.items():
        importlib.import_module(script).main(replace(config, out=out / name))


def collected(prompts: list[list[int]]) -> torch.Tensor:
    """Tokens that a small model in shards samples."""
    torch.manual_seed(0)
    model = Transformer(dense(vocab=50, dim=32, layers=1, heads=4, ffn=64))
    shard(torch.device("cpu"), torch.float32, model)
    return collect(model, prompts, answers=2, max_tokens=4, stop=[0], seed=1).tokens


def memory_of_steps(cases: list[tuple[ModelConfig, int, bool]]) -> list[tuple[dict, dict, int]]:
    """`memory_of_a_step` of each."""
    return [memory_of_a_step(*case) for case in cases]


def memory_of_a_step(config: ModelConfig, tokens: int, recompute: bool) -> tuple[dict, dict, int]:
    """The parts that memory.py predicts, those that tensors of this rank have, and the most of a step by MemTracker."""
    from torch.distributed._tools.mem_tracker import MemTracker

    model, critic = Transformer(config), ScalarModel(Transformer(config), ValueHead(config.dim))
    model.recompute(recompute)
    reference = copy.deepcopy(model).requires_grad_(False)
    shard(torch.device("cpu"), torch.bfloat16, model, reference, critic)
    optimizers = [adamw(model.parameters(), 0.1), adamw(critic.parameters(), 0.1)]
    shape = {"microbatch": tokens, "rows": 8, "length": tokens // 8}
    parts = memory.step_memory(model, **shape, reference=True, critic=True, recompute=recompute)

    def step():
        row = torch.zeros(1, tokens, dtype=torch.int64)
        model.logprob(row, lengths=torch.tensor([tokens])).sum().backward()
        optimizers[0].step()
        held["gradients"] = sum(local(p.grad).nbytes for p in model.parameters())
        optimizers[0].zero_grad(set_to_none=True)

    held = {}
    step()
    critic.values(torch.zeros(1, 8, dtype=torch.int64), lengths=torch.tensor([8])).sum().backward()
    optimizers[1].step()
    sizes = [sum(local(x).nbytes for x in (*m.parameters(), *m.buffers())) for m in (model, reference)]
    states = [sum(local(x).nbytes for s in o.inner.state.values() for x in s.values() if x.ndim) for o in optimizers]
    held |= {"weights": sizes[0], "reference": sizes[1], "moments": states[0]}
    held["critic"] = states[1] + sum(local(p).nbytes + local(p.grad).nbytes for p in critic.parameters())
    with gathered(model), gathered(critic):
        held["copy"] = sum(p.nbytes for p in (*model.parameters(), *critic.parameters()))
    tracker = MemTracker()
    tracker.track_external(model, optimizers[0].inner)
    with tracker:
        step()
    return parts, held, sum(each["Total"] for each in tracker.get_tracker_snapshot("peak").values())


class Stopped(BaseException):
    """Ends a run on all ranks."""


def stop_all(runs: dict, out: Path) -> None:
    """`run_all`, but each run ends after its first checkpoint."""
    save = checkpoint.save

    def last(*args, **kwargs):
        save(*args, **kwargs)
        raise Stopped

    checkpoint.save = last
    try:
        for name, run in runs.items():
            with contextlib.suppress(Stopped):
                run_all({name: run}, out)
    finally:
        checkpoint.save = save


if __name__ == "__main__":  # by torchrun: the file with the runs, and the folder for them
    with distributed.group():
        run_all(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
