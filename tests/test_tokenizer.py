"""tokenizer.py: the words and numbers of the tiny corpus, byte-level BPE, chat templates, and folders."""
import itertools
import json

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from minir1.tasks import countdown, countdown_corpus
from minir1.tokenizer import EOS, PAD, TAGS, UNK, Tokenizer, train_bpe, word_level

TEXTS = [
    "the cat sat on the mat. ", "12 and 345 make 357, not 12345.\n", "naïve café — 你好\n\n", "def f(x):\n    return x",
]
WORDS = word_level(countdown_corpus.WORDS, largest_number=24)
BPE = {numbers: train_bpe(TEXTS * 20, 320, numbers=numbers) for numbers in (False, True)}


def pieces(tokenizer, text):
    return [tokenizer.backend.id_to_token(t) for t in tokenizer.encode(text)]


# ---------------------------------------------------------------- one token per word


def test_a_number_is_one_token_and_words_take_their_spaces():
    assert pieces(WORDS, "User:make 24 from 11,3\nAssistant:<think>11-3=8:24 no\n</think><answer>(11-3)") == [
        "User:", "make ", "24", " from ", "11", ",", "3", "\nAssistant:",
        "<think>", "11", "-", "3", "=", "8", ":", "24", " no\n", "</think>", "<answer>", "(", "11", "-", "3", ")",
    ]
    assert all(len(WORDS.encode(str(n))) == 1 for n in range(25))


def test_unknown_pieces_become_unk():
    assert pieces(WORDS, "25+3") == [UNK, "+", "3"]  # numbers end at 24
    assert pieces(WORDS, "3é?") == ["3", UNK, UNK]
    assert pieces(WORDS, "banana 3") == [UNK, "3"]


@pytest.mark.parametrize("level", countdown.VARIANTS)
def test_round_trip_of_the_corpus(level):
    tokenizer = word_level(*countdown.vocabulary(level))
    texts = list(itertools.islice(countdown.documents(1, level), 100))
    for text, tokens in zip(texts, tokenizer.encode_batch(texts)):
        assert tokens == tokenizer.encode(text)
        assert tokenizer.id(UNK) not in tokens
        assert tokenizer.decode(tokens) == text


def test_numbers_of_tokens():
    """0 to size - 1, special tokens first."""
    vocab = WORDS.backend.get_vocab(with_added_tokens=True)
    assert sorted(vocab.values()) == list(range(WORDS.size))
    assert [vocab[token] for token in (EOS, PAD, UNK, *TAGS)] == list(range(7))
    assert (WORDS.eos, WORDS.pad) == (0, 1) and WORDS.id("24") == vocab["24"]
    with pytest.raises(ValueError, match="no token 'zebra'"):
        WORDS.id("zebra")


# ---------------------------------------------------------------- byte-level BPE


@pytest.mark.parametrize("numbers", [False, True])
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(max_size=30), st.text(alphabet="12 ab\n<think>,.é", max_size=30)))
def test_bpe_gives_back_any_text(numbers, text):
    tokenizer = BPE[numbers]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_size_and_learning():
    assert BPE[False].size == 320
    assert len(BPE[False].encode("the cat sat on the mat. ")) < 15  # 24 bytes
    assert train_bpe(TEXTS, 262).size == 262
    with pytest.raises(ValueError, match="size = 261: at least 262"):
        train_bpe(TEXTS, 261)


def test_numbers_apart():
    """With `numbers`, a token with a digit has only digits, three at most."""
    have = pieces(BPE[True], "x12,345 67\n1234567")
    assert [p for p in have if any(c.isdigit() for c in p)] == [p for p in have if p.isdigit()]
    assert all(len(p) <= 3 for p in have if p.isdigit())
    assert "".join(p for p in have if p.isdigit()) == "12345671234567"
    counting = train_bpe([f"{n} " for n in range(1000)] * 5, 262 + 990, numbers=True)
    assert all(len(counting.encode(str(n))) == 1 for n in range(1000))


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("tokenizer", [WORDS, *BPE.values()], ids=["words", "bpe", "bpe numbers"])
def test_special_tokens_are_recognised_and_none_is_added(tokenizer):
    for token in (EOS, PAD, *TAGS):
        assert tokenizer.encode(token) == [tokenizer.id(token)]
    assert pieces(tokenizer, f"3<think>{EOS}3") == ["3", "<think>", EOS, "3"]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", [WORDS, *BPE.values()], ids=["words", "bpe", "bpe numbers"])
def test_decode_without_the_ends_keeps_the_tags(tokenizer):
    tokens = tokenizer.encode(f"<think>3</think>{EOS}{PAD}{PAD}")
    assert tokenizer.decode(tokens) == f"<think>3</think>{EOS}{PAD}{PAD}"
    assert tokenizer.decode(tokens, keep_special=False) == "<think>3</think>"


