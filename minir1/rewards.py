"""Rewards as functions of the text that a model wrote, independent of tasks, models and torch.

The text includes its tags (DeepSeek-R1, arXiv:2501.12948, section 2.2: accuracy and format rewards, by rule). Tags are
matched exactly: other cases, inner blanks and lookalikes are plain text. A chat template may already have written the
leading `<think>`, so it may be absent; `</think>` may not.
"""

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BLANK = re.compile(  # white space, controls, and what Unicode says to display as nothing (Default_Ignorable_Code_Point)
    r"[\s\x00-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    r"\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)


def format_reward(text: str, allow_empty_think: bool = False) -> float:
    """1.0 iff the whole text is `<think>…</think> <answer>…</answer>`, else 0.0.

    Each tag occurs exactly once and in this order (the leading `<think>` may be absent), the answer is not blank, and
    only white space is between or outside the two blocks. Blank thinking, invisible characters included, is malformed,
    since skipping the thinking would be the cheapest way to this reward; `allow_empty_think=True` is for the control
    that must not think.
    """
    body = text.strip().removeprefix("<think>")
    if [body.count(tag) for tag in TAGS] != [0, 1, 1, 1]:
        return 0.0
    thought, rest = body.split("</think>")
    rest = rest.strip()
    if not (rest.startswith("<answer>") and rest.endswith("</answer>")):
        return 0.0
    content = rest.removeprefix("<answer>").removesuffix("</answer>")
    return float(not BLANK.fullmatch(content) and (allow_empty_think or not BLANK.fullmatch(thought)))


def answer(text: str) -> str | None:
    """The stripped content of the only `<answer>…</answer>`, if it comes after the thinking, else None.

    None if an answer tag is missing, repeated or in the wrong order, if the content is blank, if the thinking before it
    was never closed (or was opened more often than closed), or if a think tag follows `<answer>`. More lenient than
    `format_reward`: text before, between or after the blocks costs the format reward, not the answer.
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    before, rest = text.split("<answer>")
    content, closed, _ = rest.partition("</answer>")
    if not closed or "<think>" in rest or "</think>" in rest:
        return None
    still_open = before.count("<think>") > before.count("</think>")
    if still_open or before.rfind("</think>") <= before.rfind("<think>"):
        return None
    return None if BLANK.fullmatch(content) else content.strip()


def overlong(length: int, budget: int, buffer: int) -> float:
    """The soft penalty of long answers (DAPO, arXiv:2503.14476, equation 13): 0 … -1, linear over the last tokens.

        0                                     length <= budget - buffer
        ((budget - buffer) - length) / buffer   up to the budget
        -1                                    beyond it

    length, budget, buffer: tokens. An answer of exactly `budget` tokens, truncated or not, gets -1.
    Raises ValueError for a negative length and unless 0 < buffer <= budget.
    """
    if length < 0 or not 0 < buffer <= budget:
        raise ValueError(f"length = {length}, budget = {budget}, buffer = {buffer}: 0 < buffer <= budget, length >= 0")
    return max(-1.0, min(0.0, (budget - buffer - length) / buffer))
