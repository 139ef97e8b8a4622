"""preference_data.py: the published layouts in small files, what is refused, rows and batches."""

import gzip
import json

import pytest
import torch

from minir1 import templates
from minir1.preference_data import (
    Pair,
    Rows,
    accuracy,
    by_prompt,
    in_parts,
    load,
    padded,
    read_pair,
    read_pairs,
    tokenise,
    turns,
)
from minir1.tasks import Problem
from minir1.tokenizer import Tokenizer, train_bpe, word_level

ASK = (("user", "make 24 from 11,3,3"),)
PLAIN = {"prompt": "make 24 from 11,3,3", "chosen": "(11-3)*3", "rejected": "11+3"}
HH = {
    "chosen": "\n\nHuman: What is 2+2?\n\nAssistant: 4.\n\nHuman: And 3+3?\n\nAssistant: It is 6.",
    "rejected": "\n\nHuman: What is 2+2?\n\nAssistant: 4.\n\nHuman: And 3+3?\n\nAssistant: I\n\nwill not say.",
}
ULTRA = {
    "prompt": "What is 2+2?",
    "prompt_id": "f0e3",
    "chosen": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}],
    "rejected": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "5"}],
    "score_chosen": 8.5,
    "score_rejected": 6.0,
}


def pair(values) -> Pair:
    return read_pair(json.dumps(values))


def test_plain_lines():
    assert pair(PLAIN) == Pair(ASK, "(11-3)*3", "11+3", None)
    assert pair(PLAIN | {"score_chosen": 1, "score_rejected": 0.5, "id": 7}).score_gap == 0.5
    assert pair(PLAIN).prompt == [{"role": "user", "content": "make 24 from 11,3,3"}]


def test_lines_of_hh_rlhf():
    said = (("user", "What is 2+2?"), ("assistant", "4."), ("user", "And 3+3?"))
    assert pair(HH) == Pair(said, "It is 6.", "I\n\nwill not say.", None)
    two = {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: d"}
    assert pair(two).messages == (("user", "a"), ("user", "b"))  # such lines are in the published files


def test_turns_are_split_at_their_marks_alone():
    text = "\n\nHuman: Assistant: or Human: ?\n\nAssistant: a\nHuman: b\n\nassistant: c "
    assert turns(text) == [("user", "Assistant: or Human: ?"), ("assistant", "a\nHuman: b\n\nassistant: c")]


def test_lines_of_ultrafeedback():
    assert pair(ULTRA) == Pair((("user", "What is 2+2?"),), "4", "5", 2.5)
    system = [{"role": "system", "content": "Be brief."}]
    assert pair(ULTRA | {key: system + ULTRA[key] for key in ("chosen", "rejected")}).messages[0][0] == "system"
    assert pair({key: ULTRA[key] for key in ("chosen", "rejected")}).score_gap is None


def asks(*contents):
    return [{"role": role, "content": content} for role, content in zip(["user", "assistant"] * 9, contents)]


def says(content):
    return [{"role": "assistant", "content": content}]


def test_lines_of_trl():
    """Explicit: prompt, chosen and rejected are messages. Implicit: the prompt is what both dialogues begin with."""
    system = [{"role": "system", "content": "Be brief."}]
    explicit = {"prompt": system + asks("2+2?"), "chosen": says("4"), "rejected": says("5")}
    want = Pair((("system", "Be brief."), ("user", "2+2?")), "4", "5")
    assert pair(explicit) == want
    whole = {key: explicit["prompt"] + explicit[key] for key in ("chosen", "rejected")}
    assert pair(whole) == pair(whole | {"prompt": []}) == pair(whole | {"prompt": explicit["prompt"]}) == want
    long = asks("2+2?", "4", "2+3?")
    assert pair({"prompt": long, "chosen": says("5"), "rejected": says("6")}) == Pair(
        (("user", "2+2?"), ("assistant", "4"), ("user", "2+3?")), "5", "6"
    )
    tool = [{"role": "tool", "content": "4"}]
    assert pair(explicit | {"prompt": asks("2+2?", "calc") + tool}).messages[-1] == ("tool", "4")
    assert pair({"prompt": asks("hm", "hm", "hm"), "chosen": says("5"), "rejected": says("6")}).messages[0][1] == "hm"


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_files_plain_and_compressed(tmp_path, name):
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in (PLAIN, HH, {**PLAIN, "chosen": "ü…"})) + "\n\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert [p.chosen for p in read_pairs(path)] == ["(11-3)*3", "It is 6.", "ü…"]


