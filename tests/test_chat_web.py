"""chat_web.py: the questions of several tabs, and the page in a browser."""

import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from talker import SCRIPT, saved
from test_chat_entries import FOLLOWS, lanes_of, wait_until_free

from experiments import chat_model
from experiments.chat_entries import JOINER
from experiments.chat_model import Settings

CHOSEN = 1.0, 1.0, 4000, 4096, 0, "", True  # what the panel says at first


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("talkers") / "plain", FOLLOWS)


# ---------------------------------------------------------------- tabs


@pytest.fixture
def tabs(folder):
    pytest.importorskip("gradio")
    from experiments import chat_web

    with lanes_of(folder) as lanes:
        yield chat_web.Tabs(lanes)


TAB = SimpleNamespace(session_hash="one")


def asked(tabs, question, entries, chosen=CHOSEN, tab=TAB):
    """The pictures of an answer, from the first with some text on."""
    pictures = tabs.ask({"text": question}, tab, entries, *chosen)
    for picture in pictures:
        if len(picture[1]) > 1 and picture[1][1]["content"][0]["text"]:
            return pictures, picture
    raise AssertionError("no text")


def test_a_conversation_that_was_cleared_stays_cleared(tabs):
    entries = []
    pictures, _ = asked(tabs, "11", entries)
    (entry,) = entries
    assert tabs.clear(TAB, entries)[1:] == ([], []) and entries == []
    ((box, *rest),) = pictures  # nothing of the answer is shown any more, and that is shown last
    assert rest == [[], []] and (box.submit_btn, box.stop_btn) == (True, False)
    wait_until_free(tabs.lanes)
    assert entry.notes == ["stopped"] and not tabs.stops and not tabs.markdown


def test_a_question_during_an_answer_keeps_its_stop_button(tabs):
    entries = []
    old, _ = asked(tabs, "11", entries)
    new, _ = asked(tabs, "45", entries)
    assert list(old) == []
    box = next(new)[0]
    assert (box.submit_btn, box.stop_btn) == (False, True)
    tabs.press(TAB)
    *_, (box, shown, _) = new
    assert (box.submit_btn, box.stop_btn) == (True, False) and "stopped" in shown[-1]["content"][0]["value"]
    assert [entry.question for entry in entries] == ["11", "45"] and not tabs.stops


def test_markdown_is_switched_during_an_answer(tabs):
    entries = []
    pictures, (_, shown, _) = asked(tabs, "<b> 11", entries)
    entries[0].answer = "`<b>`"
    tabs.markdown["one"] = False  # as the checkbox does
    tabs.press(TAB)
    *_, (_, shown, _) = pictures
    assert "&lt;b&gt;" in shown[1]["content"][0]["text"]


@pytest.mark.parametrize("missing", range(4))
def test_a_number_that_is_missing_is_one_line(tabs, missing):
    chosen = [None if number == missing else value for number, value in enumerate(CHOSEN)]
    with pytest.raises(Exception, match="a number at the side is missing"):
        next(tabs.ask({"text": "3"}, TAB, [], *chosen))
    with pytest.raises(Exception, match="top-p = 7"):
        next(tabs.ask({"text": "3"}, TAB, [], 1.0, 7, *CHOSEN[2:]))
    assert not tabs.stops


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("host, here", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
                                        ("192.168.1.2", False), ("example.org", False)])  # fmt: skip
def test_loopback(host, here):
    pytest.importorskip("gradio")
    from experiments import chat_web

    assert chat_web.is_loopback(host) == here


def test_it_answers_to_the_names_of_its_address():
    gradio = pytest.importorskip("gradio")
    from experiments import chat_web

    launched = []
    with gradio.Blocks() as app:
        app.launch = lambda **settings: launched.append(settings["app_kwargs"]["middleware"])
    for host in ("0:0:0:0:0:0:0:1", "0.0.0.0"):
        chat_web.launch(app, host, 7860)
    names = [[more["allowed_hosts"] for _, _, more in layers if "allowed_hosts" in more] for layers in launched]
    assert names == [[["localhost", "127.0.0.1", "[::1]", "[0:0:0:0:0:0:0:1]"]], []]


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


@contextmanager
def served(*folders, **options):
    """The address of the page, and its lanes."""
    pytest.importorskip("gradio")
    from experiments import chat_web

    with lanes_of(*folders, **options) as lanes:
        app = chat_web.page(lanes, Settings(most=4000))
        chat_web.launch(app, "127.0.0.1", None)
        yield app.local_url, lanes
        app.close()


