"""What the kernels need of a GPU: the recorded figures, and some kernels compiled again, without a GPU."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from experiments.benchmarks import kernel_resources

ROOT = Path(__file__).parent.parent
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes per block; the compiler does not check
SLACK = 8  # registers by which another version of Triton may differ
RECORD = json.loads((ROOT / "docs" / "results" / "kernel_resources.json").read_text())
RECORDED = RECORD["kernels"]
PRODUCTS = {"forward", "dq", "dkv", "split", "partials", "dx"}  # kernels with matrix products


@pytest.mark.parametrize("key", RECORDED)
def test_recorded(key):
    """Every kernel fits, uses tensor cores for products of 16-bit numbers and for nothing else, spills next to nothing,
    with 16-bit numbers nothing in its inner loops, and computes its addresses in 64 bits. With 64 registers a GPU runs
    the 1024 blocks of a tile of kl at once."""
    figures, (kernel, arch) = RECORDED[key], key.split("/")[-2:]
    assert figures["shared"] <= SHARED[int(arch.removeprefix("sm_"))]
    products = kernel in PRODUCTS and "bf16" in key
    assert (figures["hgmma"] + figures["hmma"] > 0) == products
    assert arch == "sm_90" or figures["hgmma"] == 0
    assert figures["spills"] <= (96 if "bf16" in key else 192), "bytes a thread"
    assert figures["inner"] == 0 or "256/256/fp32" in key
    assert figures["narrow"] == 0
    if key.startswith("kl/"):
        assert figures["registers"] <= 64 and figures["shared"] <= 1024 and figures["spills"] == 0
    if key.startswith("logprob/"):
        assert figures["spills"] <= 8 and figures["shared"] <= (98304 if arch == "sm_90" else 65536)


def test_every_case_is_recorded_for_every_gpu():
    cases = [{key.removesuffix(f"/sm_{arch}") for key in RECORDED if key.endswith(f"/sm_{arch}")} for arch in SHARED]
    assert cases[0] and all(figures == cases[0] for figures in cases)
    assert {"/".join(key.split("/")[:-1]) for key in cases[0]} == kernel_resources.cases().keys()
    assert kernel_resources.SHARED == SHARED and set(kernel_resources.Config().archs) == set(SHARED)


def test_hopper_runs_warpgroups():
    """Where a block has 64 rows or more, as in all that training asks for."""
    for size in ("64/64", "128/128", "192/128"):
        for kernel in ("forward", "dq", "dkv"):
            assert RECORDED[f"attention/{size}/bf16/{kernel}/sm_90"]["hgmma"] > 0
    assert RECORDED["decode/latent/128 heads/bf16/split/sm_90"]["hgmma"] > 0


@pytest.mark.skipif(not TOOL.exists(), reason="this triton carries no cuobjdump")
@pytest.mark.parametrize("arch,cases", [
    (90, ("attention/192/128/bf16", "decode/latent/128 heads/bf16", "logprob/", "kl/reverse", "kl/js")),
    (80, ("attention/128/128/bf16", "decode/128/bf16", "logprob/softcap/fused", "kl/forward")),
    (89, ("attention/256/256/bf16", "decode/256/bf16", "logprob/softcap/fused")),
])
def test_compiled_now(arch, cases, tmp_path):
    """As recorded: exactly with the version of Triton that made the record, with another up to SLACK."""
    save = tmp_path / "figures.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "experiments.benchmarks.kernel_resources"]
    command += ["--archs", f"{arch}", "--save", save, "--cases", *cases]
    done = subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(save.read_text())
    recorded = {key: want for key, want in RECORDED.items() if key.startswith(cases) and key.endswith(f"sm_{arch}")}
    assert result["kernels"].keys() == recorded.keys()
    for key, figures in result["kernels"].items():
        want = recorded[key]
        assert figures == want or result["triton"] != RECORD["triton"], key
        assert figures["shared"] <= min(SHARED[arch], 1.25 * want["shared"]), key
        assert abs(figures["registers"] - want["registers"]) <= SLACK, key
        assert all(figures[name] == want[name] for name in ("spills", "inner", "narrow")), key
        for name in ("hgmma", "hmma"):
            assert (figures[name] > 0) == (want[name] > 0), key


TTIR = """
  tt.func public @kernel(%q_ptr: !tt.ptr<bf16> loc("q_ptr"(#loc)), %N: i32 loc("N"(#loc)), %stride_qn: i32 loc(#loc))
    %first = arith.muli %at, %c128_i32 : i32 loc(#loc1)
    %wide = arith.extsi %first : i32 to i64 loc(#loc2)
    %s = arith.extsi %stride_qn : i32 to i64 loc(#loc2)
    %x = arith.muli %wide, %s : i64 loc(#loc2)
    %rows = tt.make_range {end = 128 : i32, start = 0 : i32} : tensor<128xi32> loc(#loc3)
    %rows_1 = tt.expand_dims %rows {axis = 1 : i32} : tensor<128xi32> -> tensor<128x1xi32> loc(#loc3)
    %each = tt.splat %stride_qn : i32 -> tensor<128x1xi32> loc(#loc3)
    %inside = arith.muli %rows_1, %each : tensor<128x1xi32> loc(#loc3)
"""
BEYOND = [
    "%y = arith.muli %first, %stride_qn : i32 loc(#loc4)",
    "%y = arith.muli %stride_qn, %first overflow<nsw> : i32 loc(#loc4)",
    "%y = arith.muli %first, %N : i32 loc(#loc4)",
    "%y = arith.muli %plane, %c2_i32 : i32 loc(#loc4)",
    "%moved = arith.addi %rows_1, %start : tensor<128x1xi32> loc(#loc4)\n    "
    "%y = arith.muli %moved, %each : tensor<128x1xi32> loc(#loc4)",
]


@pytest.mark.parametrize("line", BEYOND)
def test_a_product_in_32_bits_is_counted(line):
    assert kernel_resources.narrow(TTIR) == 0
    assert kernel_resources.narrow(f"{TTIR}    {line}\n") == 1


def test_spills_in_inner_loops_are_counted():
    """Two loops in a third: one access lies before all, one in the outer loop only, and two in the inner loops."""
    code = ["STL [R1], R2", "MOV R3, R4", "LDL R2, [R1]", "HMMA", "LDL.LU R5, [R1]", "@P0 BRA 0x1030",
            "STL.64 [R1], R6", "@!P1 BRA.U 0x1060", "@P2 BRA 0x1010", "BRA 0x1090"]
    sass = "".join(f"        /*{0x1000 + 16 * i:04x}*/                   {text} ;\n" for i, text in enumerate(code))
    assert kernel_resources.inner(sass) == 2


def test_some_cases_are_saved_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel_resources, "measure", lambda config: {"b": {"spills": 0}})
    save = tmp_path / "figures.json"
    version = kernel_resources.importlib.metadata.version("triton")
    save.write_text(json.dumps({"triton": version, "kernels": {"a": {"spills": 8}, "b": {"spills": 8}}}))
    kernel_resources.main(kernel_resources.Config(cases=("b",), save=save))
    assert json.loads(save.read_text())["kernels"] == {"a": {"spills": 8}, "b": {"spills": 0}}
    save.write_text(json.dumps({"triton": "1.0", "kernels": {}}))
    with pytest.raises(ValueError, match="is of triton 1.0, and this is"):
        kernel_resources.main(kernel_resources.Config(cases=("b",), save=save))
    kernel_resources.main(kernel_resources.Config(save=save))
    assert json.loads(save.read_text()) == {"triton": version, "kernels": {"b": {"spills": 0}}}


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1: the interpreter compiles nothing"):
        kernel_resources.main(kernel_resources.Config())