WRONG = [
    ("{", "no JSON: '{'"),
    ("[1]", "needs an object with chosen and rejected, got list"),
    ({"prompt": "a", "chosen": "b"}, r"needs an object with chosen and rejected, got \['chosen', 'prompt'\]"),
    ({"chosen": "b", "rejected": "c"}, r"a dialogue begins with '\\n\\nHuman:' or '\\n\\nAssistant:', not 'b'"),
    (PLAIN | {"chosen": 3}, "prompt, chosen, rejected are str, int, str: expected three strings, two dialogues"),
    (PLAIN | {"chosen": ULTRA["chosen"]}, "prompt, chosen, rejected are str, list, str"),
    (HH | {"prompt": "What?"}, "a text begins with .*: dialogues in chosen and rejected go without prompt"),
    (ULTRA | {"chosen": ["4"]}, "a message needs role and content, both strings, got '4'"),
    (ULTRA | {"rejected": [{"role": "user"}]}, "a message needs role and content"),
    (PLAIN | {"score_chosen": 1}, r"score_chosen, score_rejected = \[1, None\]: expected two finite numbers"),
    (PLAIN | {"score_chosen": "9", "score_rejected": 1}, r"score_chosen, score_rejected = \['9', 1\]"),
    (PLAIN | {"score_chosen": True, "score_rejected": 1}, r"score_chosen, score_rejected = \[True, 1\]"),
    (PLAIN | {"score_chosen": float("nan"), "score_rejected": 1}, r"score_chosen, score_rejected = \[nan, 1\]"),
    (PLAIN | {"score_chosen": float("inf"), "score_rejected": 1}, r"score_chosen, score_rejected = \[inf, 1\]"),
    (PLAIN | {"score_chosen": 10**400, "score_rejected": 1}, r"score_chosen, score_rejected = \[1000.*: expected two"),
    (PLAIN | {"score_chosen": 1e308, "score_rejected": -1e308}, r"score_chosen, score_rejected = \[1e\+308, -1e"),
    ('{"prompt": "a", "chosen": "\\ud83d", "rejected": "b"}', "no JSON: .*surrogates not allowed"),
    ('{"chosen": "a", "rejected": "b", "\\udc00": 1}', "no JSON: .*surrogates not allowed"),
    ("[" * 100_000, "no JSON: .*nested too deeply"),
    ('{"score_chosen": ' + "1" * 5000 + "}", "no JSON: .*4300 digits"),
    (ULTRA | {"prompt": {"role": "user"}}, "prompt, chosen, rejected are dict, list, list: .* or lists of messages"),
    (PLAIN | {"prompt": [{"role": "user", "content": "a"}]}, "prompt, chosen, rejected are list, str, str"),
    (ULTRA | {"prompt": ["What?"]}, "a message needs role and content, both strings, got 'What"),
    (ULTRA | {"prompt": [{"role": "human", "content": "a"}]}, "role = 'human': must be one of system, developer, user"),
    (ULTRA | {"chosen": [{"role": "gpt", "content": "a"}]}, "role = 'gpt': must be one of system, developer, user"),
]
NOTHING = [
    (PLAIN | {"rejected": PLAIN["chosen"]}, "both answers are the same"),
    (PLAIN | {"rejected": " \n"}, "the rejected answer is empty"),
    (HH | {"chosen": "\n\nHuman: What?\n\nAssistant: 6"}, "chosen and rejected differ before the last answer"),
    (HH | {"chosen": HH["chosen"] + "\n\nHuman: Thanks"}, "chosen does not end with an answer of the assistant"),
    (HH | {"rejected": "\n\nAssistant: Hello"}, "rejected does not end with an answer of the assistant to somebody"),
    (ULTRA | {"rejected": []}, "rejected does not end with an answer of the assistant"),
    ({"prompt": [], "chosen": [], "rejected": []}, "chosen does not end with an answer of the assistant"),
    ({"prompt": [], "chosen": ULTRA["chosen"][1:], "rejected": ULTRA["rejected"][1:]}, "chosen does not end with an"),
    (ULTRA | {"prompt": ULTRA["chosen"], "chosen": ULTRA["chosen"][1:]}, "chosen does not end with an answer of the"),
    (ULTRA | {"prompt": ULTRA["chosen"][:1], "rejected": []}, "rejected does not end with an answer of the assistant"),
    (ULTRA | {"chosen": [{"role": "assistant", "content": " "}], "prompt": ULTRA["chosen"][:1]}, "the chosen answer"),
]


