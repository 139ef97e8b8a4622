"""What each Triton kernel needs of a GPU (registers, shared memory, tensor cores), found by compiling it without one.

    python -m experiments.benchmarks.kernel_resources
    python -m experiments.benchmarks.kernel_resources --save docs/results/kernel_resources.json

Each kernel's own host code runs on small CPU tensors, but its launches are recorded and not made. Triton then compiles
what would have been launched, with the dtypes, constants and alignments of the arguments, for sm_90 (Hopper), sm_80
(Ampere), and sm_86 and sm_89, whose blocks may have less shared memory. From the machine code, by the cuobjdump that
comes with Triton:

registers  per thread
spills     bytes per thread that do not fit into the registers
inner      instructions in innermost loops that load or store such bytes: others run once, these in every iteration
shared     bytes of shared memory per block
hgmma      tensor-core instructions of sm_90
hmma       tensor-core instructions of earlier GPUs
narrow     32-bit products of a stride, of N or of `plane`, which may overflow: there must be none
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from minir1 import cli
from minir1.files import read_json, write_json
from minir1.settings import at_least, new_file

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that a block may ask for
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Config:
    """What to compile."""

    archs: tuple[int, ...] = (90, 80, 86, 89)  # compute capabilities
    cases: tuple[str, ...] = ()  # names as printed, or their beginnings; (): all
    save: Path | None = None  # a JSON file; with `cases`, the other entries in it stay as they are

    def __post_init__(self):
        at_least(self, 1, "archs")
        new_file(self, "save")


class Recorder:
    """Stands for a kernel: `recorder[grid](...)` notes the arguments."""

    def __init__(self, fn, launches: list):
        self.fn, self.launches = fn, launches

    def __getitem__(self, grid):
        return lambda *args, **kw: self.launches.append((self.fn, args, kw))


def kernels(name: str):
    """The module minir1.kernels.`name`, imported when it is needed, since triton may not be installed."""
    return importlib.import_module(f"minir1.kernels.{name}")


def record(module, arch: int, run: Callable) -> list[tuple]:
    """The launches (kernel, args, keywords) that run() makes in a module of minir1.kernels on a GPU of that arch."""
    launches = []
    with ExitStack() as stack:
        for name, fn in vars(module.jit).items():
            if name.endswith("_kernel"):
                stack.enter_context(patch.object(module.jit, name, Recorder(fn, launches)))
        stack.enter_context(patch.object(kernels("attention"), "gpu", lambda x: (arch // 10, SHARED[arch])))
        run()
    return launches


def narrow(ttir: str) -> int:
    """Count the 32-bit products of a stride, N or `plane` in Triton's intermediate code, except stride · row of a tile.
    """
    operands = re.findall(r"^ *(%\w+) = ([\w.]+) (.*)$", ttir, re.M)
    made = {name: (operation, re.findall(r"%\w+", rest)) for name, operation, rest in operands}

    def through(name: str, operations: tuple[str, ...]) -> str:
        while name in made and made[name][0] in operations:
            name = made[name][1][0]
        return name

    def far(name: str) -> bool:
        return bool(re.fullmatch(r"%(stride_\w+|N|plane)", through(name, ("tt.splat",))))

    def inside(name: str) -> bool:
        return made.get(through(name, ("tt.expand_dims", "tt.broadcast")), ("", ()))[0] == "tt.make_range"

    products = re.findall(r"= arith\.muli (%\w+), (%\w+).* : (?:i32|tensor<[\dx]*xi32>)", ttir)
    return sum(far(a) and not inside(b) or far(b) and not inside(a) for a, b in products)


def inner(sass: str) -> int:
    """Count the loads and stores of spilled registers in loops that contain no loop."""
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text))]
    loops = [(to, at) for to, at in jumps if to < at]
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b for c, d in loops if (c, d) != (a, b))]
    spilled = [at for at, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(a <= at <= b for a, b in innermost) for at in spilled)


def build(fn, args: tuple, kw: dict, arch: int) -> dict[str, int]:
    """Compile one launch and count what the module's docstring lists."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: kw.pop(name) for name in ("num_warps", "num_stages") if name in kw}
    values = dict(zip(fn.arg_names, args)) | kw
    free = {p.name for p in fn.params if p.do_not_specialize}
    signature, constants, aligned = {}, {}, {}
    for i, p in enumerate(fn.params):
        x = values[p.name]
        if p.is_constexpr or (x is None or type(x) is int and x == 1 and p.name not in free):  # as a launch does
            signature[p.name], constants[(i,)] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[p.name] = "*" + KINDS[x.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = "fp32" if isinstance(x, float) else "i32"
            if type(x) is int and x % 16 == 0 and p.name not in free:
                aligned[(i,)] = [["tt.divisibility", 16]]
    built = triton.compile(ASTSource(fn, signature, constants, aligned), target=GPUTarget("cuda", arch, 32),
                           options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        ask = lambda flag: subprocess.check_output([tool, flag, file.name], text=True, stderr=subprocess.DEVNULL)
        usage, sass = ask("-res-usage"), ask("-sass")
    ttir = built.asm["ttir"]
    if f"%{fn.arg_names[0]}" not in ttir:
        raise ValueError("this triton does not name arguments in its intermediate code, by which `narrow` looks")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]),
        "inner": inner(sass),
        "shared": built.metadata.shared,
        "hgmma": len(re.findall(r"\bHGMMA", sass)),
        "hmma": len(re.findall(r"\bHMMA", sass)),
        "narrow": narrow(ttir),
    }


