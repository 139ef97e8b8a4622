"""The kernels compiled for GPUs that are not here: registers, spills, shared memory, tensor cores, 64-bit offsets.

Compiling needs no GPU, but a process in which TRITON_INTERPRET was never set; the figures come from the machine code,
through the cuobjdump that triton carries.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("minir1.kernels.logprob", exc_type=ImportError)  # a checkout without links
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ROOT = Path(__file__).parent.parent
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes of a block; the compiler does not check
SLACK = 8  # registers that another patch version of Triton may give more or less

COMPILE = """
import importlib, json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

tool, jobs = json.loads(sys.stdin.read())
for job in jobs:
    fn = getattr(importlib.import_module(job["module"]), job["kernel"])
    index = {name: (i,) for i, name in enumerate(fn.arg_names)}
    const, types = job["const"], job["types"]
    signature = {name: "constexpr" if name in const else types.get(name, "i32") for name in fn.arg_names}
    aligned = {index[name]: [["tt.divisibility", 16]] for name in job["aligned"]}
    source = ASTSource(fn, signature, {index[name]: value for name, value in const.items()}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", job["arch"], 32), options=job["options"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"]), f.flush()
        run = lambda flag: subprocess.check_output([tool, flag, f.name], text=True)
        usage, sass = run("-res-usage"), run("-sass")
    figures = {
        "registers": int(re.search(r"REG:(\\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\\d+)", usage)[1]) + int(re.search(r"LOCAL:(\\d+)", usage)[1]),
        "shared": built.metadata.shared,
        "hgmma": len(re.findall(r"\\bHGMMA", sass)),
        "hmma": len(re.findall(r"\\bHMMA", sass)),
        "narrow": len(re.findall(r"tt.addptr .*, tensor<[0-9x]*xi32>", built.asm["ttir"])),
    }
    print("FIGURES", json.dumps(figures))
