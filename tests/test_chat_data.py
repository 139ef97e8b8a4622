"""chat_data.py: the layouts, what is refused and what is left out; which tokens of a dialogue are trained."""

import gzip
import json
from itertools import groupby

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import LLAMA, QWEN, R1, pair

from minir1.chat_data import Document, laid_out, load, microbatches, read, split, tokenise
from minir1.templates import prompt
from minir1.tokenizer import EOS, PAD, TAGS, TEMPLATE, Tokenizer, train_bpe, word_level

BPE = train_bpe(["make 24 from a question and its answer "] * 9, 300)
SUM = [("user", "2+2?"), ("assistant", "4")]
TWO = [*SUM, ("user", "and 3+3?"), ("assistant", "It is 6.")]
MESSAGES = [{"role": role, "content": content} for role, content in TWO]


def shown(document: Document, tokenizer: Tokenizer) -> str:
    """The text of a document, with what is trained in ⟦ ⟧."""
    assert len(document.tokens) == len(document.trained)
    text = ""
    for trained, part in groupby(zip(document.tokens, document.trained), key=lambda both: both[1]):
        said = tokenizer.decode([token for token, _ in part])
        text += f"⟦{said}⟧" if trained else said
    return text


def texts(messages, tokenizer, template="chat") -> list[str]:
    return [shown(document, tokenizer) for document in tokenise(messages, tokenizer, template)]


def with_template(template: str, **more) -> Tokenizer:
    return Tokenizer(BPE.backend, template, **more)


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"messages": MESSAGES, "prompt": "2+2?", "id": 3}, TWO),
        ({"messages": [{**MESSAGES[0], "name": "me"}, MESSAGES[1]]}, SUM),
        ({"prompt": "2+2?", "completion": "4"}, SUM),
        ({"prompt": "2+2?", "response": "4", "score": 1}, SUM),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "w": 1}]}, SUM),
        (
            {"conversations": [{"from": n, "value": "a"} for n in ("system", "user", "assistant")]},
            [("system", "a"), ("user", "a"), ("assistant", "a")],
        ),
    ],
)
def test_layouts(record, messages):
    assert read(record) == messages


WRONG = [
    ({}, "needs messages, conversations, or prompt and completion or response; got no keys"),
    ({"prompt": "a", "answer": "b"}, "needs messages, .*; got answer, prompt"),
    ({"completion": "b"}, "needs messages, .*; got completion"),
    ({"prompt": "a", "completion": 3}, "prompt and completion are str, int: expected two strings"),
    ({"prompt": MESSAGES, "response": "b"}, "prompt and response are list, str: .*; dialogues go into messages"),
    ({"messages": "a"}, "messages is str: expected a list of messages"),
    ({"messages": [{"role": "user"}]}, "a message needs role and content, both strings"),
    ({"messages": [{"role": "user", "content": None}]}, "a message needs role and content, both strings"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "role = 'bot': must be one of system, developer, user"),
    ({"conversations": {}}, "conversations is dict: expected a list of messages"),
    ({"conversations": ["a"]}, "a message needs from and value, both strings, got 'a'"),
    ({"conversations": [{"from": "bot", "value": "a"}]}, "from = 'bot': must be one of human, user, gpt, assistant"),
]


def written(path, *records):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    return path


@pytest.mark.parametrize("record, message", [*WRONG, ("{", "is no JSON"), ("[1]", "need an object, got")])
def test_what_is_no_dialogue_is_named_with_file_and_line(tmp_path, record, message):
    path = written(tmp_path / "a.jsonl", {"messages": MESSAGES}, "", record)
    with pytest.raises(ValueError, match=f"a.jsonl, line 3:? {message}"):
        load([path], BPE, 1024)


def test_files_plain_and_compressed_are_read_in_turn(tmp_path, capsys):
    lines = [{"messages": MESSAGES}, {"prompt": "ü?", "completion": "é"}]
    plain = written(tmp_path / "a.jsonl", *lines)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"prompt": "c", "response": "d"}).encode()))
    documents = load([plain, packed], BPE, 1024)
    assert [document.prompt for document in documents] == ["2+2?", "ü?", "c"]
    assert capsys.readouterr().out == f"{plain}, {packed}: 3 documents of 3 dialogues\n"
    with pytest.raises(ValueError, match="there is no file .*none.jsonl"):
        load([plain, tmp_path / "none.jsonl"], BPE, 1024)


