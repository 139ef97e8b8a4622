"""What the Triton kernels ask of a GPU, by compiling them for it; no GPU is needed.

    python -m experiments.benchmarks.kernel_resources
    python -m experiments.benchmarks.kernel_resources --save docs/results/kernel_resources.json

Each kernel's own host code runs on small CPU tensors, but its launch is recorded instead of made; then Triton compiles
what would have been launched, with the dtypes, constants and alignments of the arguments, for sm_90 (Hopper), sm_80
(Ampere), and sm_86 and sm_89, whose blocks may have less shared memory. cuobjdump, which Triton carries, tells

registers  of a thread
spills     bytes of a thread that do not fit them
inner      instructions in innermost loops that fetch or put away such bytes: others are paid once, these in every round
shared     bytes of shared memory a block
hgmma      instructions for tensor cores on sm_90
hmma       those before
narrow     products of a stride, or of N, that are taken in 32 bits and may go beyond: there must be none
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch

from minir1 import cli
from minir1.files import write_json

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that a block may ask for
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Config:
    """What to compile."""

    archs: tuple[int, ...] = (90, 80, 86, 89)  # compute capabilities
    cases: tuple[str, ...] = ()  # names as printed, or their beginnings; all if none
    save: Path | None = None  # JSON; with some cases only, the others stay as they are


class Recorder:
    """Stands for a kernel: `recorder[grid](...)` notes the arguments."""

    def __init__(self, fn, launches: list):
        self.fn, self.launches = fn, launches

    def __getitem__(self, grid):
        return lambda *args, **kw: self.launches.append((self.fn, args, kw))


def kernels(name: str):
    """The module of that name; looked for when it is needed, since triton need not be there."""
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
    """Products in 32 bits of a stride, or of N, in Triton's intermediate code, but for a stride by a row of a tile."""
    made = {}  # name -> operation, and the names that it takes
    for name, operation, rest in re.findall(r"^ *(%\w+) = ([\w.]+) (.*)$", ttir, re.M):
        made[name] = operation, re.findall(r"%\w+", rest)

    def through(name: str, operations: tuple[str, ...]) -> str:
        while name in made and made[name][0] in operations:
            name = made[name][1][0]
        return name

    def far(name: str) -> bool:
        return bool(re.fullmatch(r"%(stride_\w+|N)", through(name, ("tt.splat",))))

    def inside(name: str) -> bool:
        return made.get(through(name, ("tt.expand_dims", "tt.broadcast")), ("", ()))[0] == "tt.make_range"

    products = re.findall(r"= arith\.muli (%\w+), (%\w+).* : (?:i32|tensor<[\dx]*xi32>)", ttir)
    return sum(far(a) and not inside(b) or far(b) and not inside(a) for a, b in products)


def inner(sass: str) -> int:
    """Fetches and stores of spilled registers within loops that hold no loop."""
    found = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]
    jumps = [(int(to[1], 16), at) for at, text in found if (to := re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text))]
    loops = [(to, at) for to, at in jumps if to < at]
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b for c, d in loops if (c, d) != (a, b))]
    spilled = [at for at, text in found if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(a <= at <= b for a, b in innermost) for at in spilled)


