"""rope.py: rotations, relative positions, and both layouts of the pairs."""
import math
import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minir1.model.rope import KINDS, RopeScaling, inverse_frequencies, rope_freqs_cis, rotate

LAYOUTS = pytest.mark.parametrize("interleaved", [True, False])


def rotated(x, positions, interleaved, theta=100.0):
    """x [T, H, R] at the positions [T]"""
    return rotate(x, rope_freqs_cis(x.shape[-1], torch.tensor(positions), theta), interleaved)


def test_angles_by_hand():
    """p·θ^(-2i/R): R = 4, θ = 100 gives frequencies 1 and 1/10."""
    turn = rope_freqs_cis(4, torch.tensor([[0, 3]]), 100.0)
    assert turn.shape == (1, 2, 2) and turn.dtype == torch.complex64
    torch.testing.assert_close(turn[0].real, torch.tensor([[1, 1], [math.cos(3), math.cos(0.3)]]))
    torch.testing.assert_close(turn[0].imag, torch.tensor([[0, 0], [math.sin(3), math.sin(0.3)]]))


def test_angles_stay_exact_far_out():
    p, theta = 131_071, 10_000.0
    turn = rope_freqs_cis(8, torch.tensor([p]), theta)
    for i in range(4):
        assert turn[0, i].real.item() == pytest.approx(math.cos(p * theta ** (-i / 4)), abs=1e-6)
        assert turn[0, i].imag.item() == pytest.approx(math.sin(p * theta ** (-i / 4)), abs=1e-6)


@pytest.mark.parametrize(
    "interleaved,pairs",
    [(True, [(0, 1), (2, 3), (4, 5)]), (False, [(0, 3), (1, 4), (2, 5)])],
)
def test_each_pair_is_a_rotated_complex_number(interleaved, pairs):
    x = torch.randn(1, 1, 6)
    y = rotated(x, [2], interleaved)[0, 0].tolist()
    for i, (a, b) in enumerate(pairs):
        z = complex(x[0, 0, a], x[0, 0, b])
        angle = 2 * 100.0 ** (-i / 3)
        z *= complex(math.cos(angle), math.sin(angle))
        assert y[a] == pytest.approx(z.real, abs=1e-6) and y[b] == pytest.approx(z.imag, abs=1e-6)


def test_the_layouts_differ_by_a_permutation():
    x = torch.randn(5, 2, 8)
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    want = rotated(halves, range(5), interleaved=False)
    have = rotated(x, range(5), interleaved=True)
    torch.testing.assert_close(torch.cat((have[..., 0::2], have[..., 1::2]), -1), want, rtol=0, atol=0)


@LAYOUTS
@settings(max_examples=25, deadline=None)
@given(q=st.integers(0, 500), k=st.integers(0, 500), shift=st.integers(0, 2000), seed=st.integers(0, 99))
def test_products_depend_on_the_distance_alone_and_lengths_stay(interleaved, q, k, shift, seed):
    x = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    here, there = rotated(x, [q, k], interleaved), rotated(x, [q + shift, k + shift], interleaved)
    torch.testing.assert_close((here[0] * here[1]).sum(), (there[0] * there[1]).sum(), rtol=0, atol=1e-5)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


@LAYOUTS
def test_no_tokens_have_a_gradient(interleaved):
    x = torch.randn(0, 2, 8, requires_grad=True)
    rotated(x, [], interleaved).sum().backward()
    assert x.grad.shape == x.shape


@LAYOUTS
def test_position_zero_changes_nothing(interleaved):
    x = torch.randn(1, 3, 8)
    assert torch.equal(rotated(x, [0], interleaved), x)


@LAYOUTS
def test_shape_and_dtype_stay_and_the_product_is_in_fp32(interleaved):
    x = torch.randn(2, 7, 3, 8).bfloat16()
    turn = rope_freqs_cis(8, torch.arange(7).expand(2, 7), 100.0)
    y = rotate(x, turn, interleaved)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x.float(), turn, interleaved).bfloat16())  # rounded once


