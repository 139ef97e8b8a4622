"""A function on several ranks: processes of this machine that talk over gloo, on the CPU."""

import faulthandler
import math
import os
import pickle
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GRACE = 2.0  # seconds for the other ranks to end once one has failed
PRELOAD = ["torch.distributed.fsdp", "minir1.rollout", "pytest"]  # imported once, by the process that ranks fork from


class RankError(Exception):
    """The traceback of a rank, as the cause of the error that it raised."""


def on_ranks(world: int, function, *args, timeout: float = 120.0) -> list:
    """[function(*args) on rank 0, on rank 1, …], each in a new process with one thread and a process group over gloo.

    The function is one of a module; it, its arguments and results are picklable. The first error that a rank raises is
    raised here, with its traceback there as cause. RuntimeError if a rank dies; TimeoutError, with where each rank
    stands, if one does not return within `timeout` seconds, its imports not counted. No process outlives the call.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, context = Path(name), mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        arguments = world, folder, timeout, function, args
        ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(world)]
        try:
            for process in ranks:
                process.start()
            outcomes = _wait(ranks, folder)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        dead = {rank: ranks[rank].exitcode for rank, outcome in outcomes.items() if outcome is None}
        if dead:
            raise RuntimeError(f"ranks that died, with their exit codes: {dead}")
        errors = [outcome for outcome in outcomes.values() if outcome[0] == "raised"]
        if errors:
            _, _, error, text = min(errors, key=lambda outcome: outcome[1])
            raise error from RankError(text)
        if len(outcomes) < world:
            stacks = [f"\nrank {rank}: {(folder / f'{rank}.stack').read_text()}" for rank in range(world)]
            raise TimeoutError(f"not all of {world} ranks have returned within {timeout:g} s{''.join(stacks)}")
        return [outcomes[rank][2] for rank in range(world)]


def _rank(rank: int, world: int, folder: Path, timeout: float, function, args: tuple) -> None:
    """One rank; what it returned or raised is in a file once that has its name."""
    torch.set_num_threads(1)
    faulthandler.enable(sys.__stderr__)  # gloo aborts where collectives do not match
    with open(folder / f"{rank}.stack", "w") as stack:
        faulthandler.dump_traceback_later(timeout, file=stack)
        patience = timedelta(seconds=timeout + 60)  # the stacks are to be written first
        try:
            store = f"file://{folder / 'store'}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
            torch.manual_seed(0)
            outcome = pickle.dumps(("returned", time.time(), function(*args), None))
            dist.barrier()  # the first to end would close the connections of the others
        except BaseException as error:
            outcome = _raised(error, f"rank {rank} of {world}\n{traceback.format_exc()}")
        faulthandler.cancel_dump_traceback_later()
    (folder / f"{rank}.part").write_bytes(outcome)
    (folder / f"{rank}.part").rename(folder / f"{rank}.outcome")
    os._exit(0)  # the destructor of a process group may wait for ranks that are gone


def _raised(error: BaseException, text: str) -> bytes:
    """The outcome of a rank that raised; a RuntimeError in place of an error that cannot be pickled."""
    try:
        outcome = pickle.dumps(("raised", time.time(), error, text))
        pickle.loads(outcome)
        return outcome
    except Exception:
        return pickle.dumps(("raised", time.time(), RuntimeError(f"{type(error).__name__}: {error}"), text))


def _outcome(folder: Path, rank: int) -> tuple | None:
    """("returned" or "raised", when, result or error, traceback), or None if the rank has written none."""
    file = folder / f"{rank}.outcome"
    return pickle.loads(file.read_bytes()) if file.exists() else None


def _wait(ranks: list, folder: Path) -> dict[int, tuple | None]:
    """The outcomes of the ranks that have ended: of all, or of those that end within GRACE after the first failure."""
    outcomes, end = {}, math.inf
    while len(outcomes) < len(ranks) and time.monotonic() < end:
        time.sleep(0.02)
        for rank, process in enumerate(ranks):
            if rank not in outcomes and not process.is_alive():
                outcomes[rank] = _outcome(folder, rank)
        late = any(stack.stat().st_size for stack in folder.glob("*.stack"))
        if late or any(outcome is None or outcome[0] == "raised" for outcome in outcomes.values()):
            end = min(end, time.monotonic() + GRACE)
    return outcomes
