"""How the benchmarks of the kernels measure: interleaved, with medians, and each memory peak in its own process."""

from __future__ import annotations

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

Timings = dict[str, list[float]]  # variant -> seconds of each repeat
Refused = dict[str, str]  # variant -> why it has no figures
Figures = dict[str, float | str]  # "logprob/8192x4096x32768/fused/seconds", or "…/refused" -> what the JSON says
T = TypeVar("T")


def refusals() -> tuple[type[Exception], ...]:
    """What is raised where a machine, or the package behind a variant, cannot have it.

    torch refuses by RuntimeError: memory, a backend that takes no such shape, a graph that does not compile. Packages
    refuse by ValueError, by assertions, or when they are imported. Triton's errors, for a kernel that asks for more
    shared memory than there is (OutOfResources) or does not compile, are none of these.
    """
    known = (RuntimeError, ValueError, AssertionError, ImportError)
    if importlib.util.find_spec("triton") is None:
        return known
    from triton.errors import TritonError

    return *known, TritonError


def attempt(call: Callable[[], T], name: str, refused: Refused) -> T | None:
    """call(), or None if it cannot be had here: then refused[name] says why, in one line, and so does the screen."""
    try:
        return call()
    except refusals() as error:
        message = getattr(error, "error_message", None) or str(error) or "no reason given"  # Triton's: with code
        refused[name] = f"{type(error).__name__}: {message.strip().splitlines()[0]}"[:200]
    print(f"{name}: {refused[name]}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what it had of the memory
    return None


def interleaved(variants: dict[str, Callable[[int], object]], repeats: int, device: str,
                refused: Refused | None = None) -> Timings:
    """Seconds of every variant, called in turn, A B C A B C …, after one round that does not count.

    A variant gets the number of the round, by which it may choose other inputs, so that none is in a cache already. On
    CUDA the time is that between two events; on the CPU it is that of the processor, which other work on the machine
    does not lengthen (much); with one thread that is the time it would take alone.

    With `refused`, a variant that cannot run, in whichever round, is left out, and why is noted there; without, its
    error ends the comparison.
    """
    times: Timings = {name: [] for name in variants}
    seconds_of = _cuda_seconds if device == "cuda" else _cpu_seconds
    for i in range(repeats + 1):
        for name in list(times):
            call = partial(seconds_of, variants[name], i)
            seconds = call() if refused is None else attempt(call, name, refused)
            if seconds is None:
                del times[name]
            elif i:
                times[name].append(seconds)
    return times


def _cpu_seconds(run, i: int) -> float:
    began = time.process_time()
    run(i)
    return time.process_time() - began


def _cuda_seconds(run, i: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(i)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def against(times: Timings, base: str) -> dict[str, tuple[float, float]]:
    """variant -> median seconds, and the median over the rounds of its time divided by that of `base`."""
    medians = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[base])]
        medians[name] = statistics.median(seconds), statistics.median(ratios)
    return medians


def cpu_peak(work: Callable[..., Callable[[], object]], *args) -> float:
    """MiB of resident memory that work(*args)() takes at its peak beyond what is there before it, in a new process.

    work makes the inputs and returns what is to be measured. nan where /proc does not tell the peak.
    """
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(_peak_here, (work, args))


def _peak_here(work, args) -> float:
    torch.set_num_threads(1)
    run = work(*args)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        result = run()
        peak = _status("VmHWM") - before
    except OSError:
        return float("nan")
    del result
    return peak


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def cuda_peak(run: Callable[[int], object]) -> float:
    """MiB on the device that run takes at its peak beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings() -> dict[str, float]:
    """What the device reaches at best: TFLOP/s of a large bf16 product, TB/s of a copy (read and write counted)."""
    a, b = (torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2, 1 << 28, device="cuda")
    goal = torch.empty_like(source[0])
    times = interleaved({"mm": lambda i: a[i % 2] @ b[i % 2], "copy": lambda i: goal.copy_(source[i % 2])}, 30, "cuda")
    best = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {"tflops": 2 * 8192**3 / best["mm"] / 1e12, "tb_s": 2 * goal.nbytes / best["copy"] / 1e12}