# ---------------------------------------------------------------- longer windows

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("size,theta", [(8, 100.0), (64, 10_000.0), (128, 500_000.0)])
@pytest.mark.parametrize(
    "scaling,theirs",
    [
        (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (RopeScaling("llama3", 8.0, 64, slow=1, fast=4), LLAMA3 | {"original_max_position_embeddings": 64}),
        (RopeScaling("llama3", 8.0, 8192, slow=1, fast=4), LLAMA3 | {"original_max_position_embeddings": 8192}),
        (RopeScaling("yarn", 4.0, 64), YARN),
        (RopeScaling("yarn", 40.0, 4096), YARN | {"factor": 40.0, "original_max_position_embeddings": 4096}),
        (RopeScaling("yarn", 4.0, 64, slow=0.5, fast=8), YARN | {"beta_slow": 0.5, "beta_fast": 8}),
        (RopeScaling("yarn", 4.0, 64, fast=8, whole_pairs=False), YARN | {"beta_fast": 8, "truncate": False}),
        (RopeScaling("yarn", 4.0, 64, mscale=0.7, mscale_all=0.7), YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}),
        (RopeScaling("yarn", 4.0, 64, mscale=1.0, mscale_all=0.4), YARN | {"mscale": 1.0, "mscale_all_dim": 0.4}),
        (RopeScaling("yarn", 4.0, 64, mscale=0.7), YARN | {"mscale": 0.7}),
        (RopeScaling("yarn", 4.0, 64, attention_factor=0.9), YARN | {"attention_factor": 0.9}),
    ],
)
def test_scalings_as_transformers_has_them(scaling, theirs, size, theta):
    config = transformers.LlamaConfig(
        head_dim=size, max_position_embeddings=16_384, rope_parameters=theirs | {"rope_theta": theta}
    )
    want, magnitude = ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"))
    have = inverse_frequencies(size, theta, scaling)
    torch.testing.assert_close(have.float(), want, rtol=2e-6, atol=0)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
    assert size == 8 or not torch.equal(have, inverse_frequencies(size, theta))  # the scaling does something


def test_linear_scaling_divides_the_position():
    near = rope_freqs_cis(8, torch.arange(10), 100.0)
    far = rope_freqs_cis(8, 4 * torch.arange(10), 100.0, RopeScaling("linear", 4.0))
    torch.testing.assert_close(far, near)


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest():
    """R = 8, θ = 16, s = 27: θ' = 16·27^(8/6) = 1296, so the frequencies are 6^0, 6^-1, 6^-2 and 6^-3 = 1/8 / 27."""
    have = inverse_frequencies(8, 16.0, RopeScaling("ntk", 27.0))
    torch.testing.assert_close(have, torch.tensor([1, 1 / 6, 1 / 36, 1 / 216], dtype=torch.float64))
    assert have[-1].item() == pytest.approx(inverse_frequencies(8, 16.0)[-1].item() / 27)
    assert inverse_frequencies(2, 16.0, RopeScaling("ntk", 27.0)).tolist() == [1.0]


def test_ramp_of_yarn_by_hand():
    """R = 16, θ = 2^8, L = 2π·8: pair i turns 8·2^-i times. With β = 4 and α = 1 the ramp runs from pair 1 to pair 3,
    half of pair 2 is divided by s = 4."""
    scaling = RopeScaling("yarn", 4.0, original=16 * math.pi, slow=1, fast=4, whole_pairs=False)
    have = inverse_frequencies(16, 256.0, scaling) * 2.0 ** torch.arange(8)
    want = [1, 1, 1 - 0.5 * 0.75, 0.25, 0.25, 0.25, 0.25, 0.25]
    torch.testing.assert_close(have, torch.tensor(want, dtype=torch.float64))