def test_what_trains_nothing_or_is_too_long_is_left_out_and_counted(tmp_path, capsys):
    long = {"prompt": "a", "completion": "b" * 99}
    nothing = [{"messages": MESSAGES[:1]}, {"messages": []}, {"prompt": "a", "completion": " \n"}]
    path = written(tmp_path / "a.jsonl", long, {"prompt": "a", "completion": "b"}, *nothing)
    (one,) = load([path], BPE, 99)
    assert shown(one, BPE) == f"User:a\nAssistant:⟦b{EOS}⟧"
    assert capsys.readouterr().out == (
        f"{path}: 1 documents of 5 dialogues; left out 1 documents of more than 99 tokens; left out 2 dialogues "
        "without an answer; left out 1 dialogues with an empty answer\n"
    )
    (tokens,) = (len(document.tokens) for document in tokenise([("user", "a"), ("assistant", "b" * 99)], BPE))
    assert len(load([path], BPE, tokens)) == 2 and len(load([path], BPE, tokens - 1)) == 1
    with pytest.raises(ValueError, match="a.jsonl: nothing to train on in 3 dialogues; left out 2 dialogues without"):
        load([written(path, *nothing)], BPE, 99)


def test_answers_without_tokens_are_left_out(tmp_path, capsys):
    words = word_level(["User:", "\nAssistant:", "make "], largest_number=9)
    lines = [{"prompt": "make what", "completion": "3"}, {"prompt": "make 3", "completion": "what"}]
    assert len(load([written(tmp_path / "a.jsonl", *lines)], words, 99)) == 1
    assert "left out 1 documents with an answer that the tokenizer has no tokens for" in capsys.readouterr().out


# ---- what is trained ---------------------------------------------------------------------------


def test_the_template_of_the_demonstration():
    """The end token is trained, in every turn; the next question is not."""
    assert texts(TWO, BPE) == [f"User:2+2?\nAssistant:⟦4{EOS}⟧User:and 3+3?\nAssistant:⟦It is 6.{EOS}⟧"]
    (document,) = tokenise(TWO, BPE)
    assert document.prompt == "2+2?" and document.trained[-1] and document.tokens[-1] == BPE.eos
    said = [("user", "2+2?"), ("assistant", "<think>2+2=4</think><answer>4</answer>")]
    (document,) = tokenise(said, BPE)
    assert [t for t in document.tokens if t < 6] == [*(BPE.id(tag) for tag in TAGS), BPE.eos]


def test_chatml():
    """Qwen's: neither the header nor the line break after the end token is trained, nor white space that it trims."""
    ours, _ = pair(QWEN)
    begin = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    more = "\n<|im_start|>user\nand 3+3?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(TWO, ours) == [f"{begin}⟦4<|im_end|>⟧{more}⟦It is 6.<|im_end|>⟧"]
    assert texts([*TWO[:3], ("assistant", " 6\n")], ours) == [f"{begin}⟦4<|im_end|>⟧{more}⟦6<|im_end|>⟧"]
    assert texts([*TWO, ("user", "thanks")], ours) == texts(TWO, ours)


def test_llama_3():
    ours, _ = pair(LLAMA.replace("strftime_now('%d %b %Y')", "'1 May'"))
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    begin = "<｜begin｜>" + header.format("system") + "Today Date: 1 May\n\n<|eot_id|>"
    user, assistant = header.format("user"), header.format("assistant")
    assert texts([*TWO[:1], ("assistant", "4\n"), *TWO[2:]], ours) == [
        f"{begin}{user}2+2?<|eot_id|>{assistant}⟦4<|eot_id|>⟧{user}and 3+3?<|eot_id|>{assistant}⟦It is 6.<|eot_id|>⟧"
    ]


def test_deepseek_r1_drops_earlier_thinking():
    """Each answer is trained with its thinking, after a prompt in which earlier answers have none, as it will be."""
    ours, _ = pair(R1)
    first, second = "<think>\n2+2=4\n</think>\n\n4", "<think>hm</think>6"
    begin = "<｜begin｜><｜User｜>2+2?<｜Assistant｜>"
    assert texts([SUM[0], ("assistant", first), TWO[2], ("assistant", second)], ours) == [
        f"{begin}<think>\n⟦2+2=4\n</think>\n\n4{EOS}⟧",
        f"{begin}\n\n4{EOS}<｜User｜>and 3+3?<｜Assistant｜><think>\n⟦hm</think>6{EOS}⟧",
    ]
    # Without thinking nothing is dropped, and no answer follows an opened <think> that it never closes.
    assert texts(TWO, ours) == [f"{begin}⟦4{EOS}⟧<｜User｜>and 3+3?<｜Assistant｜>⟦It is 6.{EOS}⟧"]
    # Files without the opening tag, as R1 itself answers.
    (text,) = texts([SUM[0], ("assistant", "2+2=4\n</think>\n\n4")], ours)
    assert text == f"{begin}<think>\n⟦2+2=4\n</think>\n\n4{EOS}⟧"


