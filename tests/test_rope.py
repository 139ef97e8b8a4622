"""rope.py: rotations, relative positions, and both layouts of the pairs."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1.model.rope import rope_angles, rotate

LAYOUTS = pytest.mark.parametrize("interleaved", [True, False])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def turned(x, positions, interleaved, theta=100.0):
    """x [T, H, R] at the positions [T]"""
    return rotate(x, *rope_angles(x.shape[-1], torch.tensor(positions), theta), interleaved)


def test_angles_by_hand():
    """p·θ^(-2i/R): R = 4, θ = 100 gives frequencies 1 and 1/10."""
    cos, sin = rope_angles(4, torch.tensor([[0, 3]]), 100.0)
    assert cos.shape == sin.shape == (1, 2, 2) and cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos[0], torch.tensor([[1, 1], [math.cos(3), math.cos(0.3)]]))
    torch.testing.assert_close(sin[0], torch.tensor([[0, 0], [math.sin(3), math.sin(0.3)]]))


def test_angles_stay_exact_far_out():
    p, theta = 131_071, 10_000.0
    cos, sin = rope_angles(8, torch.tensor([p]), theta)
    for i in range(4):
        assert cos[0, i].item() == pytest.approx(math.cos(p * theta ** (-i / 4)), abs=1e-6)
        assert sin[0, i].item() == pytest.approx(math.sin(p * theta ** (-i / 4)), abs=1e-6)


@pytest.mark.parametrize(
    "interleaved,pairs",
    [(True, [(0, 1), (2, 3), (4, 5)]), (False, [(0, 3), (1, 4), (2, 5)])],
)
def test_each_pair_is_a_complex_number_turned(interleaved, pairs):
    x = torch.randn(1, 1, 6)
    y = turned(x, [2], interleaved)[0, 0].tolist()
    for i, (a, b) in enumerate(pairs):
        z = complex(x[0, 0, a], x[0, 0, b])
        angle = 2 * 100.0 ** (-i / 3)
        z *= complex(math.cos(angle), math.sin(angle))
        assert y[a] == pytest.approx(z.real, abs=1e-6) and y[b] == pytest.approx(z.imag, abs=1e-6)


def test_the_layouts_differ_by_a_permutation():
    x = torch.randn(5, 2, 8)
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    want = turned(halves, range(5), interleaved=False)
    have = turned(x, range(5), interleaved=True)
    torch.testing.assert_close(torch.cat((have[..., 0::2], have[..., 1::2]), -1), want, rtol=0, atol=0)


@LAYOUTS
@settings(max_examples=25, deadline=None)
@given(q=st.integers(0, 500), k=st.integers(0, 500), shift=st.integers(0, 2000), seed=st.integers(0, 99))
def test_products_depend_on_the_distance_alone_and_lengths_are_kept(interleaved, q, k, shift, seed):
    x = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    here, there = turned(x, [q, k], interleaved), turned(x, [q + shift, k + shift], interleaved)
    torch.testing.assert_close((here[0] * here[1]).sum(), (there[0] * there[1]).sum(), rtol=0, atol=1e-5)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


@LAYOUTS
def test_position_zero_changes_nothing(interleaved):
    x = torch.randn(1, 3, 8)
    assert torch.equal(turned(x, [0], interleaved), x)


@LAYOUTS
def test_shape_and_dtype_are_kept_and_the_product_is_taken_in_fp32(interleaved):
    x = torch.randn(2, 7, 3, 8).bfloat16()
    cos, sin = rope_angles(8, torch.arange(7).expand(2, 7), 100.0)
    y = rotate(x, cos, sin, interleaved)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x.float(), cos, sin, interleaved).bfloat16())  # rounded once
