"""linear_top against log-softmax and gather in fp64, differentiated by autograd."""

import math

import pytest
import torch
from test_ops import Largest

from minir1.ops import linear_top


def problem(N=11, D=5, V=23, k=4, dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    h, w = torch.randn(N, D, generator=gen, dtype=torch.float64), torch.randn(V, D, generator=gen, dtype=torch.float64)
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), torch.randint(V, (N, k), generator=gen)


@pytest.mark.parametrize("N, k, chunk_bytes", [(0, 3, None), (1, 1, None), (11, 4, 1), (11, 4, 552), (11, 23, None)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(N, k, chunk_bytes, temperature):
    """Tokens that occur twice in a row included."""
    h, w, ids = problem(N, k=k)
    g = torch.randn(N, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    have = linear_top(h, w, ids, temperature, chunk_bytes=chunk_bytes)
    want = (h @ w.T / temperature).log_softmax(1).gather(1, ids)
    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad((have * g).sum(), (h, w)), torch.autograd.grad((want * g).sum(), (h, w))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_entries_of_minus_infinity():
    h, w, ids = problem()
    h = h.detach().abs().requires_grad_()
    with torch.no_grad():
        w[3] = -math.inf
    ids = ids.masked_fill(ids == 3, 5)
    lp = linear_top(h, w, ids)
    dh, dw = torch.autograd.grad(lp.sum(), (h, w))
    rest = torch.arange(23) != 3
    want = (h @ w[rest].T).log_softmax(1)
    torch.testing.assert_close(lp, want.gather(1, ids - (ids > 3).long()))
    assert dh.isfinite().all() and (dw[3] == 0).all()


def test_16_bit_inputs_are_scored_in_fp32():
    h, w, ids = problem(dtype=torch.bfloat16)
    lp = linear_top(h, w, ids)
    assert lp.dtype == torch.float32
    torch.testing.assert_close(lp, (h.float() @ w.float().T).log_softmax(1).gather(1, ids))
    assert [x.dtype for x in torch.autograd.grad(lp.sum(), (h, w))] == [torch.bfloat16] * 2


def test_never_holds_N_by_V_and_has_no_second_derivative():
    h, w, ids = problem(4096, 4, 700, dtype=torch.float32)
    with Largest() as largest:
        linear_top(h, w, ids, chunk_bytes=500 * 700 * 4).sum().backward()
    assert largest.bytes <= 500 * 700 * 4
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_top(h, w, ids).sum(), h, create_graph=True)


@pytest.mark.parametrize("shapes", [((3, 2), (5, 2), (2, 1)), ((3, 2), (5, 3), (3, 1)), ((3, 2), (5, 2), (3,))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    h, w, ids = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="want"):
        linear_top(h, w, ids.long())
