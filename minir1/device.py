"""Device and dtype of a run, and its memory."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

from minir1.ranks import world

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WITHOUT_FLOAT64 = ("mps",)  # types of devices


def pick(name: str | torch.device = "auto") -> torch.device:
    """The device of this name, such as cpu, cuda, cuda:1 or mps; `auto` is the GPU if there is one, else the CPU.

    ValueError where this machine has no such device.
    """
    custom = torch._C._get_privateuse1_backend_name()  # of a backend that some package has registered
    kinds = [kind for kind in ("cuda", "mps", custom) if hasattr(torch, kind) and getattr(torch, kind).is_available()]
    if name == "auto":
        return torch.device(next((kind for kind in kinds if kind != custom), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:  # a name that torch does not know
        device = None
    if device is not None and device.index is not None and world() > 1:
        raise ValueError(f"device = {str(name)!r}: each of {world()} ranks has the GPU of its number, without an index")
    here = device is not None and device.type in (*kinds, "cpu")
    if not here or (device.index or 0) >= torch.get_device_module(device).device_count():
        raise ValueError(f"device = {str(name)!r}: this machine has {', '.join((*kinds, 'cpu'))}, or auto")
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of a model's weights: float32 | bfloat16; None is bfloat16 on a GPU that computes in it, else float32.

    A CPU without instructions for 16-bit products emulates them; for bfloat16 there, a line says how slow that is.
    ValueError for another name.
    """
    if name is None:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype = {name!r}: {', '.join(DTYPES)}, or None for the device's default")
    if name == "bfloat16" and device.type == "cpu" and not _cpu_multiplies_bf16():
        print(
            "dtype = bfloat16: this CPU has no 16-bit products, so training is slow (on the shape of Qwen2.5-0.5B a "
            "backward pass took 78 s, and 1.6 s in float32)"
        )
    return DTYPES[name]


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bfloat16: those of AVX-512 or AMX, or it is no x86 CPU."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def widest(device: torch.device) -> torch.dtype:
    """The most exact dtype that the device computes in: float64, on Apple's GPUs float32."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished, before a clock is read."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def peak_memory_gib(device: torch.device | str = "cpu") -> float:
    """The most memory in use so far, in GiB: of torch's tensors on CUDA, of the whole process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


def free_memory_gib(device: torch.device | str = "cpu") -> float | None:
    """Free memory in GiB: on CUDA that of the GPU, on Linux that of the system within the container's limit; None where
    it is unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 2**10
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
    if limit != "max":
        free = min(free, int(limit) - int((group / "memory.current").read_text()))
    return free / 2**30
