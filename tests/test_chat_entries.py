"""chat_entries.py: questions answered in threads, files, and what is shown of them."""

import threading
import time
from contextlib import ExitStack, contextmanager
from html import escape
from html.parser import HTMLParser

import pytest
from talker import SCRIPT, saved

from experiments import chat_entries, chat_model
from experiments.chat_entries import JOINER, Entry, Lane, Stop, answering, messages, number_of
from experiments.chat_model import Settings
from minir1.conversation import Reply, Turn
from minir1.engine import Engine

# With the question as it is (plain), an answer depends on its last token: 11 12 11 12 … for ever, 45 46, or an answer.
FOLLOWS = {"11": "12", "12": "11", "45": "46", "46": "45", "3": "<think>", "<think>": "7", "7": SCRIPT, SCRIPT: " no\n",
           " no\n": "</think>", "</think>": "<answer>", "<answer>": "你好", "你好": "👨‍👩‍👧",
           "👨‍👩‍👧": "</answer>"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("talkers") / "plain", FOLLOWS)


@contextmanager
def lanes_of(*folders, rows: int = 4, **options):
    with ExitStack() as stack:
        chats = [chat_model.opened(folder, **{"template": "plain", **options}) for folder in folders]
        yield [Lane(chat, stack.enter_context(Engine(chat.model, rows, chat.window))) for chat in chats]


def answered(lanes, entries, asked, settings=Settings(most=40), stop=None):
    return list(answering(lanes, entries, asked, settings, stop or Stop()))


def wait_until_free(lanes, seconds: float = 20):
    limit = time.monotonic() + seconds
    while any(lane.engine.load() != (0, 0) for lane in lanes):
        assert time.monotonic() < limit, "rows still run"
        time.sleep(0.01)


# ---------------------------------------------------------------- answering


def test_a_question_is_answered(folder):
    with lanes_of(folder) as lanes:
        entries = [[]]
        assert len(answered(lanes, entries, [Entry("3")])) >= 1
        (entry,) = entries[0]
        assert entry.thinking == f"7{SCRIPT} no\n" and entry.answer == "<answer>你好👨‍👩‍👧</answer>"
        assert entry.turn == Turn("3", f"<think>{entry.thinking}</think>{entry.answer}")
        assert entry.done and entry.notes == [] and 0 < entry.thought <= entry.seconds


def test_answers_of_two_tabs_do_not_mix(folder):
    with lanes_of(folder) as lanes:
        tabs = {question: [[]] for question in ("11", "45", "12", "46")}
        work = [threading.Thread(target=answered, args=(lanes, entries, [Entry(question)], Settings(most=200)))
                for question, entries in tabs.items()]  # fmt: skip
        [thread.start() for thread in work]
        [thread.join() for thread in work]
        for question, [[entry]] in tabs.items():
            other = {"11": "12", "12": "11", "45": "46", "46": "45"}[question]
            assert entry.answer == (other + question) * 100