def written(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("line, message", WRONG + NOTHING)
def test_what_is_no_pair_is_named_with_its_line(tmp_path, line, message):
    path = written(tmp_path / "a.jsonl", PLAIN, "", line)
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: {message}"):
        read_pairs(path)


@pytest.mark.parametrize("line, message", WRONG)
def test_damage_is_never_left_out(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(written(tmp_path / "a.jsonl", line), [])


def test_lines_that_compare_nothing_may_be_left_out_and_are_reported(tmp_path):
    left_out = []
    path = written(tmp_path / "a.jsonl", PLAIN, *(line for line, _ in NOTHING), HH)
    assert read_pairs(path, left_out) == [pair(PLAIN), pair(HH)]
    assert len(left_out) == len(NOTHING) and left_out[0] == "line 2: both answers are the same"
    with pytest.raises(ValueError, match="holds no pair; line 1: both answers are the same"):
        read_pairs(written(path, NOTHING[0][0]), [])


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode())
    assert read_pairs(tmp_path / "a.jsonl") == [pair(PLAIN)]


def test_unreadable_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="b.jsonl is no file: expected JSON lines"):
        read_pairs(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="a.jsonl holds no pair"):
        read_pairs(written(tmp_path / "a.jsonl", "", " "))
    whole = gzip.compress(json.dumps(PLAIN).encode())
    for content in (b"no gzip", whole[:-9], whole[:12] + b"\xff" * 40):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match="a.jsonl.gz cannot be read"):
            read_pairs(tmp_path / "a.jsonl.gz")
    (tmp_path / "c.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="c.jsonl cannot be read"):
        read_pairs(tmp_path / "c.jsonl")


# ---- as tokens ---------------------------------------------------------------------------------


def tokenizer():
    return word_level(["make ", " from ", "User:", "Assistant:", "\nAssistant:"], largest_number=30)


def test_rows_are_the_prompt_of_the_template_the_answer_and_the_end():
    words = tokenizer()
    rows = tokenise(pair(PLAIN | {"score_chosen": 1, "score_rejected": 0}), words)
    prompt = words.encode(words.chat(PLAIN["prompt"]))
    assert rows.chosen == prompt + words.encode("(11-3)*3") + [words.eos]
    assert rows.rejected == prompt + words.encode("11+3") + [words.eos]
    assert (rows.prompt_len, rows.longest, rows.score_gap) == (len(prompt), len(prompt) + 8, 1.0)


def test_dialogues_are_rendered_turn_by_turn():
    words = tokenizer()
    rows = tokenise(pair(HH), words)
    text = "User:What is 2+2?\nAssistant:4.<|endoftext|>User:And 3+3?\nAssistant:"
    assert words.render(pair(HH).prompt) == text and rows.chosen[: rows.prompt_len] == words.encode(text)


@pytest.mark.parametrize("template", ["chat", "plain", "r1_zero"])
def test_a_question_of_a_file_becomes_no_control_token(template):
    bpe = train_bpe(["make 24 from a question "] * 9, 300)
    rows = tokenise(pair(PLAIN | {"prompt": "24</think><|endoftext|>", "chosen": "<think>1</think>2"}), bpe, template)
    prompt, answer = rows.chosen[: rows.prompt_len], rows.chosen[rows.prompt_len :]
    assert bpe.eos not in prompt and "24</think><|endoftext|>" in bpe.decode(prompt)
    assert prompt.count(bpe.id("</think>")) == 2 * (template == "r1_zero")  # its own
    assert [bpe.id("<think>"), bpe.id("</think>"), bpe.eos] == [t for t in answer if t < 6]  # the model's


def test_long_pairs_are_left_out_and_reported(tmp_path, capsys):
    words = tokenizer()
    long = PLAIN | {"rejected": "1+" * 20 + "1"}
    path = written(tmp_path / "a.jsonl", PLAIN, long, NOTHING[0][0])
    length = tokenise(pair(long), words).longest
    assert load(path, words, length - 1) == [tokenise(pair(PLAIN), words)]
    assert capsys.readouterr().out == f"{path}: 1 pairs, 2 left out (line 3: both answers are the same)\n"
    assert len(load(path, words, length)) == 2
    with pytest.raises(ValueError, match="every pair has an answer that ends beyond 3 tokens"):
        load(path, words, 3)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_special_tokens_written_in_an_answer_are_text(template):
    """As in chat_data.py: else the answer would end in its middle. A dialogue has the end tokens of its turns."""
    bpe = train_bpe(["make 24 from a question "] * 9, 300)
    rows = tokenise(pair(PLAIN | {"chosen": "1+2<|endoftext|>1+2", "rejected": "<think>1</think>"}), bpe, template)
    assert rows.chosen.count(bpe.eos) == rows.rejected.count(bpe.eos) == 1
    assert bpe.decode(rows.chosen[rows.prompt_len :]) == "1+2<|endoftext|>1+2<|endoftext|>"
    assert bpe.id("</think>") in rows.rejected
    earlier = tokenise(pair(HH | {k: HH[k].replace("4.", "4<|endoftext|>.") for k in ("chosen", "rejected")}), bpe)
    assert earlier.chosen.count(bpe.eos) == tokenise(pair(HH), bpe).chosen.count(bpe.eos) == 2


def test_answers_with_unknown_words_are_left_out_and_counted(tmp_path, capsys):
    """Also beside others that are left out; an unknown word of the prompt is seen and not learned."""
    words, unknown = tokenizer(), [PLAIN | {"chosen": "three"}, PLAIN | {"rejected": "3*é"}]
    path = written(tmp_path / "a.jsonl", PLAIN, *unknown, NOTHING[0][0], PLAIN | {"prompt": "é"})
    rows = load(path, words, 99)
    assert rows[0] == tokenise(pair(PLAIN), words) and words.unknown in rows[1].chosen and len(rows) == 2
    told = "2 left out (an answer that the tokenizer has no tokens for)"
    assert capsys.readouterr().out == f"{path}: 2 pairs, 1 left out (line 4: both answers are the same), {told}\n"
    with pytest.raises(ValueError, match="every pair has an answer .* that the tokenizer has no tokens for"):
        load(written(tmp_path / "b.jsonl", *unknown), words, 99)


def test_the_pairs_of_a_file_are_counted_and_told(tmp_path, capsys):
    long = PLAIN | {"chosen": "3*3" * 99}
    reason = f"a pair of {tokenise(pair(long), tokenizer(), 'plain').longest} tokens"
    for lines, told in (([PLAIN], "1 pairs"), ([long, PLAIN], f"1 pairs, 1 left out ({reason})")):
        path = written(tmp_path / "a.jsonl", *lines)
        assert load(path, tokenizer(), 99, "plain") == [tokenise(pair(PLAIN), tokenizer(), "plain")]
        assert capsys.readouterr().out == f"{path}: {told}\n"


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_prompt_of_a_row_is_what_the_sampler_got(template):
    words = tokenizer()
    rows = tokenise(pair(PLAIN), words, template)
    (prompt,) = templates.encode(words, [Problem(PLAIN["prompt"], "")], template)
    assert rows.chosen[: rows.prompt_len] == rows.rejected[: rows.prompt_len] == prompt
    with pytest.raises(ValueError, match="template 'plain' asks one question, not 3 turns; allowed: chat"):
        tokenise(pair(HH), words, "plain")


def test_thinking_that_the_template_opened_is_not_opened_by_the_answer():
    """A judged answer begins with what the template opened; a published one does not."""
    opens = Tokenizer(tokenizer().backend, "User:{{ messages[0].content }}\nAssistant:<think>{{ '\n' }}")
    rows = tokenise(pair(PLAIN | {"chosen": "<think>11-3=8</think>", "rejected": "11+3"}), opens)
    assert rows.chosen[rows.prompt_len :] == opens.encode("11-3=8</think>") + [opens.eos]
    assert rows.rejected[rows.prompt_len :] == opens.encode("11+3") + [opens.eos]


# ---- as batches --------------------------------------------------------------------------------

ROWS = [Rows([1, 2, 3, 9], [1, 2, 9], 2, None), Rows([4, 5, 9], [4, 6, 7, 8, 9], 1, None)]
ROWS += [Rows([1, 2, 7, 9], [1, 2, 5, 9], 2, None)]


def test_padded_rows_and_their_answers():
    tokens, lengths, mask = padded(ROWS[:2])
    rows = [[1, 2, 3, 9, 0], [4, 5, 9, 0, 0], [1, 2, 9, 0, 0], [4, 6, 7, 8, 9]]  # chosen, chosen, rejected, rejected
    assert tokens.tolist() == rows and lengths.tolist() == [4, 3, 3, 5]
    assert mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 1]]


@pytest.mark.parametrize("budget, parts", [(1, 3), (16, 2), (99, 1)])
def test_parts_come_back_in_the_order_of_the_pairs(budget, parts):
    seen = []

    def score(pairs, share):
        assert share == 1
        seen.append(len(pairs) * 2 * max(pair.longest for pair in pairs))
        return {"chosen": torch.tensor([float(sum(pair.chosen)) for pair in pairs], requires_grad=True)}

    found = in_parts(ROWS, budget, score)["chosen"]
    assert found.tolist() == [15, 18, 19] and not found.requires_grad
    assert len(seen) == parts and (budget == 1 or max(seen) <= budget)


def test_accuracy_counts_prompts_and_not_pairs():
    """The first prompt has two pairs, one right; the other one draw."""
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    assert by_prompt(chosen, ROWS) == [1.5, 0.0]
    found = accuracy(chosen, rejected, ROWS)
    assert found["accuracy"] == found["accuracy_low"] == found["accuracy_high"] == 0.5
    found = accuracy(torch.tensor([1.0, -1.0, 1.0]), torch.zeros(3), ROWS)
    assert found == {"accuracy": 0.5, "accuracy_low": 0.0, "accuracy_high": 1.0}  # by pairs: two thirds
