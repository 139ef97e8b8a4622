"""chat_entries.py and chat_web.py: questions answered in threads, and the page in a browser."""

import os
import shutil
import threading
import time
from contextlib import ExitStack, contextmanager
from html import escape
from pathlib import Path

import pytest
from talker import SCRIPT, saved

from experiments import chat_entries, chat_model
from experiments.chat_entries import Entry, Lane, Stop, answering, messages, number_of
from experiments.chat_model import Settings
from minir1.conversation import Reply, Turn
from minir1.engine import Engine

# With the question as it is (plain), an answer depends on its last token: 11 12 11 12 … for ever, 45 46, or an answer.
FOLLOWS = {"11": "12", "12": "11", "45": "46", "46": "45", "3": "<think>", "<think>": "7", "7": SCRIPT, SCRIPT: " no\n",
           " no\n": "</think>", "</think>": "<answer>", "<answer>": SCRIPT + SCRIPT}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    follows = {key: value for key, value in FOLLOWS.items() if value != SCRIPT + SCRIPT}
    follows |= {"<answer>": "你好", "你好": "👨‍👩‍👧", "👨‍👩‍👧": "</answer>"}
    return saved(tmp_path_factory.mktemp("talkers") / "plain", follows)


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


def test_html_stays_text_where_markdown_is_rendered():
    for text, want in (
        ("a<script>b", "a&lt;script&gt;b"), ("`<b>` <b>", "`<b>` &lt;b&gt;"), ("</think>", "&lt;/think&gt;"),
        ("```\n<b>\n``` <i>", "```\n<b>\n``` &lt;i&gt;"), ("```\n<b>", "```\n<b>"), ("&lt;", "&amp;lt;"),
    ):  # fmt: skip
        assert chat_entries.outside_code(text) == want
    entry = Entry("`<b>`", answer="`<i>`")
    for markdown, question, answer in ((True, "`<b>`", "`<i>`"), (False, "`&lt;b&gt;`", "`&lt;i&gt;`")):
        assert [text for _, text, _ in texts(messages([entry], markdown))] == [question, answer]


def test_the_entry_of_a_message():
    entries = [Entry("1", thinking="a", answer="b", done=True), Entry("2", done=True), Entry("3", answer="c")]
    assert [number_of(entries, index) for index in range(8)] == [0, 0, 0, 0, 1, 1, 2, 2]


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("host, here", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
                                        ("192.168.1.2", False), ("example.org", False)])  # fmt: skip
def test_loopback(host, here):
    pytest.importorskip("gradio")
    from experiments import chat_web

    assert chat_web.is_loopback(host) == here


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_whoever_opens_it_to_others_is_warned(host, folder, monkeypatch, capsys):
    pytest.importorskip("gradio")
    from experiments import chat_web

    monkeypatch.setattr(chat_web, "launch", lambda app, host, port: None)
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda self: None)
    chat_web.main([chat_model.opened(folder, template="plain")], Settings(), host, 7860, 1)
    said = capsys.readouterr().out
    assert f"open http://{host}:7860" in said and ("warning: everybody" in said) == (host == "0.0.0.0")