def build(fn, args: tuple, kw: dict, arch: int) -> dict[str, int]:
    """Compile one launch; the figures of the module's docstring."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: kw.pop(name) for name in ("num_warps", "num_stages") if name in kw}
    values = dict(zip(fn.arg_names, args)) | kw
    free = {p.name for p in fn.params if p.do_not_specialize}
    signature, constants, aligned = {}, {}, {}
    for place, p in enumerate(fn.params):
        x = values[p.name]
        if p.is_constexpr or (x is None or type(x) is int and x == 1 and p.name not in free):  # as a launch does
            signature[p.name], constants[(place,)] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[p.name] = "*" + KINDS[x.dtype]
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = "fp32" if isinstance(x, float) else "i32"
            if type(x) is int and x % 16 == 0 and p.name not in free:
                aligned[(place,)] = [["tt.divisibility", 16]]
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


# ---- what is compiled: name -> module, and a call of its host code -----------------------------------------


def attention_call(d_qk: int, d_v: int, dtype: torch.dtype, **how) -> Callable:
    """Forward and backward of two sequences."""

    def run():
        kernel = kernels("attention")
        cu = torch.tensor([0, 200, 512], dtype=torch.int32)
        q, k, v = (torch.empty(512, heads, size, dtype=dtype) for heads, size in ((8, d_qk), (2, d_qk), (2, d_v)))
        call = dict(scale=0.1, causal=True, window=None, softcap=None) | how
        o, lse = kernel._forward(q, k, v, cu, cu, 312, *call.values())
        kernel._backward(q, k, v, o, lse, o, cu, cu, 312, 312, *call.values())

    return run


def decode_call(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> Callable:
    def run():
        kernel = kernels("decode")
        q = torch.empty(2, tokens, heads, size, dtype=dtype)
        k = torch.empty(2, kv_heads, 4096, size, dtype=dtype).transpose(1, 2)  # as minir1.model.cache lays it
        kernel.decode(q, k, k, torch.zeros(2, dtype=torch.int64), scale=0.1)

    return run


def latent_call(tokens: int, heads: int, dtype: torch.dtype) -> Callable:
    def run():
        kernel = kernels("decode")
        q_lat, q_rope = (torch.empty(2, tokens, heads, size, dtype=dtype) for size in (512, 64))
        kernel.decode_latent(q_lat, q_rope, torch.empty(2, 4096, 576, dtype=dtype), torch.zeros(2, dtype=torch.int64),
                             scale=0.1)

    return run


def logprob_call(engine: str, dtype: torch.dtype) -> Callable:
    """Forward and backward, with entropy."""

    def run():
        kernel = kernels("logprob")
        h, w = (torch.empty(n, 128, dtype=dtype, requires_grad=True) for n in (256, 1024))
        target = torch.zeros(256, dtype=torch.int64)
        logp, entropy = kernel.linear_logprob(h, w, target, temperature=0.9, entropy=True, engine=engine)
        (logp + entropy).sum().backward()

    return run


def kl_call(kind: str, dtype: torch.dtype) -> Callable:
    """Forward and backward of one tile."""

    def run():
        kernel = kernels("kl")
        (h_s, w_s), (h_t, w_t) = [[torch.empty(n, D, dtype=dtype) for n in (64, 1024)] for D in (64, 128)]
        kernel.linear_kl(h_s, w_s.requires_grad_(), h_t, w_t, temperature=0.9, kind=kind).sum().backward()

    return run


def cases() -> Iterator[tuple[str, str, Callable]]:
    """(name, module, call)"""
    for d_qk, d_v in ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)):
        yield f"attention/{d_qk}/{d_v}/bf16", "attention", attention_call(d_qk, d_v, torch.bfloat16)
    for size in (128, 256):
        yield f"attention/{size}/{size}/fp32", "attention", attention_call(size, size, torch.float32)
    yield ("attention/window/softcap/128/128/bf16", "attention",
           attention_call(128, 128, torch.bfloat16, window=512, softcap=50.0))
    for size in (64, 128):
        yield f"decode/{size}/bf16", "decode", decode_call(1, 32, 8, size, torch.bfloat16)
    for size in (128, 256):
        yield f"decode/{size}/bf16/4 new", "decode", decode_call(4, 40, 5, size, torch.bfloat16)
    yield "decode/128/fp32", "decode", decode_call(1, 32, 8, 128, torch.float32)
    yield "decode/latent/128 heads/bf16", "decode", latent_call(1, 128, torch.bfloat16)
    yield "decode/latent/16 heads/bf16", "decode", latent_call(1, 16, torch.bfloat16)
    yield "decode/latent/16 heads/fp32", "decode", latent_call(1, 16, torch.float32)
    for engine in ("fused", "hybrid"):
        yield f"logprob/{engine}/bf16", "logprob", logprob_call(engine, torch.bfloat16)
    yield "logprob/fused/fp32", "logprob", logprob_call("fused", torch.float32)
    for kind in ("forward", "reverse", "js"):
        yield f"kl/{kind}/bf16", "kl", kl_call(kind, torch.bfloat16)


def measure(config: Config) -> dict[str, dict[str, int]]:
    """'attention/128/128/bf16/forward/sm_90' -> its figures."""
    found = {}
    for name, module, run in cases():
        for arch in config.archs:
            if config.cases and not name.startswith(config.cases):
                continue
            for fn, args, kw in record(kernels(module), arch, run):
                key = f"{name}/{fn.fn.__name__.removesuffix('_kernel')}/sm_{arch}"
                found[key] = figures = build(fn, args, dict(kw), arch)
                print(f"{key:60}", *(f"{k} {v:6,}" for k, v in figures.items()), flush=True)
    return found


def main(config: Config) -> dict[str, dict[str, int]]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it")
    version, others = importlib.metadata.version("triton"), {}
    if config.save and config.cases and config.save.exists():
        recorded = json.loads(config.save.read_text(encoding="utf-8"))
        if recorded["triton"] != version:
            raise ValueError(f"cases = {config.cases}: {config.save} is of triton {recorded['triton']}, and this is "
                             f"{version}; compile all, or save elsewhere")
        others = recorded["kernels"]
    found = measure(config)
    if config.save:
        write_json(config.save, {"triton": version, "kernels": others | found})
    return found


if __name__ == "__main__":
    cli.run(main, Config)