@pytest.mark.parametrize("tokenizer", [WORDS, BPE[True]], ids=["words", "bpe"])
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    text = f"make 24 from 11,3<think>\n12345 café{EOS}"
    assert again.encode(text) == tokenizer.encode(text) and again.size == tokenizer.size
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (again.eos, again.pad, again.bos_token) == (tokenizer.eos, tokenizer.pad, "")
    assert again.template == tokenizer.template
    assert again.chat("3") == tokenizer.chat("3")


# ---------------------------------------------------------------- chat


def test_chat_template():
    assert WORDS.chat("make 24 from 11,3") == "User:make 24 from 11,3\nAssistant:"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert WORDS.render(messages) == f"User:a\nAssistant:b{EOS}"


def with_template(template, **tokens):
    return Tokenizer(WORDS.backend, template=template, **tokens)


def test_templates_as_hugging_face_writes_them():
    """Generation prompt, bos, loop controls, raise_exception, blocks trimmed."""
    tokenizer = with_template(
        "{{ bos_token }}{% for m in messages %}\n"
        "  {% if m.role == 'stop' %}{% break %}{% endif %}\n"
        "  {% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\n"
        "[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        bos="<think>",
    )
    messages = [{"role": "user", "content": " hi "}, {"role": "stop", "content": "x"}]
    text = tokenizer.render(messages, add_generation_prompt=False)
    assert text == f"<think>[user]hi{EOS}\n"
    assert tokenizer.render(messages) == text + "[assistant]"
    with pytest.raises(ValueError, match="cannot render these messages: no system"):
        tokenizer.render([{"role": "system", "content": ""}])


def test_templates_run_in_a_sandbox():
    with pytest.raises(ValueError, match="'__class__' of 'str' object is unsafe"):
        with_template("{{ ''.__class__.__mro__[1].__subclasses__() }}").chat("x")
    with pytest.raises(ValueError, match="'append' of 'list' object is unsafe"):
        with_template("{{ messages.append(1) }}").chat("x")


R1 = """{%- if not add_generation_prompt is defined %}{%- set add_generation_prompt = false %}{%- endif %}
{%- set ns = namespace(system='', in_tool=false) %}
{%- for message in messages %}{% if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' and message['content'] is not none %}
        {%- set said = message['content'] %}
        {%- if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + said + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
QWEN = """{%- if tools %}
    {{- raise_exception('no tools here') }}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
<|im_start|>assistant
        {% generation %}
{{ message.content | trim }}<|im_end|>
        {% endgeneration %}
    {%- else %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim if message['content'] is string else message['content'] | tojson(indent=1) }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
MARKS = [
    "<｜begin｜>", "<｜User｜>", "<｜Assistant｜>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
]
ASKED = [{"role": "user", "content": " 1 < 2 & é? "}]
SYSTEM = [{"role": "system", "content": "Be brief.\n"}, *ASKED]
LONG = [*SYSTEM, {"role": "assistant", "content": "<think>\nhm</think> yes\n"}, {"role": "user", "content": "2+2"}]
STYLES = {  # the template, and what it writes at the end of a prompt
    "deepseek-r1": (R1, "<｜Assistant｜><think>\n"), "qwen": (QWEN, "<|im_start|>assistant\n"),
    "llama-3": (LLAMA, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
}


def pair(template):
    """(ours, theirs): byte-level BPE with the marks of the three styles, which begins every text with a BOS."""
    backend = tokenizers.Tokenizer.from_str(BPE[True].backend.to_str())
    backend.add_special_tokens(MARKS)
    begin = backend.token_to_id(MARKS[0])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{MARKS[0]} $A", special_tokens=[(MARKS[0], begin)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=MARKS[0], eos_token=EOS, pad_token=PAD, chat_template=template
    )
    return Tokenizer(backend, template, bos=MARKS[0]), fast


@pytest.mark.parametrize("messages", [ASKED, SYSTEM, LONG], ids=["question", "system", "history"])
@pytest.mark.parametrize("style", STYLES)
def test_templates_as_transformers_renders_them(style, messages):
    template, end = STYLES[style]
    ours, theirs = pair(template)
    for more in (False, True):
        have = ours.render(messages, add_generation_prompt=more)
        assert have == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)
        assert have.endswith(end) == more and "1 < 2 & é?" in have
        want = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=more, return_dict=False)
        assert ours.encode(have) == want
        assert ours.encode(have).count(ours.id(MARKS[0])) == (style != "qwen")  # written once, and none added
    if style == "deepseek-r1" and len(messages) == 4:
        assert "hm" not in have and " yes\n" + EOS in have


def test_variables_of_a_template():
    ours, theirs = pair(QWEN)
    have = ours.render(ASKED, enable_thinking=False)
    assert have == theirs.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert have.endswith("<think>\n\n</think>\n\n") and have != ours.render(ASKED)
    ours, theirs = pair(LLAMA)
    nested = [{"role": "user", "content": {"b": "<é>", "a": [1]}}]
    have = ours.render(nested, date_string="1 Jan 2025")
    assert have == theirs.apply_chat_template(
        nested, tokenize=False, add_generation_prompt=True, date_string="1 Jan 2025"
    )
    assert "Today Date: 1 Jan 2025\n" in have and '"b": "<é>"' in have


