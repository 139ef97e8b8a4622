"""device.py: names of devices and dtypes, and memory in GiB."""

import pytest
import standin
import torch

from minir1 import device
from minir1.device import free_memory_gib, peak_memory_gib, pick, pick_dtype, synchronize


def test_a_device_by_name(monkeypatch):
    cpu = torch.device("cpu")
    assert pick("cpu") == pick(cpu) == cpu
    assert pick() == pick("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick() == torch.device("cuda") and pick("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device = 'cuda:2': this machine has cuda, .*cpu, or auto"):
        pick("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "meta", "cpu:1", "", "vulkan"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(ValueError, match=f"device = '{name}': this machine has .*cpu, or auto"):
        pick(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_error_without_a_gpu_is_one_line():
    with pytest.raises(ValueError, match="device = 'cuda': this machine has .*cpu, or auto") as error:
        pick("cuda")
    assert "\n" not in str(error.value)


def test_a_registered_device_needs_its_name():
    own = standin.register()
    assert pick("standin") == own and pick().type != "standin"
    synchronize(own)
    synchronize(torch.device("cpu"))
    assert peak_memory_gib(own) == peak_memory_gib()


def test_dtypes(monkeypatch, capsys):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert pick_dtype(None, cpu) == pick_dtype("float32", cuda) == torch.float32
    assert pick_dtype(None, cuda) == torch.bfloat16
    assert capsys.readouterr().out == ""
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert "no 16-bit products" in capsys.readouterr().out
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16 and pick_dtype(None, cuda) == torch.float32
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="dtype = 'float16': float32, bfloat16, or None"):
        pick_dtype("float16", cpu)


def test_peak_memory_covers_what_is_allocated():
    before = peak_memory_gib()
    block = torch.ones(2**26)  # 0.25 GiB
    assert 0.02 < before < 64 and peak_memory_gib() >= before
    assert peak_memory_gib() >= block.nbytes / 2**30
    free = free_memory_gib()
    assert free is None or 0 < free < 10_000