def test_ramp_of_llama3_by_hand():
    """The same pairs turn 8, 4, 2, 1 … times; between 4 and 1 turns the ramp is linear in turns: pair 2 keeps 1/3."""
    scaling = RopeScaling("llama3", 4.0, original=16 * math.pi, slow=1, fast=4)
    have = inverse_frequencies(16, 256.0, scaling) * 2.0 ** torch.arange(8)
    want = [1, 1, 1 / 3 + 2 / 3 * 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]
    torch.testing.assert_close(have, torch.tensor(want, dtype=torch.float64))


def test_ends_of_the_ramp_are_rounded_outwards():
    """As above with β = 3 and α = 1.5: pairs 1.415 and 2.415 become 1 and 3."""
    rounded = RopeScaling("yarn", 4.0, original=16 * math.pi, slow=1.5, fast=3)
    exact = RopeScaling("yarn", 4.0, original=16 * math.pi, slow=1, fast=4, whole_pairs=False)
    torch.testing.assert_close(inverse_frequencies(16, 256.0, rounded), inverse_frequencies(16, 256.0, exact))


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_one_changes_nothing(kind):
    scaling = RopeScaling(kind, 1.0, original=16, mscale=0.7, mscale_all=0.9)
    have, want = rope_freqs_cis(16, torch.arange(99), 100.0, scaling), rope_freqs_cis(16, torch.arange(99), 100.0)
    torch.testing.assert_close(have, want, rtol=0, atol=1e-6)
    assert scaling.magnitude == scaling.logit_factor == 1.0


def test_factors_on_the_logits():
    """ln s = 3 for s = e³: plain YaRN 1.3 on cos and sin; DeepSeek's (1 + 0.3·m_all)² on the whole, 1.3/1.15 left."""
    s = math.exp(3)
    assert RopeScaling("yarn", s).magnitude == pytest.approx(1.3) and RopeScaling("yarn", s).logit_factor == 1.0
    equal = RopeScaling("yarn", s, mscale=0.5, mscale_all=0.5)
    assert equal.magnitude == 1.0 and equal.logit_factor == pytest.approx(1.15**2)
    unlike = RopeScaling("yarn", s, mscale=1.0, mscale_all=0.5)
    assert unlike.magnitude == pytest.approx(1.3 / 1.15) and unlike.logit_factor == pytest.approx(1.15**2)
    assert RopeScaling("yarn", s, mscale_all=0.0).logit_factor == 1.0  # the same as None
    assert RopeScaling("linear", s).magnitude == RopeScaling("llama3", s).magnitude == 1.0


def test_magnitude_is_that_of_the_turns():
    turn = rope_freqs_cis(8, torch.arange(50), 100.0, RopeScaling("yarn", 4.0, 16, attention_factor=1.5))
    torch.testing.assert_close(turn.abs(), torch.full((50, 4), 1.5))


@pytest.mark.parametrize(
    "field,value",
    [
        ("kind", "dynamic"), ("factor", 0.0), ("factor", -2.0), ("original", 0), ("slow", 0.0), ("fast", -1.0),
        ("slow", 32.0), ("mscale", -0.1), ("mscale_all", -1.0), ("attention_factor", -1.0),
        ("factor", math.inf), ("factor", math.nan), ("factor", 0.5), ("factor", "4"), ("fast", 2e9), ("fast", True),
        ("mscale_all", 2e6), ("whole_pairs", None), ("original", "16"), ("original", 2**63),
    ],
)
def test_a_wrong_scaling_is_named(field, value):
    with pytest.raises(ValueError, match=f"RopeScaling.{field} = {re.escape(repr(value))}"):
        RopeScaling(**{"kind": "yarn", field: value})


def test_a_factor_without_a_kind_would_be_ignored_and_is_refused():
    with pytest.raises(ValueError, match="RopeScaling.factor = 4.0: kind = 'none'"):
        RopeScaling(factor=4.0)
