"""docs/departures.md: its numbers are those of the configurations, its table that of the results."""

import json
import re
from pathlib import Path

import pytest

from experiments import all_scenarios, distill, ppo, pretrain, r1, r1_zero, reward_model, sft
from experiments.tools import departures
from experiments.variants import cispo, dapo, gspo, sequence_grpo
from minir1.model.config import ModelConfig

PAGE = (Path(__file__).parent.parent / "docs" / "departures.md").read_text(encoding="utf-8")
SHORT = r1_zero.Config()


@pytest.mark.parametrize(
    "said, value",
    [
        (r"the format is worth ([\d.]+)", SHORT.format_weight),
        (r"lr 3e-6 .*? \| (\S+) \(`--learning-rate`\)", SHORT.learning_rate),
        (r"\| (\d+) × 8 of up to 384 tokens, 40 steps", SHORT.prompts),
        (r"32 × (\d+) of up to 384 tokens, 40 steps", SHORT.num_generations),
        (r"32 × 8 of up to (\d+) tokens, 40 steps", SHORT.max_completion_length),
        (r"32 × 8 of up to 384 tokens, (\d+) steps", SHORT.steps),
        (r"in (\d) mini-batches \(`--num-minibatches`\)", SHORT.num_minibatches),
        (r"ε = ([\d.]+) in R1-Zero", SHORT.epsilon_high),
        (r"in R1-Zero; (\d+) in the pipeline's RL 1", r1.Config().rl_1.epsilon_high),
        (r"at least (\d) % of a first sample", 100 * SHORT.min_mixed),
        (r"γ = ([\d.]+) to the end", pretrain.Config().balance_speed),
        (r"λ = ([\d.]+) throughout", pretrain.Config().mtp_weight),
        (r"\| ([\d.]+) at width 128", ModelConfig().init_std),
        (r"([\d.]+) \(`--rl-1.language-weight`\)", r1.Config().rl_1.language_weight),
        (r"language-weight`\), ([\d.]+) by itself", all_scenarios.Config().language_weight),
        (r"(\d) epochs, 2e-3 along", r1.Config().sft_2.epochs),
        (r"3 epochs, (\S+) along", r1.Config().sft_2.learning_rate),
        (r"to a tenth, batches of (\d+)", sft.Config().batch),
        (r"in the last (\d+) of 40", r1.Config().rl_2.preference_steps),
        (r"in the last 10 of (\d+)", r1.Config().rl_2.steps),
        (r"after (\w+) steps in which only the critic", {2: "two"}[ppo.Config().value_warmup]),
        (r"at most `--rounds (\d)`", dapo.Config().rounds),
        (r"(\d+) of 384 tokens \| a policy", dapo.Config().overlong_buffer),
        (r"no lower bound, ([\d.]+) \|", cispo.Config().epsilon_high),
        (r"lr (\S+), batches of 32, along the same", distill.Config().learning_rate),
        (r"lr 2e-3, batches of (\d+), along the same", distill.Config().batch),
        (r"batches of (\d+), lr 1e-3, 90 steps", reward_model.Config().batch),
        (r"batches of 32, lr (\S+), 90 steps", reward_model.Config().learning_rate),
        (r"batches of 32, lr 1e-3, (\d+) steps", reward_model.Config().steps),
    ],
)
def test_defaults_are_those_of_the_scripts(said, value):
    (found,) = re.findall(said, PAGE)
    assert (found if isinstance(value, str) else float(found)) == value


def test_clips_that_are_those_of_the_papers():
    """DAPO, section 4.1; GSPO, section 5.1; R1 in Nature. Of the three only R1 has a KL term."""
    of = lambda config: (config.epsilon_low, config.epsilon_high, config.beta)
    assert of(dapo.Config()) == (0.2, 0.28, 0) and dapo.Config().reduction == "token"
    assert of(gspo.Config()) == (3e-4, 4e-4, 0) and of(sequence_grpo.Config()) == (10, 10, 0.001)


def test_options_that_are_off_by_default():
    assert SHORT.reference_reset == 0 and not SHORT.mask_truncated and SHORT.reduction == "per_answer"
    critic = ppo.Config()
    assert critic.critic == "own" and critic.gae_lambda == 1 and critic.value_clip == float("inf")
    assert critic.epochs == 1 and critic.whiten_advantages
    assert cispo.Config().epsilon_low == 1 and pretrain.Config().model.mtp_depth == 0


def test_the_table_by_hand(tmp_path):
    def cell(*right: float) -> dict:
        return {"pass@1": sum(right) / len(right), "right": [4 * x for x in right], "answers": 4}

    results = {f"one/{seed}": cell(0.5 + 0.25 * (seed > 0), 0.5) for seed in range(3)}
    results |= {f"other/{seed}": cell(0.5, 0.5) for seed in range(3)}
    (tmp_path / "x.json").write_text(json.dumps(results))
    pair = departures.Pair("a against b", "x", "one", "other")
    label, middle, seeds, problems, word = departures.row(pair, tmp_path)
    # (0 + 12.5 + 12.5) / 3 = 8.3 ± 4.303 · 7.217 / √3
    assert (label, middle, seeds, word) == ("a against b", "+8.3", "[-9.6, +26.3]", "no")
    assert problems == "[+0.0, +16.7]"


def test_every_row_is_of_a_study_and_means_something():
    assert departures.page().count("\n") == 1 + len(departures.PAIRS)
    for italic in re.findall(r"below, \*(.+?)\*", PAGE):  # what the tables refer to
        assert any(italic in pair.label for pair in departures.PAIRS), italic
