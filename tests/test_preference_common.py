"""experiments/preference_common.py: rows, micro-batches and accuracies by hand."""


import pytest
import torch

from experiments.preference_common import accuracy, by_prompt, in_parts, padded
from minir1.preference_data import Rows

PAIRS = [Rows([1, 2, 3, 9], [1, 2, 9], 2, None), Rows([4, 5, 9], [4, 6, 7, 8, 9], 1, None)]
PAIRS += [Rows([1, 2, 7, 9], [1, 2, 5, 9], 2, None)]


def test_padded_rows_and_their_answers():
    tokens, lengths, mask = padded(PAIRS[:2])
    rows = [[1, 2, 3, 9, 0], [4, 5, 9, 0, 0], [1, 2, 9, 0, 0], [4, 6, 7, 8, 9]]  # chosen, chosen, rejected, rejected
    assert tokens.tolist() == rows and lengths.tolist() == [4, 3, 3, 5]
    assert mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize("budget, parts", [(1, 3), (16, 2), (99, 1)])
def test_parts_come_back_in_the_order_of_the_pairs(budget, parts):
    seen = []

    def score(pairs):
        seen.append(len(pairs) * 2 * max(pair.longest for pair in pairs))
        return {"chosen": torch.tensor([float(sum(pair.chosen)) for pair in pairs], requires_grad=True)}

    found = in_parts(PAIRS, budget, score)["chosen"]
    assert found.tolist() == [15, 18, 19] and not found.requires_grad
    assert len(seen) == parts and (budget == 1 or max(seen) <= budget)


def test_accuracy_counts_prompts_and_not_pairs():
    """The first prompt has two pairs, one right; the other one draw."""
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    assert by_prompt(chosen, PAIRS) == [1.5, 0.0]
    found = accuracy(chosen, rejected, PAIRS)
    assert found["accuracy"] == found["accuracy_low"] == found["accuracy_high"] == 0.5
    found = accuracy(torch.tensor([1.0, -1.0, 1.0]), torch.zeros(3), PAIRS)
    assert found == {"accuracy": 0.5, "accuracy_low": 0.0, "accuracy_high": 1.0}  # by pairs: two thirds