def test_a_template_that_drops_thinking_without_opening_it():
    ours, _ = pair(R1.replace("<think>\\n", ""))
    assert ours.chat("a").endswith("<｜Assistant｜>")
    assert texts([SUM[0], ("assistant", "<think>hm</think>4")], ours) == [
        f"<｜begin｜><｜User｜>2+2?<｜Assistant｜>⟦<think>hm</think>4{EOS}⟧"
    ]


QWEN3 = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}
        {%- set thought = '' %}
        {%- if '</think>' in m.content %}
            {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
        {{- said + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def test_a_template_that_writes_thinking_in_the_last_turn_only():
    """As Qwen3's, which adds empty thinking to a last answer without any."""
    ours, _ = pair(QWEN3)
    begin = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    empty = "<think>\n\n</think>\n\n"
    assert texts([SUM[0], ("assistant", "<think>\nhm\n</think>4"), *TWO[2:]], ours) == [
        f"{begin}⟦<think>\nhm\n</think>\n\n4<|im_end|>⟧",
        f"{begin}4<|im_end|>\n<|im_start|>user\nand 3+3?<|im_end|>\n<|im_start|>assistant\n⟦{empty}It is 6.<|im_end|>⟧",
    ]


def test_a_template_without_end_token():
    """The EOS is appended; what follows in a dialogue begins anew, since no prompt has that EOS inside."""
    ours = with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                         "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    assert texts(TWO, ours) == [
        f"user: 2+2?\nassistant:⟦ 4{EOS}⟧",
        f"user: 2+2?\nassistant: 4\nuser: and 3+3?\nassistant:⟦ It is 6.{EOS}⟧",
    ]


@pytest.mark.parametrize("template", ["plain", "r1_zero"])
def test_templates_of_one_question(template):
    assert texts(SUM, BPE, template) == [prompt(BPE, "2+2?", template) + f"⟦4{EOS}⟧"]
    for messages in (TWO, [("system", "a"), *SUM], SUM[:1] * 2):
        with pytest.raises(ValueError, match=f"template '{template}' asks one question, not {len(messages)} messages"):
            tokenise(messages, BPE, template)


def test_control_tokens_of_others_are_text_and_of_the_assistant_the_tags_alone_are_tokens():
    said = f"<think>a {EOS} b</think><answer>{PAD}</answer>"
    (document,) = tokenise([("system", f"</think>{EOS}"), ("user", f"<answer>{EOS}"), ("assistant", said)], BPE)
    special = [t for t in document.tokens if t < 6]
    assert special == [BPE.eos, *(BPE.id(tag) for tag in TAGS), BPE.eos]  # the first ends the system's turn
    (document,) = tokenise([("user", f"<answer>{EOS}"), ("assistant", said)], BPE)
    assert shown(document, BPE) == f"User:<answer>{EOS}\nAssistant:⟦{said}{EOS}⟧"
    assert [t for t in document.tokens if t < 6] == special[1:]
    assert all(document.trained[document.tokens.index(t)] for t in special[1:])


def test_marks_that_are_not_special_stay_tokens_of_the_assistant():
    backend = tokenizers.Tokenizer.from_str(BPE.backend.to_str())
    backend.add_tokens(["<tool_call>"])
    calls = Tokenizer(backend)
    (document,) = tokenise([("user", "<tool_call>"), ("assistant", "<tool_call>1")], calls)
    assert document.tokens.count(calls.id("<tool_call>")) == 1


def test_the_prompt_is_what_the_sampler_gets_even_where_a_token_spans_its_end():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, ":": 1, ":a": 2, EOS: 3}, [(":", "a")]))
    backend.add_special_tokens([EOS])
    ours = Tokenizer(backend, "{% for m in messages %}{{ ':' if m.role == 'user' }}{{ m.content if m.role != 'user' }}"
                     "{{ eos_token if m.role != 'user' }}{% endfor %}", pad=EOS)  # fmt: skip
    assert ours.encode(":a") == [2]
    assert tokenise([("user", "x"), ("assistant", "a")], ours) == [Document([1, 0, 3], [False, True, True], "x")]


