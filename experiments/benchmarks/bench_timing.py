"""What the kernel benchmarks share: interleaved timing, medians, memory peaks, errors against fp64."""

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
from torch import Tensor

from minir1.device import synchronize
from minir1.files import write_json
from minir1.log import table

Timings = dict[str, list[float]]  # variant -> seconds of each repeat
Refused = dict[str, str]  # variant -> why it has no figures
Figures = dict[str, float | str]  # "logprob/8192x4096x32768/fused/seconds" -> a number, "…/refused" -> the reason
T = TypeVar("T")


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float, float]:
    """The result of work(), seconds on the clock, and seconds of processor time."""
    synchronize(device)
    began, began_cpu = time.perf_counter(), time.process_time()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - began, time.process_time() - began_cpu


def refusals() -> tuple[type[Exception], ...]:
    """The exceptions by which a machine or a package refuses a variant.

    torch raises RuntimeError: out of memory, a shape that a backend does not take, a graph that does not compile.
    Packages raise ValueError, AssertionError or, when imported, ImportError. Triton has classes of its own for a kernel
    that needs too much shared memory (OutOfResources) or does not compile.
    """
    known = (RuntimeError, ValueError, AssertionError, ImportError)
    if importlib.util.find_spec("triton") is None:
        return known
    from triton.errors import TritonError

    return *known, TritonError


def attempt(call: Callable[[], T], name: str, refused: Refused) -> T | None:
    """call(), or None if it is refused; the reason, in one line, is printed and stored in refused[name]."""
    try:
        return call()
    except refusals() as error:
        message = getattr(error, "error_message", None) or str(error) or "no reason given"  # Triton's str() has code
        refused[name] = f"{type(error).__name__}: {message.strip().splitlines()[0]}"[:200]
    print(f"{name}: {refused[name]}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # its memory
    return None


def interleaved(variants: dict[str, Callable[[int], object]], repeats: int, device: str,
                refused: Refused | None = None) -> Timings:
    """Seconds of every variant, called in turn, A B C A B C …, after one warm-up round.

    A variant gets the number of the round, by which it can choose other inputs that are in no cache yet. On CUDA the
    time is that between two events; on the CPU it is processor time, which other work on the machine hardly lengthens.

    With `refused`, a variant that fails in any round is left out, and the reason is stored there; without it, the
    error is raised.
    """
    times: Timings = {name: [] for name in variants}
    seconds_of = _cuda_seconds if device == "cuda" else lambda run, i: timed(lambda: run(i), torch.device("cpu"))[2]
    for i in range(repeats + 1):
        for name in list(times):
            call = partial(seconds_of, variants[name], i)
            seconds = call() if refused is None else attempt(call, name, refused)
            if seconds is None:
                del times[name]
            elif i:
                times[name].append(seconds)
    return times


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


def measure(key: str, runs: dict[str, Callable[[int], object]], repeats: int, device: str, work: float, ceiling: float,
            unit: str = "", peak: bool = False) -> Figures:
    """Of every run: median seconds, their ratio to the floor, with a unit the rate in 10^12 per second, with `peak`
    MiB on the device; or the reason why it has no figures.

    work: operations or bytes; ceiling: what the device reaches, in 10^12 per second. The floor is work / ceiling.
    """
    figures, refused = {}, {}
    for name, times in interleaved(runs, repeats, device, refused).items():
        seconds = statistics.median(times)
        figures |= {f"{key}/{name}/seconds": seconds, f"{key}/{name}/of_floor": seconds / (work / (ceiling * 1e12))}
        if unit:
            figures[f"{key}/{name}/{unit}"] = work / seconds / 1e12
        if peak and (mib := attempt(lambda: cuda_peak(runs[name]), name, refused)) is not None:
            figures[f"{key}/{name}/peak_mib"] = mib
    return figures | {f"{key}/{name}/refused": reason for name, reason in refused.items()}


def accuracy(key: str, ways: dict[str, Callable], exact_way: Callable, results: Callable[..., tuple[Tensor, ...]],
             batch: list[Tensor], errors: dict[str, Callable[[Tensor, Tensor], float]]) -> Figures:
    """The error of each of results(way, batch), in the order of `errors`, against the exact way in fp64."""
    in_fp64 = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in batch]
    exact, figures, refused = results(exact_way, in_fp64), {}, {}
    for name, way in ways.items():
        values = attempt(lambda: results(way, batch), name, refused) or ()
        for (what, error), value, want in zip(errors.items(), values, exact):
            figures[f"{key}/{name}/{what}"] = error(value, want)
    return figures | {f"{key}/{name}/refused": reason for name, reason in refused.items()}


def largest(a: Tensor, exact: Tensor) -> float:
    """max |a - exact|."""
    return (a - exact).abs().max().item()


def relative(a: Tensor, exact: Tensor) -> float:
    """|a - exact| / |exact|, in the 2-norm."""
    return ((a - exact).norm() / exact.norm()).item()


def report(title: str, figures: Figures, out: Path | None) -> None:
    """Print the figures, and write them to a JSON file."""
    rows = [[key, f"{value:.4g}" if isinstance(value, float) else value] for key, value in figures.items()]
    table(title, ["", "measured"], rows)
    if out:
        write_json(out, figures)


def cpu_peak(work: Callable[..., Callable[[], object]], *args) -> float:
    """MiB of resident memory that work(*args)() adds at its peak, in a new process; nan where /proc has no peak.

    work makes the inputs and returns the call to be measured.
    """
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(_peak_here, (work, args))


def _peak_here(work, args) -> float:
    torch.set_num_threads(1)
    run = work(*args)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
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
    """MiB on the device that run(0) adds at its peak."""
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
