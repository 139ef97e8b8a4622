"""reduction.py: the reduction is that of the whole batch, however it is split."""

import pytest
import torch

from minir1.losses import reinforce
from minir1.model.config import ModelConfig, dense
from minir1.model.transformer import Transformer
from minir1.reduction import fixed_length, per_answer_mean, token_mean, weighted_sum

# One, three and two trained tokens, and a row without any.
MASK = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()


def test_by_hand():
    thirds = [1 / 3, 1 / 3 / 3, 1 / 3 / 2]
    want = [[0, 0, thirds[0], 0, 0], [0, *[thirds[1]] * 3, 0], [0, 0, 0, *[thirds[2]] * 2], [0] * 5]
    torch.testing.assert_close(per_answer_mean(MASK, 3), torch.tensor(want))
    torch.testing.assert_close(token_mean(MASK, 6), MASK / 6)
    torch.testing.assert_close(fixed_length(MASK, 4, 3), MASK / 12)


def test_they_sum_to_one_over_the_whole_batch():
    mask = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[:, 0] = mask[7] = False
    answers, tokens = int(mask.any(1).sum()), int(mask.sum())
    assert answers == 39
    for part in (1, 3, 40):  # rows a micro-batch
        assert sum(per_answer_mean(m, answers).sum() for m in mask.split(part)).item() == pytest.approx(1)
        assert sum(token_mean(m, tokens).sum() for m in mask.split(part)).item() == pytest.approx(1)
    full = torch.ones(5, 8)
    assert fixed_length(full, 8, 5).sum().item() == pytest.approx(1)  # only of answers of that length
    assert fixed_length(full[:, :4], 8, 5).sum().item() == pytest.approx(0.5)


def test_what_each_weighs_equally():
    per_answer, token, fixed = per_answer_mean(MASK, 3), token_mean(MASK, 6), fixed_length(MASK, 4, 3)
    torch.testing.assert_close(per_answer.sum(1)[:3], torch.full((3,), 1 / 3))  # answers, long or short
    assert token[MASK].unique().numel() == fixed[MASK].unique().numel() == 1  # tokens, wherever they stand
    for weight in (per_answer, token, fixed):
        assert weight.dtype == torch.float32 and not weight[~MASK].any()  # no 0/0 in the empty row


def splits(rows: list[int]):
    """Every way to cut rows into micro-batches, in order."""
    for cut in range(2 ** (len(rows) - 1)):
        parts = [[rows[0]]]
        for i, row in enumerate(rows[1:]):
            parts[-1].append(row) if cut >> i & 1 else parts.append([row])
        yield parts


@pytest.mark.parametrize("kind", ["mla+moe", "gqa dense"])
@pytest.mark.parametrize("reduction", ["per_answer", "token", "fixed"])
def test_every_split_has_the_loss_and_the_gradient_of_the_whole(kind, reduction):
    shape = {"vocab": 24, "dim": 16, "layers": 2, "heads": 2, "ffn": 24, "init_std": 0.2}
    moe = {"kv_lora": 8, "nope": 4, "rope": 4, "v_dim": 8, "experts": 4, "expert_ffn": 8}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape, **moe) if kind == "mla+moe" else dense(**shape, kv_heads=1))
    tokens = torch.randint(0, 24, (4, 9))
    prompt, lengths = torch.tensor([2, 3, 4, 3]), torch.tensor([9, 6, 7, 5])
    columns = torch.arange(9)
    mask = (columns >= prompt.unsqueeze(1)) & (columns < lengths.unsqueeze(1))
    mask[3] = False  # an answer that is left out, as a truncated one may be
    advantage = torch.tensor([1.5, -1.0, 0.5, 2.0]).unsqueeze(1).expand(-1, 9)
    answers, total = 3, int(mask.sum())

    def loss_and_gradient(parts):
        model.zero_grad()
        value = 0.0
        for rows in parts:
            width = int(lengths[rows].max())  # each part is cut to its own longest row
            part = mask[rows, :width]
            weight = {
                "per_answer": lambda: per_answer_mean(part, answers),
                "token": lambda: token_mean(part, total),
                "fixed": lambda: fixed_length(part, 9, answers),
            }[reduction]()
            logp = model.logprob(tokens[rows, :width], lengths=lengths[rows], mask=part)
            loss = weighted_sum(weight, reinforce(logp, advantage[rows, :width]))
            loss.backward()
            value += loss.item()
        return value, [p.grad.clone() for p in model.parameters()]

    value, gradient = loss_and_gradient([[0, 1, 2, 3]])
    assert abs(value) > 0.01 and max(g.abs().max() for g in gradient) > 0.01
    cuts = [*splits([0, 1, 2, 3]), [[3, 1], [0, 2]]]
    assert len(cuts) == 9
    for cut in cuts:
        other, slopes = loss_and_gradient(cut)
        assert other == pytest.approx(value, abs=1e-6)
        for g, slope in zip(gradient, slopes):
            torch.testing.assert_close(slope, g, atol=1e-6, rtol=1e-5)


def test_what_has_no_weight_may_be_anything():
    """NaN and infinity at padding reach neither the sum nor a gradient; at a trained token they reach both."""
    loss = torch.arange(20.0).view(4, 5).requires_grad_()
    weight = per_answer_mean(MASK, 3)
    want, slope = weighted_sum(weight, loss), torch.autograd.grad(weighted_sum(weight, loss), loss)[0]
    assert want.item() == pytest.approx((2 + (6 + 7 + 8) / 3 + (13 + 14) / 2) / 3) and torch.equal(slope, weight)
    for value in (float("nan"), float("inf"), -float("inf")):
        other = loss.detach().masked_fill(~MASK, value).requires_grad_()
        assert torch.equal(weighted_sum(weight, other), want)
        assert torch.equal(torch.autograd.grad(weighted_sum(weight, other), other)[0], weight)
        other = loss.detach().masked_fill(MASK, value)
        assert not weighted_sum(weight, other).isfinite()
    assert weighted_sum(weight, MASK).item() == pytest.approx(1)  # a share, such as that of clipped tokens
    with pytest.raises(ValueError, match=r"loss has shape \(4,\), weight \(4, 5\): must be the same"):
        weighted_sum(weight, loss[:, 0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_mask_of_any_dtype_counts_exactly(dtype):
    """A sum of ones in bfloat16 ends at 256."""
    mask = torch.arange(301).expand(2, -1) > torch.tensor([[0], [200]])
    want = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction in (lambda m: per_answer_mean(m, 2), lambda m: token_mean(m, 400), lambda m: fixed_length(m, 300, 2)):
        found = reduction(mask.to(dtype))
        assert found.dtype == want
        torch.testing.assert_close(found, reduction(mask).to(want), rtol=1e-6 if dtype == torch.float64 else 0, atol=0)
    assert per_answer_mean(mask.to(dtype), 2)[0, 1].item() == pytest.approx(1 / 600)


def test_errors():
    for total in (0, -1, float("nan")):
        for reduction, arguments in ((per_answer_mean, ()), (token_mean, ()), (fixed_length, (4,))):
            with pytest.raises(ValueError, match=f"total = {total}"):
                reduction(MASK, *arguments, total)
    for length in (0, float("nan")):
        with pytest.raises(ValueError, match=f"length = {length}"):
            fixed_length(MASK, length, 3)
