"""What every task shares: a problem and the verdict on an answer. One task a file, no torch in any of them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """A question with a checkable answer."""

    prompt: str  # what the user asks, without any chat template
    reference: str  # one right answer
    language: str = "en"  # of prompt and reference
    level: str = "default"  # difficulty, named by the task


@dataclass(frozen=True)
class Verdict:
    """What a verifier says about one text.

    "wrong" is a finding about the text: malformed, truncated and false answers are all wrong.
    "unjudged" is a finding about the verifier: it failed by itself (timed out, could not start a
    sandbox), so the text was never judged. Count it apart; as a wrong answer it would hide the failure.
    """

    status: Literal["right", "wrong", "unjudged"]
    scores: dict[str, float]  # each reward by itself, such as accuracy and form