def test_what_is_not_set_is_not_defined():
    template = "{{ bos_token is defined }} {{ tools is none }} {{ enable_thinking is defined }}"
    assert with_template(template).chat("") == "False True False"
    assert with_template(template, bos=EOS).chat("") == "True True False"


@pytest.mark.parametrize(
    "template,match",
    [
        ("{% if %}", "is no Jinja: line 1"),
        ("ok\n{% for m in messages %}", "is no Jinja: line 2.*for"),
        ("{{ messages[0].content.x.y }}", "cannot render these messages: .*has no attribute 'x'"),
        ("{{ 1 // 0 }}", "cannot render these messages: .*zero"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ 'a' + none }}", "can only concatenate str"),
        ("{% for i in range(999999) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('roles must alternate') }}", "messages: roles must alternate"),
    ],
)
def test_templates_that_fail_say_why(template, match):
    with pytest.raises(ValueError, match=match):
        with_template(template).chat("x")
    with pytest.raises(ValueError, match="roles must alternate"):
        with_template(LLAMA).render([*ASKED, *ASKED])


# ---------------------------------------------------------------- folders of other libraries


@pytest.mark.parametrize("style", STYLES)
def test_folders_of_transformers_and_back(style, tmp_path):
    ours, theirs = pair(STYLES[style][0])
    theirs.save_pretrained(tmp_path)
    for _ in range(2):  # as they wrote it; then as we do over the same folder
        again = Tokenizer.load(tmp_path)
        assert (again.eos_token, again.pad_token, again.bos_token) == (EOS, PAD, MARKS[0])
        for text in ("12 cats<think>é\n", again.render(LONG)):
            assert again.encode(text) == ours.encode(text)
        assert again.template == ours.template and again.size == ours.size
        back = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert back.apply_chat_template(LONG, tokenize=False) == ours.render(LONG, add_generation_prompt=False)
        assert (back.bos_token, back.eos_token, back.pad_token) == (MARKS[0], EOS, PAD)
        again.save(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()


def change(folder, **values):
    """Change tokenizer_config.json; None takes a key away."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_tokens_written_as_dicts_and_a_missing_pad(tmp_path):
    WORDS.save(tmp_path)
    change(tmp_path, eos_token={"content": "</answer>", "lstrip": False}, pad_token=None, bos_token="<think>")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos == tokenizer.pad == WORDS.id("</answer>") and tokenizer.bos_token == "<think>"
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.eos_token, again.pad_token, again.bos_token) == ("</answer>", "</answer>", "<think>")


def test_a_template_in_its_own_file(tmp_path):
    WORDS.save(tmp_path)
    change(tmp_path, chat_template=None)
    bare = Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="has no chat template: choose --template r1_zero or plain"):
        bare.chat("make 24 from 11,3,3")
    (tmp_path / "again").mkdir()
    bare.save(tmp_path / "again")
    assert "chat_template" not in json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").write_text("Q: {{ messages[0].content }}")
    assert Tokenizer.load(tmp_path).chat("why?") == "Q: why?"


def test_named_templates(tmp_path):
    WORDS.save(tmp_path)
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    change(tmp_path, chat_template=named)
    assert Tokenizer.load(tmp_path).chat("") == "plain"
    change(tmp_path, chat_template=named[:1])
    with pytest.raises(ValueError, match=r"no chat_template is called default, of \['tool_use'\]"):
        Tokenizer.load(tmp_path)


def test_special_tokens_that_only_the_older_file_names(tmp_path):
    WORDS.save(tmp_path)
    change(tmp_path, eos_token=None, pad_token=None)
    older = {"eos_token": {"content": "</answer>"}, "pad_token": "<|pad|>", "bos_token": {"content": "<think>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("</answer>", PAD, "<think>")
    change(tmp_path, eos_token=EOS)
    assert Tokenizer.load(tmp_path).eos_token == EOS  # the newer file takes precedence
    WORDS.save(tmp_path)
    assert Tokenizer.load(tmp_path).bos_token == ""


@pytest.mark.parametrize(
    "name,text,match",
    [
        ("tokenizer.json", "{", "tokenizer.json is damaged"),
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds no object"),
        ("special_tokens_map.json", "", "special_tokens_map.json is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, match):
    WORDS.save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_files_are_named(tmp_path, name):
    WORDS.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {name}"):
        Tokenizer.load(tmp_path)


def test_missing_tokens_are_named(tmp_path):
    WORDS.save(tmp_path)
    change(tmp_path, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="no token '<|im_end|>'".replace("|", r"\|")):
        Tokenizer.load(tmp_path)
    change(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match="names no eos_token"):
        Tokenizer.load(tmp_path)


def test_size_counts_added_tokens():
    backend = tokenizers.Tokenizer.from_str(WORDS.backend.to_str())
    backend.add_tokens(["zebra"])
    assert Tokenizer(backend).size == WORDS.size + 1