def test_the_same_seed_gives_the_same_answer_and_a_retry_another(folder):
    with lanes_of(folder) as lanes:
        seeds = []
        draw = chat_entries.drawing
        for attempt in (0, 0, 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(chat_entries, "drawing", lambda *a: seeds.append(a[1].seed) or draw(*a))
                answered(lanes, [[]], [Entry("3", attempt=attempt)])
        assert seeds[0] == seeds[1] != seeds[2]


def test_the_stop_button_frees_the_row(folder):
    with lanes_of(folder) as lanes:
        stop, entries = Stop(), [[]]
        growing = answering(lanes, entries, [Entry("11")], Settings(most=4000), stop)
        while not entries or not entries[0] or not entries[0][0].answer:
            next(growing)
        stop.press()
        list(growing)
        (entry,) = entries[0]
        assert entry.notes == ["stopped"] and entry.turn.answer == entry.answer and 0 < len(entry.answer) < 8000
        wait_until_free(lanes)
        answered(lanes, entries, [Entry("3")])  # the conversation goes on
        assert entries[0][1].turn


def test_a_caller_that_leaves_frees_the_row(folder):
    with lanes_of(folder) as lanes:
        growing = answering(lanes, [[]], [Entry("11")], Settings(most=4000), Stop())
        next(growing)
        growing.close()
        wait_until_free(lanes)


def test_a_stop_before_the_first_token_counts():
    stop, pressed = Stop(), []
    stop.press()
    stop.watch(lambda: pressed.append(1))
    assert pressed == [1]


def test_the_thinking_budget(folder):
    with lanes_of(folder) as lanes:
        entries = [[]]
        answered(lanes, entries, [Entry("3")], Settings(most=40, thinking=2))
        assert (entries[0][0].thinking, entries[0][0].answer) == ("7", "<answer>你好👨‍👩‍👧</answer>")


def test_two_models_side_by_side(folder, tmp_path):
    other = saved(tmp_path / "other", {"3": "9"})
    with lanes_of(folder, other) as lanes:
        entries = [[], []]
        answered(lanes, entries, [Entry("3"), Entry("3")])
        assert [each[0].answer for each in entries] == ["<answer>你好👨‍👩‍👧</answer>", "9"]


def test_what_goes_wrong_is_a_note(folder):
    with lanes_of(folder, window=16) as lanes:
        entries = [[]]
        answered(lanes, entries, [Entry(" ".join(["3"] * 30))])
        (entry,) = entries[0]
        assert entry.turn is None and entry.done and "the question has 59 tokens" in entry.notes[0]
        answered(lanes, entries, [Entry("3")])
        assert entries[0][1].turn  # and the question that could not be asked is not part of its prompt


# ---------------------------------------------------------------- files


def test_a_file_stands_before_the_question(tmp_path):
    (tmp_path / "a.txt").write_text("11 12\n")
    chat = chat_model.opened(saved(tmp_path / "model", {}), turns=0)
    entry = Entry("3", (str(tmp_path / "a.txt"),))
    assert chat_entries.with_files(chat, entry, Settings()) == "File a.txt:\n\n11 12\n\nEnd of the file a.txt.\n\n3"
    assert entry.notes == ["a.txt: 3 tokens, 0% of the window"]


def test_a_long_file_is_cut_and_the_note_says_so(tmp_path):
    (tmp_path / "long.txt").write_text("1,2 " * 20_000)
    chat = chat_model.opened(saved(tmp_path / "model", {}), turns=0)
    entry = Entry("3", (str(tmp_path / "long.txt"),))
    question = chat_entries.with_files(chat, entry, Settings())
    asked = chat_model.prompt(chat, (), question, Settings())
    assert 4096 - 1024 - 60 < len(asked.tokens) <= 4096 - 1024
    assert entry.notes[0].startswith("only the first 4% of long.txt: 3,0") and "74% of the window" in entry.notes[0]
    assert entry.doing.startswith("reading long.txt: ") or not entry.doing


def test_files_that_cannot_be_read(tmp_path):
    chat = chat_model.opened(saved(tmp_path / "model", {}), turns=0, window=32)
    (tmp_path / "a.pdf").write_bytes(b"%PDF\xff")
    (tmp_path / "b.txt").write_text("1 2 3")
    reasons = {"a.pdf": "no text in UTF-8: .* at byte 4", "b.txt": "nothing of b.txt fits: .* 32 tokens has 0 left"}
    for name, match in reasons.items():
        with pytest.raises(ValueError, match=match):
            chat_entries.with_files(chat, Entry("3", (str(tmp_path / name),)), Settings())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_entries, "LARGEST", 4)
        with pytest.raises(ValueError, match="b.txt has 5 bytes: at most 4"):
            chat_entries.with_files(chat, Entry("3", (str(tmp_path / "b.txt"),)), Settings())


# ---------------------------------------------------------------- showing


def texts(shown):
    return [(m["role"], m["content"][0].get("text"), m.get("metadata", {}).get("title")) for m in shown]