def status(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as reply:
            return reply.status, reply.headers["content-security-policy"]
    except urllib.error.HTTPError as error:
        return error.code, error.headers["content-security-policy"]


def test_a_page_under_another_name_is_refused(folder):
    """DNS rebinding: a name of somebody else's that leads to this machine."""
    pytest.importorskip("gradio")
    with served(folder) as (url, _):
        port = url.strip("/").rpartition(":")[2]
        for name in ("localhost", "127.0.0.1", "[::1]"):
            code, policy = status(url, Host=f"{name}:{port}")
            assert code == 200 and "frame-ancestors 'none'" in policy
        for name in ("elsewhere.example", "www.localhost", "localhost.elsewhere.example"):
            assert status(url, Host=f"{name}:{port}")[0] == 400


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


def answered(page, questions=1):
    """Wait until the last picture of the last answer is there: after it nothing changes what is being edited."""
    page.wait_for_function(f"document.querySelectorAll('.summary').length == {questions}")
    page.wait_for_selector("#box button.submit-button")


def test_a_question_streams_and_its_thinking_folds(browser, site):
    page = opened(browser, site[0])
    ask(page, "3")
    answered(page)
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
    answered(page)
    assert "stopped" in page.inner_text(".summary") and len(page.inner_text("#lane-0")) > grew / 2
    wait_until_free(lanes)
    ask(page, "3")
    answered(page, 2)
    page.close()


def test_a_conversation_is_cleared_during_an_answer(browser, site):
    url, lanes = site
    page = opened(browser, url)
    ask(page, "11")
    page.wait_for_function("document.querySelector('#lane-0').innerText.includes('12111211')")
    page.get_by_label("Clear").first.click()
    wait_until_free(lanes)
    page.wait_for_selector("#box button.submit-button")
    assert "1211" not in page.inner_text("#lane-0")
    ask(page, "3")
    answered(page)
    assert page.locator("#lane-0 .user .message-content").count() == 1
    page.close()


def test_the_page_is_usable_soon_after_the_command(browser, folder):
    """The bound leaves time for a machine that is busy: docs/chat.md has the measured time."""
    pytest.importorskip("gradio")
    from experiments.benchmarks.bench_chat import page_usable

    assert page_usable(folder, browser) < 60


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
    answered(page)
    page.fill("#box textarea", "a draft")
    page.get_by_label("render Markdown").click()
    page.wait_for_selector(".lane .prose p")
    page.locator(".thought-group").get_by_text("Thinking").click()
    page.wait_for_function(f"document.querySelector('.thought-group').innerText.includes({('7' + SCRIPT)!r})")
    assert "<answer>你好👨‍👩‍👧</answer>" in page.inner_text("#lane-0") and page.title() == "minir1"
    assert page.input_value("#box textarea") == "a draft"
    page.close()


def test_a_question_is_edited_as_it_was_typed(browser, site):
    page = opened(browser, site[0])
    question = "<b>x</b> &lt; a && b `<i>` 3"
    ask(page, question)
    answered(page)
    for shown in (question, question.replace("`", "")):  # without Markdown, then with it
        assert page.locator("#lane-0 .user .message-content").inner_text().replace(JOINER, "").strip() == shown
        page.get_by_label("Edit").first.click()
        box = page.locator("#lane-0 textarea")
        assert box.input_value().replace(JOINER, "") == question
        page.get_by_label("Cancel").first.click()
        page.get_by_label("render Markdown").click()
        page.wait_for_timeout(300)
    page.get_by_label("Edit").first.click()
    page.locator("#lane-0 textarea").press("End")
    page.locator("#lane-0 textarea").press_sequentially(" 11")
    page.get_by_label("Submit").first.click()
    page.wait_for_function("document.querySelector('#lane-0').innerText.includes('1211')")
    assert "tokens for" not in page.inner_text("#lane-0") and JOINER not in page.inner_text("#lane-0 .summary")
    page.close()


def test_retry_and_edit(browser, site):
    page = opened(browser, site[0])
    ask(page, "11")  # long enough for each change to be seen: an answer, none, another one
    page.wait_for_function("document.querySelector('#lane-0').innerText.includes('1211')")
    page.locator("#box button.stop-button").click()
    answered(page)
    page.get_by_label("Retry").last.click()
    page.wait_for_selector("#box button.stop-button")
    page.wait_for_function("document.querySelectorAll('.summary').length == 0")
    page.wait_for_function("document.querySelector('#lane-0').innerText.includes('1211')")
    page.locator("#box button.stop-button").click()
    answered(page)
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
    answered(page)
    assert "only the first" in page.inner_text(".summary") and "of the window" in page.inner_text(".summary")
    page.close()


def test_an_example_is_asked_of_both_models(browser, folder, tmp_path):
    other = saved(tmp_path / "other", {"9": "8"})
    with served(folder, other, task=str(Path(__file__).parent / "talker_task.py")) as (url, _):
        page = opened(browser, url)
        page.locator("#lane-0").get_by_text("make 11 from 3", exact=True).first.click()
        answered(page, 2)
        assert "right" in page.inner_text("#lane-0 .summary") and "wrong" in page.inner_text("#lane-1 .summary")
        page.close()
