"""What the kernels ask of a GPU, against the recorded figures, by compiling some of them for one that is not here."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("minir1.kernels.attention", exc_type=ImportError)  # a checkout without links

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "experiments" / "benchmarks" / "kernel_resources.py"
RECORDED = json.loads((ROOT / "docs" / "results" / "kernel_resources.json").read_text())["kernels"]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes a block; the compiler does not look
PRODUCTS = {"forward", "dq", "dkv", "split"}  # kernels with matrix products


def need_cuobjdump():
    import triton

    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        pytest.skip("this triton carries no cuobjdump")


@pytest.mark.parametrize("key", RECORDED)
def test_recorded(key):
    """Every kernel fits, uses tensor cores for 16-bit numbers and for no others, and spills next to nothing."""
    found, (kernel, arch) = RECORDED[key], key.split("/")[-2:]
    assert found["shared"] <= SHARED[arch]
    products = kernel in PRODUCTS and "bf16" in key
    assert (found["hgmma"] + found["hmma"] > 0) == products
    assert arch == "sm_90" or found["hgmma"] == 0
    assert found["spills"] <= 256, "bytes a thread"


def test_hopper_runs_warpgroups():
    """Where a block has 64 rows or more, as in all that training asks for."""
    for size in ("64/64", "128/128", "192/128"):
        for kernel in ("forward", "dq", "dkv"):
            assert RECORDED[f"attention/{size}/bf16/{kernel}/sm_90"]["hgmma"] > 0
    assert RECORDED["decode/latent/128 heads/bf16/split/sm_90"]["hgmma"] > 0


@pytest.mark.parametrize("arch,cases", [(90, ("attention/192/128/bf16", "decode/latent/128 heads/bf16")),
                                        (80, ("attention/128/128/bf16", "decode/128/bf16"))])
def test_compiled_now(arch, cases, tmp_path):
    need_cuobjdump()
    save = tmp_path / "found.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, "-W", "ignore", SCRIPT, "--archs", f"{arch}", "--save", save, "--cases", *cases]
    done = subprocess.run(words, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(save.read_text())
    recorded = {key: found for key, found in RECORDED.items() if key.startswith(cases) and key.endswith(f"sm_{arch}")}
    assert result["kernels"].keys() == recorded.keys()
    for key, found in result["kernels"].items():
        assert found["shared"] <= SHARED[f"sm_{arch}"], key
        assert found["spills"] <= recorded[key]["spills"] + 64, key  # other versions allocate otherwise
        assert found["registers"] <= recorded[key]["registers"] + 32, key
        assert found["shared"] <= 1.25 * recorded[key]["shared"], key
        for name in ("hgmma", "hmma"):
            assert (found[name] > 0) == (recorded[key][name] > 0), key


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import kernel_resources

    with pytest.raises(ValueError, match="TRITON_INTERPRET=1: the interpreter compiles nothing"):
        kernel_resources.main(kernel_resources.Config())