def test_messages_of_an_answer_that_grows():
    entry = Entry("3", ("/tmp/a.txt",))
    user = ("user", "3\n📄 a.txt", None)
    assert texts(messages([entry])) == [user, ("assistant", "", "Waiting")]
    entry.doing = "reading a.txt: 40%"
    assert texts(messages([entry]))[1] == ("assistant", "", "reading a.txt: 40%")
    entry.thinking = "\n<think> hm"
    assert texts(messages([entry])) == [user, ("assistant", "&lt;think&gt; hm", "Thinking")]
    assert messages([entry])[1]["metadata"]["status"] == "pending"
    entry.answer, entry.thought = "\n\n<b>9", 1.26
    thought = "assistant", "&lt;think&gt; hm", "Thinking"
    assert texts(messages([entry])) == [user, thought, ("assistant", "&lt;b&gt;9", None)]
    assert messages([entry])[1]["metadata"] == {"title": "Thinking", "status": "done", "duration": 1.3}
    entry.done, entry.seconds, entry.reply, entry.turn = True, 2.0, Reply("", [1] * 1234), Turn("", "")
    entry.verdict, entry.notes = ("wrong", f"right would be {SCRIPT}"), ["a <note>"]
    (summary,) = messages([entry])[-1]["content"]
    assert SCRIPT not in summary["value"] and escape(SCRIPT, False) in summary["value"]
    for part in ('<b class="wrong">✗ wrong</b>', "1,234 tokens in 2.0 s", "<i>a &lt;note&gt;</i>"):
        assert part in summary["value"]


def as_browser(html):
    """The text of HTML without elements: what stands there as it was, or as a character reference."""
    parser, parts = HTMLParser(), []
    parser.handle_data = parts.append
    parser.handle_starttag = parser.handle_endtag = parser.handle_decl = lambda *tag: pytest.fail(f"HTML: {tag}")
    parser.feed(html)
    parser.close()
    return "".join(parts)


TEXTS = ["a<script>b", "`<b>` <b>", "</think>", "&lt; &amp &#60; a && b", r"\`<b>x</b>\`", "a ```<i>\nb",
         "a `<b>\nc` <u>", "<div>\n~~\n<b>", "<!--", "<![CDATA[", "<?x", "1 < 2", "    <b>"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_html_stays_text(text):
    """By a parser of HTML, which knows no Markdown: so wherever Markdown sees code, nothing is an element."""
    for shown in (chat_entries.in_markdown(text), chat_entries.joined(text), chat_entries.as_html(text)):
        assert as_browser(shown).replace(JOINER, "") == text
    assert chat_entries.joined(text).replace(JOINER, "") == text  # what the pencil shows


def test_html_in_the_code_of_markdown():
    """A fenced block stays to the letter, also one that has no end yet; code in a line shows no `&lt;`."""
    fence = "```\n<b> &lt;\n```"
    for text, want in (
        (fence, fence), (f"{fence} <i>", f"{fence} <i>"), (f"{fence}\n<i>", f"{fence}\n&lt;i&gt;"),
        ("~~~\n<b>", "~~~\n<b>"),
        ("- a\n  ```\n  <b>\n  ```\n<i>", "- a\n  ```\n  <b>\n  ```\n&lt;i&gt;"),
        ("<div>\n```\n<b>", "&lt;div&gt;\n```\n<b>"), ("`a<b` < &", f"`a<{JOINER}b` &lt; &amp;"),
    ):  # fmt: skip
        assert chat_entries.in_markdown(text) == want
    entry = Entry("`<b>` &", answer="`<i>`")
    for markdown, answer in ((True, f"`<{JOINER}i>`"), (False, "`&lt;i&gt;`")):
        assert [text for _, text, _ in texts(messages([entry], markdown))] == [f"`<{JOINER}b>` &", answer]


def test_the_entry_of_a_message():
    entries = [Entry("1", thinking="a", answer="b", done=True), Entry("2", done=True), Entry("3", answer="c")]
    assert [number_of(entries, index) for index in range(8)] == [0, 0, 0, 0, 1, 1, 2, 2]