"""


def compiled(jobs: list[dict]) -> list[dict]:
    """What the machine code of each job needs: dict(module, kernel, arch, const, types, aligned, options)."""
    if not TOOL.exists():
        pytest.skip("this triton carries no cuobjdump")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        input=json.dumps([str(TOOL), jobs]),
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT, text=True, capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    assert len(figures) == len(jobs)
    return figures


# ---------------------------------------------------------------- log-probs

PRODUCT = ("h_ptr", "w_ptr", "D", "stride_hn", "stride_wv")  # aligned by 16, as a model's are
BLOCKS = """
import json, torch
from minir1.kernels import logprob
print(json.dumps([logprob.BLOCKS[torch.float32], logprob.BLOCKS[torch.bfloat16], logprob.FOLD, logprob.SPLIT]))
"""
LOGPROB = [  # kernel, dtype, sm -> registers, up to SLACK, bytes spilled, and bytes of shared memory at most
    ("partials_kernel", "bf16", 80, 255, 0, 65536),
    ("partials_kernel", "bf16", 89, 255, 8, 65536),
    ("partials_kernel", "bf16", 90, 248, 0, 98304),
    ("partials_kernel", "fp32", 90, 164, 0, 24576),
    ("dx_kernel", "bf16", 80, 254, 0, 65536),
    ("dx_kernel", "bf16", 89, 254, 0, 65536),
    ("dx_kernel", "bf16", 90, 201, 0, 98304),
    ("fold_kernel", "fp32", 90, 72, 0, 64),
    ("unfold_kernel", "bf16", 90, 79, 0, 0),
]


def logprob_jobs() -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the sizes of a GPU
    sizes = subprocess.check_output([sys.executable, "-c", BLOCKS], env=env, cwd=ROOT, text=True)
    fp32, bf16, fold, split = json.loads(sizes)
    jobs = []
    for kernel, dtype, arch, *_ in LOGPROB:
        product = kernel in ("partials_kernel", "dx_kernel")
        const = dict({"fp32": fp32, "bf16": bf16}[dtype] if product else fold)
        options = {key: const.pop(key) for key in ("num_warps", "num_stages") if key in const}
        const |= {"SOFTCAP": True}
        const |= {"INTERPRET": False, "stride_hd": 1, "stride_wd": 1} if product else {}
        const |= {"partials_kernel": {"SPLIT": split}, "dx_kernel": {"GROUP": 8}}.get(kernel, {})
        const |= {"ENTROPY": True} if kernel in ("dx_kernel", "unfold_kernel") else {}
        types = dict.fromkeys(("scale", "cap", "inv_temperature"), "fp32") | {"target_ptr": "*i64"}
        types |= dict.fromkeys(("x_ptr", "part_ptr", "state_ptr", "stat_ptr", "grad_ptr"), "*fp32")
        types |= dict.fromkeys(("h_ptr", "w_ptr", "dx_ptr"), f"*{dtype}")
        aligned = list(PRODUCT) if product else ["x_ptr", "stride_x"]
        aligned += ["dx_ptr", "stride_dx"] if kernel in ("dx_kernel", "unfold_kernel") else []
        case = dict(module="minir1.kernels.logprob_jit", kernel=kernel, arch=arch)
        jobs.append(case | dict(const=const, types=types, aligned=aligned, options=options))
    return jobs


def test_logprob():
    for (kernel, dtype, arch, registers, spilled, shared), figures in zip(LOGPROB, compiled(logprob_jobs())):
        where = kernel, dtype, arch, figures
        assert abs(figures["registers"] - registers) <= SLACK and figures["spilled"] == spilled, where
        assert figures["shared"] <= min(shared, SHARED[arch]), where
        assert figures["narrow"] == 0, where  # offsets into [N, D], [V, D] and [N, V] of 64 bits
        tensor_cores = figures["hgmma" if arch == 90 else "hmma"]
        assert (tensor_cores > 0) == (dtype == "bf16" and "fold" not in kernel), where  # fp32 is not rounded to tf32


# ---------------------------------------------------------------- divergences

KL_FOLD = "import json; from minir1.kernels import kl; print(json.dumps(kl.FOLD))"
KL = [  # kernel, kind, sm -> registers at most: 64 let a GPU run the 1024 blocks of a tile at once
    ("fold_kernel", None, 90, 64),
    ("mixture_kernel", None, 90, 64),
    ("unfold_kernel", "forward", 80, 64),
    ("unfold_kernel", "reverse", 90, 64),
    ("unfold_kernel", "js", 90, 64),
]


def kl_jobs() -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    fold = json.loads(subprocess.check_output([sys.executable, "-c", KL_FOLD], env=env, cwd=ROOT, text=True))
    jobs = []
    for kernel, kind, arch, _ in KL:
        const = {key: size for key, size in fold.items() if key.startswith("BLOCK")} | ({"KIND": kind} if kind else {})
        x = ["x_a_ptr", "x_b_ptr"] if kernel == "fold_kernel" else ["x_s_ptr", "x_t_ptr"]
        types = dict.fromkeys([*x, "state_ptr", "stat_ptr", "kl_ptr", "g_ptr"], "*fp32")
        types |= {"inv_temperature": "fp32", "dx_ptr": "*bf16"}
        aligned = [*x, "stride_x", *(["dx_ptr", "stride_dx"] if kind else [])]
        case = dict(module="minir1.kernels.kl_jit", kernel=kernel, arch=arch, options={"num_warps": fold["num_warps"]})
        jobs.append(case | dict(const=const, types=types, aligned=aligned))
    return jobs


def test_kl():
    for (kernel, kind, arch, registers), figures in zip(KL, compiled(kl_jobs())):
        where = kernel, kind, arch, figures
        assert figures["registers"] <= registers and figures["spilled"] == 0 and figures["shared"] <= 1024, where
        assert figures["narrow"] == 0, where  # offsets into the tile, dx [N, V] and the numbers of a token of 64 bits
        assert figures["hgmma"] + figures["hmma"] == 0, where  # the products are torch's
