"""How a question is put to a model: `--template chat | r1_zero | plain`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from minir1.tasks import Problem
from minir1.tokenizer import Tokenizer

TEMPLATES = ("chat", "r1_zero", "plain")
R1_ZERO = (  # DeepSeek-R1 (arXiv:2501.12948), table 1, with {question} for its `prompt`
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)


def prompt(tokenizer: Tokenizer, question: str, template: str, shots: Sequence[Problem] = ()) -> str:
    """The text that asks a model one question; the model continues from its end.

    chat: the chat template of the checkpoint. r1_zero: the one that R1-Zero was trained with, for a base model; it
    tells the model to use the tags, which are plain text to a tokenizer without tokens for them. plain: the question
    alone. Control tokens in the question are quoted: plain text to `Tokenizer.encode`.

    shots: problems with solutions that the model sees first (few-shot): earlier turns of the chat, or, with plain,
    pairs of "Question: …" and "Answer: …". Raises ValueError for another template, shots with r1_zero, which describes
    the answer in words, and for a template that the tokenizer cannot render.
    """
    question = tokenizer.quote(question)
    solved = [(tokenizer.quote(shot.prompt), tokenizer.quote(shot.solution)) for shot in shots]
    if template == "plain":
        shown = "".join(f"Question: {asked}\nAnswer: {said}\n\n" for asked, said in solved)
        return f"{shown}Question: {question}\nAnswer:" if solved else question
    if template == "chat":
        turns = [(("user", asked), ("assistant", said)) for asked, said in solved]
        messages = [{"role": role, "content": text} for turn in turns for role, text in turn]
        return tokenizer.render([*messages, {"role": "user", "content": question}])
    if template != "r1_zero":
        raise ValueError(f"unknown template {template!r}; allowed: {', '.join(TEMPLATES)}")
    if solved:
        raise ValueError("template 'r1_zero' takes no few-shot examples; allowed with them: chat, plain")
    if tokenizer.unknown in tokenizer.encode(R1_ZERO.replace("{question}", "")):
        raise ValueError("template 'r1_zero': the tokenizer has no tokens for its words; allowed: chat, plain")
    return R1_ZERO.replace("{question}", question)  # a question may hold braces


def opened(text: str) -> str:
    """The thinking that a prompt's text has begun for the model: "<think>", or with its end too, else "".

    Some chat templates open it; with thinking off, some also close it. Put it before the model's text, so that the
    format reward and the verifiers read the whole: `format_reward(opened(prompt) + text)`.
    """
    match = re.search(r"<think>\s*(</think>)?\s*$", text)
    return "" if match is None else "<think>" + (match[1] or "")


def begun(text: str, forced: str = "") -> str:
    """What an answer to a prompt's text begins with: the tag that the text opened, and the `forced` beginning.

    Where both open <think>, it stands once: after "…<think>\n" the forced "<think></think>" is "</think>".
    """
    return opened(text) + forced.removeprefix(opened(text))


def finished(text: str, template: str, shots: Sequence[Problem] = ()) -> str:
    """The answer without the next question, which a base model invents after plain examples."""
    return text.partition("\nQuestion:")[0] if shots and template == "plain" else text


def encode(
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    template: str,
    forced: str = "",
    shots: Sequence[Sequence[Problem]] = (),
) -> list[list[int]]:
    """The prompt of each problem as tokens, with the `forced` beginning of its answers; shots: of each problem.

    ValueError for a prompt with a part that the vocabulary has no token for: the model could not tell it from others.
    """
    shown = shots or [()] * len(problems)
    texts = [prompt(tokenizer, problem.prompt, template, s) for problem, s in zip(problems, shown)]
    texts = [text + forced.removeprefix(opened(text)) for text in texts]
    rows, unknown = [tokenizer.encode(text) for text in texts], tokenizer.unknown
    for text, row in zip(texts, rows):
        if unknown in row and (parts := tokenizer.lacking(text)):
            raise ValueError(f"the tokenizer has no token for {parts[0]!r} in the prompt {text[:80]!r}")
    return rows