def test_the_first_token_is_never_trained():
    assert texts([("user", ""), ("assistant", "abc")], BPE, "plain")[0].startswith("a⟦")
    said = with_template("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    (document,) = tokenise([("assistant", "abc")], said)
    assert document.prompt == "abc" and document.trained == [False] + [True] * (len(document.tokens) - 1)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[0].content }}", "the chat template does not write what the assistant says"),
        ("{{ messages[-1].content | length }}{{ messages[-1].content }}", "does not write the answer after its prompt"),
        ("{{ raise_exception('only tools') }}", "cannot render these messages: only tools"),
    ],
)
def test_templates_that_write_no_answer_are_named_with_file_and_line(template, message, tmp_path):
    path = written(tmp_path / "a.jsonl", {"prompt": "a", "completion": "bb"})
    with pytest.raises(ValueError, match=f"a.jsonl, line 1: .*{message}"):
        load([path], with_template(template), 99)


GENERATION = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}{% generation %}{{- m.content | trim + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{- m.content + '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
WORD = st.text(st.sampled_from("ab 1é\n😀<"), min_size=1, max_size=9).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORD, WORD), min_size=1, max_size=3), st.booleans())
def test_tokens_and_mask_are_those_of_transformers(turns, system):
    """On a template that marks what the assistant generates."""
    ours, theirs = pair(GENERATION)
    messages = [("system", "Be brief.")] * system
    messages += [message for turn in turns for message in zip(("user", "assistant"), turn)]
    (document,) = tokenise(messages, ours)
    want = theirs.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    end = max(i for i, trained in enumerate(want["assistant_masks"]) if trained) + 1  # then comes a line break
    assert document.tokens == want["input_ids"][:end] and len(want["input_ids"]) == end + 1
    assert document.trained == [bool(trained) for trained in want["assistant_masks"][:end]]


def test_documents_are_what_transformers_renders_for_the_usual_templates():
    for template in (QWEN, LLAMA, TEMPLATE):
        ours, theirs = pair(template)
        (document,) = tokenise(TWO, ours)
        rendered = theirs.apply_chat_template(MESSAGES, tokenize=False)
        assert ours.decode(document.tokens) == rendered.rstrip("\n")


# ---- as batches --------------------------------------------------------------------------------


def document(prompt: str, n: int = 0) -> Document:
    return Document([n, n + 1], [False, True], prompt)


def test_all_answers_to_a_prompt_lie_on_one_side_whatever_else_there_is():
    documents = [document(f"make {i // 4}", i) for i in range(800)]
    train, held_out = split(documents, 0.2)
    sides = [{d.prompt for d in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and 20 < len(sides[1]) < 60 and len(train) + len(held_out) == 800
    assert [d.tokens[0] for d in train] == sorted(d.tokens[0] for d in train)
    few = split(documents[:400], 0.2)[1]
    assert {d.prompt for d in few} == {d.prompt for d in documents[:400]} & sides[1]
    assert {d.prompt for d in split(documents, 0.3)[1]} > sides[1]
    assert split(documents, 0.0) == (documents, [])


def test_at_least_one_prompt_is_held_out_and_one_is_trained():
    train, held_out = split([document(text) for text in "aabb"], 1e-9)
    assert len(train) == len(held_out) == 2
    for documents, share in (([document("a")] * 3, 0.05), ([document(text) for text in "abc"], 1.0)):
        with pytest.raises(ValueError, match=f"held_out = {share} of .* leaves none to train on.*--held-out 0"):
            split(documents, share)


def test_documents_end_to_end():
    tokens, cu_seqlens, trained = laid_out([Document([5, 6, 7], [False, True, True], ""), document("", 8)])
    assert tokens.tolist() == [5, 6, 7, 8, 9] and cu_seqlens.tolist() == [0, 3, 5]
    assert trained.tolist() == [False, True, True, False, True]


def test_microbatches_hold_every_document_once():
    rows = [list(range(first, first + length)) for first, length in ((1, 3), (11, 2), (21, 5), (31, 4))]
    documents = [Document(row, [False] + [True] * (len(row) - 1), "") for row in rows]
    parts = list(microbatches(documents, 6))
    assert [tokens.tolist() for tokens, *_ in parts] == [[11, 12, 1, 2, 3], [31, 32, 33, 34], [21, 22, 23, 24, 25]]
    assert [cu_seqlens.tolist() for _, cu_seqlens, *_ in parts] == [[0, 2, 5], [0, 4], [0, 5]]
    assert [(trained.tolist().count(False), share) for *_, trained, share in parts] == [(2, 1), (1, 1), (1, 1)]


def test_a_saved_folder_trains_the_same_tokens(tmp_path):
    ours, _ = pair(QWEN)
    ours.save(tmp_path)
    assert tokenise(TWO, Tokenizer.load(tmp_path)) == tokenise(TWO, ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.decode(tokenise(TWO, ours)[0].tokens).endswith("It is 6.<|im_end|>")