def test_without_gradio_one_line_names_the_extra(folder, monkeypatch):
    import sys

    from experiments import chat

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "experiments.chat_web", raising=False)
    monkeypatch.delattr("experiments.chat_web", raising=False)
    with pytest.raises(ValueError, match=r"pip install -c constraints.txt -e '.\[chat\]'"):
        chat.main(chat.Config(folder, web=True, template="plain"))


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("needs chromium; CHROMIUM may name its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def served(*folders, **options):
    """The address of the page, and its lanes."""
    from experiments import chat_web

    with lanes_of(*folders, **options) as lanes:
        app = chat_web.page(lanes, Settings(most=4000))
        chat_web.launch(app, "127.0.0.1", None)
        yield app.local_url, lanes
        app.close()


@pytest.fixture(scope="module")
def site(browser, folder):
    with served(folder) as served_at:
        yield served_at


def opened(browser, url):
    page = browser.new_page()
    page.set_default_timeout(20_000)
    page.elsewhere = []
    page.on("request", lambda request: page.elsewhere.append(request.url) if url not in request.url + "/" else None)
    page.goto(url)
    page.wait_for_selector("#box textarea")
    return page


def ask(page, question):
    page.fill("#box textarea", question)
    page.press("#box textarea", "Enter")


def test_a_question_streams_and_its_thinking_folds(browser, site):
    page = opened(browser, site[0])
    ask(page, "3")
    page.wait_for_selector(".summary")
    assert "<answer>你好👨‍👩‍👧</answer>" in page.inner_text("#lane-0")
    thought = page.locator(".thought-group")
    assert "7" + SCRIPT not in thought.inner_text()  # folded, once it has ended
    thought.get_by_text("Thinking").click()
    page.wait_for_function(f"document.querySelector('.thought-group').innerText.includes({('7' + SCRIPT)!r})")
    assert page.title() == "minir1"  # the script tag is text, and did not run
    assert "owned" not in page.title() and not page.elsewhere, page.elsewhere
    page.close()


def test_the_stop_button_stops_and_the_next_question_is_answered(browser, site):
    url, lanes = site
    page = opened(browser, url)
    ask(page, "11")
    page.wait_for_function("document.querySelector('#lane-0').innerText.includes('12111211')")
    grew = len(page.inner_text("#lane-0"))
    page.locator("#box button.stop-button").click()
    page.wait_for_selector(".summary")
    assert "stopped" in page.inner_text(".summary") and len(page.inner_text("#lane-0")) > grew / 2
    wait_until_free(lanes)
    ask(page, "3")
    page.wait_for_function("document.querySelectorAll('.summary').length == 2")
    page.close()


def test_two_tabs_do_not_mix(browser, site):
    pages = [opened(browser, site[0]) for _ in range(2)]
    for page, question in zip(pages, ("11", "45")):
        ask(page, question)
    for page, own, other in zip(pages, ("12111211", "46454645"), ("45", "12")):
        page.wait_for_function(f"document.querySelector('#lane-0').innerText.includes('{own}')")
        assert other not in page.locator("#lane-0 .bot").first.inner_text()
    for page in pages:
        page.close()
    wait_until_free(site[1])


def test_markdown_can_be_rendered_and_html_stays_text(browser, site):
    page = opened(browser, site[0])
    ask(page, "3")
    page.wait_for_selector(".summary")
    page.fill("#box textarea", "a draft")
    page.get_by_label("render Markdown").click()
    page.wait_for_selector(".lane .prose p")
    page.locator(".thought-group").get_by_text("Thinking").click()
    page.wait_for_function(f"document.querySelector('.thought-group').innerText.includes({('7' + SCRIPT)!r})")
    assert "<answer>你好👨‍👩‍👧</answer>" in page.inner_text("#lane-0") and page.title() == "minir1"
    assert page.input_value("#box textarea") == "a draft"
    page.close()


def test_retry_and_edit(browser, site):
    page = opened(browser, site[0])
    ask(page, "3")
    page.wait_for_selector(".summary")
    page.get_by_label("Retry").last.click()
    page.wait_for_function("document.querySelectorAll('.summary').length == 1")
    page.get_by_label("Edit").first.click()
    page.locator("#lane-0 textarea").fill("200")
    page.get_by_label("Submit").first.click()
    page.wait_for_function("document.querySelector('#lane-0').innerText.includes('has no tokens for: 200')")
    assert page.locator("#lane-0 .user .message-content").count() == 1
    page.close()


def test_a_file_goes_into_the_context(browser, site, tmp_path):
    (tmp_path / "notes.txt").write_text("1,2 " * 5000)
    page = opened(browser, site[0])
    page.locator("#box input[type=file]").set_input_files(tmp_path / "notes.txt")
    page.wait_for_function("document.querySelector('#box .delete-button')")
    ask(page, "3")
    page.wait_for_selector(".summary")
    assert "only the first" in page.inner_text(".summary") and "of the window" in page.inner_text(".summary")
    page.close()


def test_an_example_is_asked_of_both_models(browser, folder, tmp_path):
    other = saved(tmp_path / "other", {"9": "8"})
    with served(folder, other, task=str(Path(__file__).parent / "talker_task.py")) as (url, _):
        page = opened(browser, url)
        page.locator("#lane-0").get_by_text("make 11 from 3", exact=True).first.click()
        page.wait_for_function("document.querySelectorAll('.summary').length == 2")
        assert "right" in page.inner_text("#lane-0 .summary") and "wrong" in page.inner_text("#lane-1 .summary")
        page.close()