# ---- what is compiled: host code that makes the launches --------------------------------------------------


def attention(d_qk: int, d_v: int, dtype: torch.dtype, **how) -> None:
    """Forward and backward of two sequences."""
    kernel = kernels("attention")
    cu = torch.tensor([0, 200, 512], dtype=torch.int32)
    q, k, v = (torch.empty(512, heads, size, dtype=dtype) for heads, size in ((8, d_qk), (2, d_qk), (2, d_v)))
    call = dict(scale=0.1, causal=True, window=None, softcap=None) | how
    o, lse = kernel._forward(q, k, v, cu, cu, 312, *call.values())
    kernel._backward(q, k, v, o, lse, o, cu, cu, 312, 312, *call.values())


def decode(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    q = torch.empty(2, tokens, heads, size, dtype=dtype)
    k = torch.empty(2, kv_heads, 4096, size, dtype=dtype).transpose(1, 2)  # the layout of minir1.model.cache
    kernels("decode").decode(q, k, k, torch.zeros(2, dtype=torch.int64), scale=0.1)


def decode_latent(tokens: int, heads: int, dtype: torch.dtype) -> None:
    q_lat, q_rope = (torch.empty(2, tokens, heads, size, dtype=dtype) for size in (512, 64))
    latent, past = torch.empty(2, 4096, 576, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    kernels("decode").decode_latent(q_lat, q_rope, latent, past, scale=0.1)


def logprob(engine: str, dtype: torch.dtype, softcap: float | None = None) -> None:
    """Forward and backward, with entropy."""
    h, w = (torch.empty(n, 128, dtype=dtype, requires_grad=True) for n in (256, 1024))
    target = torch.zeros(256, dtype=torch.int64)
    logp, entropy = kernels("logprob").linear_logprob(h, w, target, temperature=0.9, softcap=softcap, entropy=True,
                                                      engine=engine)
    (logp + entropy).sum().backward()


def kl(kind: str, dtype: torch.dtype) -> None:
    """Forward and backward of one tile."""
    (h_s, w_s), (h_t, w_t) = [[torch.empty(n, D, dtype=dtype) for n in (64, 1024)] for D in (64, 128)]
    kernels("kl").linear_kl(h_s, w_s.requires_grad_(), h_t, w_t, temperature=0.9, kind=kind).sum().backward()


def cases() -> dict[str, Callable[[], None]]:
    """Name, which starts with that of the module -> a call that launches its kernels."""
    bf16, fp32 = torch.bfloat16, torch.float32
    heads = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
    calls = {f"attention/{d_qk}/{d_v}/bf16": partial(attention, d_qk, d_v, bf16) for d_qk, d_v in heads}
    calls |= {f"attention/{size}/{size}/fp32": partial(attention, size, size, fp32) for size in (128, 256)}
    calls["attention/window/softcap/128/128/bf16"] = partial(attention, 128, 128, bf16, window=512, softcap=50.0)
    calls |= {f"decode/{size}/bf16": partial(decode, 1, 32, 8, size, bf16) for size in (64, 128)}
    calls |= {f"decode/{size}/bf16/4 new": partial(decode, 4, 40, 5, size, bf16) for size in (128, 256)}
    calls["decode/128/fp32"] = partial(decode, 1, 32, 8, 128, fp32)
    calls |= {f"decode/latent/{heads} heads/bf16": partial(decode_latent, 1, heads, bf16) for heads in (128, 16)}
    calls["decode/latent/16 heads/fp32"] = partial(decode_latent, 1, 16, fp32)
    for engine in ("fused", "hybrid"):
        calls[f"logprob/{engine}/bf16"] = partial(logprob, engine, bf16)
        calls[f"logprob/softcap/{engine}/bf16"] = partial(logprob, engine, bf16, softcap=50.0)
    calls["logprob/fused/fp32"] = partial(logprob, "fused", fp32)
    return calls | {f"kl/{kind}/bf16": partial(kl, kind, bf16) for kind in ("forward", "reverse", "js")}


def measure(config: Config) -> dict[str, dict[str, int]]:
    """'attention/128/128/bf16/forward/sm_90' -> its figures."""
    measured = {}
    chosen = {name: run for name, run in cases().items() if not config.cases or name.startswith(config.cases)}
    if not chosen:
        raise ValueError(f"cases = {config.cases}: none begins so; they are {', '.join(cases())}")
    for name, run in chosen.items():
        for arch in config.archs:
            for fn, args, kw in record(kernels(name.split("/")[0]), arch, run):
                key = f"{name}/{fn.fn.__name__.removesuffix('_kernel')}/sm_{arch}"
                measured[key] = figures = build(fn, args, dict(kw), arch)
                print(f"{key:60}", *(f"{k} {v:6,}" for k, v in figures.items()), flush=True)
    return measured


def main(config: Config) -> dict[str, dict[str, int]]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it")
    version, others = importlib.metadata.version("triton"), {}
    if config.save and config.cases and config.save.exists():
        recorded = read_json(config.save)
        if recorded["triton"] != version:
            raise ValueError(f"cases = {config.cases}: {config.save} is of triton {recorded['triton']}, and this is "
                             f"{version}; compile all, or save elsewhere")
        others = recorded["kernels"]
    measured = measure(config)
    if config.save:
        write_json(config.save, {"triton": version, "kernels": others | measured})
    return measured


if __name__ == "__main__":
    cli.run(main, Config)
