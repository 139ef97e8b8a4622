"""The softcap of the Triton kernels against fp64: in the interpreter without a GPU, compiled with one."""
import math

import pytest
import torch
import triton
import triton.language as tl

from minir1.kernels.softcap_jit import softcap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def apply_kernel(z_ptr, out_ptr, cap: tl.float32, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, softcap(tl.load(z_ptr + at), cap))


def capped(z, cap):
    out = torch.full_like(z, math.nan)
    block = 1024 if z.is_cuda else len(z)
    apply_kernel[(len(z) // block,)](z, out, cap, BLOCK=block)
    return out


@pytest.mark.parametrize("cap", [1.0, 0.3, 30.0])
def test_within_two_units_of_the_last_place(cap):
    """Dense from -10 to 10 times the cap, where fp32 knows no more than the cap, and down to 1e-30 by powers. A GPU's
    exp and division are good to two units themselves."""
    near = torch.linspace(-10, 10, 1 << 19)
    z = cap * torch.cat((near, torch.logspace(-30, 0, 1 << 18), -torch.logspace(-30, 0, 1 << 18))).to(DEVICE)
    cap = torch.tensor(cap).item()  # as fp32 has it
    have, want = capped(z, cap), cap * torch.tanh(z.double() / cap)
    size = want.float().abs()
    unit = (torch.nextafter(size, torch.full_like(size, math.inf)) - size).double()
    assert ((have - want).abs() / unit).max() <= (4 if z.is_cuda else 2)
    assert have.abs().max() == cap


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's: the branch not taken overflows
def test_what_is_no_number_stays_none_and_infinities_reach_the_cap():
    z = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, -0.0, 1e-38], device=DEVICE)
    block = z.repeat(128)
    have = capped(block, 3.0)[:8]
    assert have[0].isnan() and have[1:].tolist() == [3.0, -3.0, 3.0, -3.0, 0.0, 0.0, z[7].item()]
