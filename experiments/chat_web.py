"""A chat in the browser, by Gradio. A part of experiments/chat.py.

Each tab has a conversation of its own; the engine (minir1/engine.py) answers all of them in one running batch. What a
model writes is shown as text, never as HTML. The page loads nothing from elsewhere and sends nothing elsewhere, so it
works without a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from html import escape

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from experiments import chat_model
from experiments.chat_entries import JOINER, Entry, Lane, Stop, answering, messages, names_of, number_of
from experiments.chat_model import Model, Settings
from minir1.address import is_loopback, own_names
from minir1.conversation import trained_on_turns
from minir1.engine import Engine

DAY = 86400  # seconds, after which a file that was dropped is deleted
TEXTS = ["text", ".txt", ".md", ".csv", ".json", ".jsonl", ".py", ".tex", ".html", ".xml", ".yaml", ".toml", ".log"]
POLICY = (  # what a browser may load: nothing from elsewhere
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
CSS = """
#title h1 { margin: 0; font-size: 1.6em; font-weight: 700; letter-spacing: -0.02em; }
#title p { margin: 0; font-size: 0.85em; opacity: 0.65; }
.lane { border-radius: 14px !important; }
.lane .user textarea { min-width: min(24em, 50vw); min-height: 5em; }
.lane .message-markdown-disabled .md { white-space: pre-wrap; }
.lane .thought-group { border-left: 3px solid var(--border-color-primary) !important; min-width: min(24em, 60vw); }
.lane .thought-group .md { font: 0.95em/1.5 ui-monospace, monospace; opacity: 0.8; }
.summary { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; padding: 4px 0; font-size: 0.8em; }
.summary span { opacity: 0.65; }
.summary i { color: #b45309; font-style: normal; }
.summary b { padding: 1px 10px; border-radius: 999px; color: white; background: #6b7280; }
.summary b.right { background: #15803d; }
.summary b.wrong { background: #b91c1c; }
"""


def main(models: Sequence[Model], settings: Settings, host: str, port: int, rows: int) -> None:
    """Serve the page until Ctrl-C; the models stand side by side. ValueError as `launch`."""
    with ExitStack() as stack:
        lanes = [Lane(chat, stack.enter_context(Engine(chat.model, rows, chat.window))) for chat in models]
        app = page(lanes, settings)
        launch(app, host, port)
        print(f"open http://{f'[{host}]' if ':' in host else host}:{port} in a browser; Ctrl-C ends")
        if not is_loopback(host):
            print(
                f"warning: everybody who reaches this machine at port {port} can use the model: there is no password, "
                "and what is sent is not encrypted"
            )
        app.block_thread()


def launch(app: gr.Blocks, host: str, port: int) -> None:
    """Start the server, in a thread of its own. ValueError where it cannot listen there."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", radius_size="lg", **fonts)
    app.queue(default_concurrency_limit=None, api_open=False)
    look = {"theme": theme, "css": CSS, "footer_links": [], "run_history": False, "quiet": True, "show_error": True}
    layers = [Middleware(WithPolicy)]
    if is_loopback(host):  # a page from elsewhere, whose name now leads to this machine, is no page of this server
        layers.append(Middleware(TrustedHostMiddleware, allowed_hosts=own_names(host), www_redirect=False))
    where = {"server_name": host, "server_port": port, "share": False, "prevent_thread_lock": True}
    try:
        app.launch(**where, **look, max_file_size="16mb", app_kwargs={"middleware": layers})
    except OSError as error:
        taken = "the page cannot listen there, perhaps because another program does"
        raise ValueError(f"host = {host}, port = {port}: {taken}") from error


class WithPolicy:
    """ASGI middleware: every response carries POLICY."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


# ---- what happens --------------------------------------------------------------------------------


class Tabs:
    """Answers the questions of all tabs. Its methods take what Gradio passes: the entries of each lane, then the
    settings; and yield what it shows: the box, the messages of each lane, its entries."""

    def __init__(self, lanes: Sequence[Lane]):
        self.lanes = lanes
        self.stops: dict[str, Stop] = {}  # of the answers that a tab, by its session, waits for
        self.markdown: dict[str, bool] = {}  # whether it renders Markdown

    def ask(self, message: dict, request: gr.Request, *values) -> Iterator[tuple]:
        """Ask what was typed, with the files that were dropped."""
        question, files = (message.get("text") or "").strip(), tuple(message.get("files") or ())
        if not question and not files:
            raise gr.Error("type a question", print_exception=False)
        entries, chosen = self._parted(values)
        yield from self._answer([Entry(question, files) for _ in self.lanes], entries, chosen, request)

    def again(self, index, lane: int, question: str | None, request: gr.Request, values) -> Iterator[tuple]:
        """Ask the question of a message again, in other words if there are some; what followed it is gone."""
        entries, chosen = self._parted(values)
        number = number_of(entries[lane], index[0] if isinstance(index, (list, tuple)) else index)
        old = [each[number] for each in entries]
        if question is None:
            asked = [Entry(entry.question, entry.files, entry.attempt + 1) for entry in old]
        else:
            asked = [Entry(question.removesuffix(names_of(entry)).strip(), entry.files) for entry in old]
        yield from self._answer(asked, [each[:number] for each in entries], chosen, request)

    def press(self, request: gr.Request) -> None:
        """The stop button: the tab waits for what there is of the answers."""
        if stop := self.stops.get(request.session_hash):
            stop.press()

    def leave(self, request: gr.Request) -> None:
        """Nothing more of the answers is shown: another question, a new conversation, a tab that was closed."""
        if stop := self.stops.pop(request.session_hash, None):
            stop.press()
        self.markdown.pop(request.session_hash, None)

    def clear(self, request: gr.Request, *entries: list[Entry]) -> tuple:
        """A new conversation."""
        self.leave(request)
        for each in entries:  # which an answer that ends may bring back
            each.clear()
        return self.cleared()

    def cleared(self) -> tuple:
        """What is shown of a conversation without questions."""
        return busy(False), *([] for _ in range(2 * len(self.lanes)))

    def _parted(self, values: Sequence) -> tuple[list[list[Entry]], Sequence]:
        return list(values[: len(self.lanes)]), values[len(self.lanes) :]

    def _answer(self, asked: Sequence[Entry], entries: list[list[Entry]], chosen: Sequence, request: gr.Request):
        session, wanted = request.session_hash, settings_of(chosen, self.lanes[0].chat.window)
        self.leave(request)  # a new question ends the answer before it
        stop = self.stops[session] = Stop()
        self.markdown[session] = chosen[-1]
        for _ in answering(self.lanes, entries, asked, wanted, stop):
            if self.stops.get(session) is not stop:
                break
            yield busy(True), *(messages(each, self.markdown.get(session)) for each in entries), *entries
        if self.stops.get(session) is stop:
            self.stops.pop(session)
            yield busy(False), *(messages(each, self.markdown.get(session)) for each in entries), *entries
        elif session not in self.stops:  # again: a picture on its way may arrive after the one of `clear`
            yield self.cleared()


def settings_of(chosen: Sequence, window: int) -> Settings:
    """The settings of the panel; an error that the page shows for what is missing or out of range."""
    temperature, top_p, most, thinking, seed, system, _ = chosen
    if None in (temperature, top_p, most, thinking):
        raise gr.Error("a number at the side is missing", print_exception=False)
    limit = int(thinking) if thinking < window else None
    try:
        return chat_model.checked(Settings(temperature, top_p, int(most), limit, system or "", int(seed or 0)))
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def busy(answering: bool) -> gr.MultimodalTextbox:
    """The box, with the button that stops an answer or the one that asks."""
    return gr.MultimodalTextbox(submit_btn=not answering, stop_btn=answering)


# ---- what is shown -------------------------------------------------------------------------------


def page(lanes: Sequence[Lane], settings: Settings) -> gr.Blocks:
    """A column for each model, one box for the question, the settings at the side."""
    chats, tabs = [lane.chat for lane in lanes], Tabs(lanes)
    markdown = all(trained_on_turns(chat.tokenizer, chat.template) for chat in chats)
    with gr.Blocks(title="minir1", fill_width=True, analytics_enabled=False, delete_cache=(3600, DAY)) as app:
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                lines = [f"<p>{escape(line)}</p>" for chat in chats for line in chat_model.introduction(chat)]
                gr.HTML("<h1>minir1</h1>" + "".join(dict.fromkeys(lines)), elem_id="title")
                with gr.Row():
                    chatbots = [column(chat, number, markdown) for number, chat in enumerate(chats)]
                box = gr.MultimodalTextbox(
                    placeholder="Ask something, or drop a text file", show_label=False, file_count="multiple",
                    file_types=TEXTS, sources=["upload"], autofocus=True, elem_id="box", max_plain_text_length=10**6,
                )  # fmt: skip
            with gr.Column(scale=1, min_width=220):  # below the box on a narrow screen
                chosen = panel(chats, settings, markdown)
        entries, pending = [gr.State([]) for _ in lanes], gr.State(None)
        inputs, outputs = [*entries, *chosen], [box, *chatbots, *entries]
        many = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        at_once = {"queue": False, "api_visibility": "private"}
        box.submit(lambda message: (message, None), box, [pending, box], **at_once).then(
            tabs.ask, [pending, *inputs], outputs, **many
        )
        box.stop(tabs.press, **at_once)
        app.unload(tabs.leave)

        def example(data: gr.SelectData) -> dict:
            return {"text": data.value["text"]}

        def render(on: bool, message: dict, request: gr.Request, *each: list[Entry]) -> tuple:
            tabs.markdown[request.session_hash] = on  # of an answer that grows
            return message, *(gr.Chatbot(messages(entries, on), render_markdown=on) for entries in each)

        chosen[-1].change(render, [chosen[-1], box, *entries], [box, *chatbots], **at_once)
        for lane, chatbot in enumerate(chatbots):

            def retry(data: gr.RetryData, request: gr.Request, *values, lane: int = lane) -> Iterator[tuple]:
                yield from tabs.again(data.index, lane, None, request, values)

            def edit(data: gr.EditData, request: gr.Request, *values, lane: int = lane) -> Iterator[tuple]:
                text = data.value if isinstance(data.value, str) else str(data.value)
                yield from tabs.again(data.index, lane, text.replace(JOINER, ""), request, values)

            chatbot.retry(retry, inputs, outputs, **many)
            chatbot.edit(edit, inputs, outputs, **many)
            chatbot.clear(tabs.clear, entries, outputs, **at_once)
            chatbot.example_select(example, None, pending, **at_once).then(
                tabs.ask, [pending, *inputs], outputs, **many
            )
    return app


def column(chat: Model, number: int, markdown: bool) -> gr.Chatbot:
    """The conversation with one model."""
    return gr.Chatbot(
        label=chat.name, height="calc(100vh - 260px)", min_height=300, min_width=300, layout="bubble", buttons=[],
        editable="user", render_markdown=markdown, latex_delimiters=LATEX, sanitize_html=True,
        examples=[{"text": question} for question in chat.examples], elem_id=f"lane-{number}", elem_classes=["lane"],
    )  # fmt: skip


def panel(chats: Sequence[Model], settings: Settings, markdown: bool) -> list[gr.components.Component]:
    """Temperature, top-p, the longest answer, the thinking budget (none at its right end), seed, the system prompt,
    and whether Markdown is rendered."""
    window = chats[0].window
    thinking = window if settings.thinking is None else min(settings.thinking, window)
    speaks = all(chat.takes_system for chat in chats)
    return [
        gr.Slider(0, 2, settings.temperature, step=0.05, label="temperature", info="0: the most probable"),
        gr.Slider(0.05, 1, settings.top_p, step=0.05, label="top-p"),
        gr.Slider(1, window, min(settings.most, window), step=1, label="longest answer", info="in tokens"),
        gr.Slider(0, window, thinking, step=1, label="thinking budget", info="in tokens; at the right end none"),
        gr.Number(settings.seed, label="seed", precision=0, minimum=0),
        gr.Textbox(settings.system, label="system prompt", lines=3, visible=speaks),
        gr.Checkbox(markdown, label="render Markdown"),
    ]
