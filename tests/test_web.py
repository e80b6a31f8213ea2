"""The page as people meet it: in Debian's Chromium, against a server of this process."""

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from test_server import KEY, Running, slow

from smolforge.config import Generation
from smolforge.server import web as served
from smolforge.server.middleware import PUBLIC_ROUTES

SOURCES = {path.name: path.read_text() for path in files(served).iterdir() if path.suffix in (".html", ".css", ".js")}
HOSTILE = '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script>&lt;b&gt;'
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def chatty():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with Running() as server:
        yield server
        assert server.idle()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base():
    with Running() as server:
        server.model.tokenizer.settings["chat_template"] = server.model.tokenizer.template = None
        yield server


@pytest.fixture(scope="module")
def keyed():
    with Running(KEY) as server:
        yield server


class Seen:
    """A page that is open, what it asked for and what its console said."""

    def __init__(self, browser, url, **how):
        self.url, self.asked, self.complaints = url, [], []
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **how})
        self.context.set_default_timeout(8000)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.asked.append((request.url, request.post_data)))
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def reload(self):
        self.page.reload()
        self.page.wait_for_selector("body:not(.shut)")

    def most(self, tokens):
        """The same few tokens every time."""
        script = "([name, value]) => document.getElementById(name).value = value"
        for pair in (("max_tokens", str(tokens)), ("seed", "1")):
            self.page.evaluate(script, pair)

    def bodies(self):
        return [json.loads(body) for _, body in self.asked if body]

    def say(self, text):
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")

    def answered(self, count=1):
        """The last answer's text, when so many have ended."""
        self.page.wait_for_function(
            "count => document.querySelectorAll('.turn.assistant .stats:not(:empty)').length >= count"
            " && !document.body.classList.contains('busy')",
            arg=count,
        )
        return self.page.locator(".turn.assistant .said").last.text_content()


@pytest.fixture
def look(chromium):
    """Opens pages. Whatever a test does, none may ask elsewhere, or complain."""
    opened = []

    def open_(server, ready="#message", **how):
        opened.append(Seen(chromium, server.url, **how))
        opened[-1].page.wait_for_selector(ready)
        return opened[-1]

    yield open_
    for seen in opened:
        seen.context.close()
        assert [url for url, _ in seen.asked if not url.startswith((f"{seen.url}/", "data:"))] == []
        assert seen.complaints == []


# Without a browser


def test_web_files_are_the_only_public_routes(chatty, keyed):
    assert set(PUBLIC_ROUTES) == {"/health", *served.FILES}
    assert {name for name, _ in served.FILES.values()} == set(SOURCES)
    said = (DOCS / "serving.md").read_text()
    assert all(f"`{route}`" in said for route in PUBLIC_ROUTES if not route.startswith("/page/"))
    for route, (_, kind) in served.FILES.items():
        response = keyed.http.get(route)
        assert (response.status_code, response.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "unsafe" not in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-frame-options"] == "DENY"
        assert keyed.http.post(route, json={}).status_code == 405
    for route in (
        "/page",
        "/page/",
        "/page/__init__.py",
        "/page/index.html",
        "/page/x.js",
        "/page/%2e%2e/health",
        "//",
    ):
        assert keyed.http.get(keyed.url + route).status_code == 401, route
        assert chatty.http.get(chatty.url + route).status_code == 404, route


def test_web_refuses_a_foreign_host_header(chatty):
    assert chatty.http.get("/", headers={"Host": "evil.example"}).status_code == 403


def test_web_sources_use_no_html_injection_or_outside_urls():
    for name, source in SOURCES.items():
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "@import"):
            assert word not in source, name
        assert re.findall(r"https?://[\w.]+", source) in ([], ["http://www.w3.org"]), "the name of SVG is no address"
        assert not re.search(r"""\s(on\w+|style)=["']""", source), "the policy would forbid it"
    linked = re.findall(r'(?:href|src)="(/[^"]*)"', SOURCES["index.html"])
    imported = [f"/page/{name}" for source in SOURCES.values() for name in re.findall(r'from "\./(.+?)"', source)]
    assert {"/", *linked, *imported} == set(served.FILES)


def test_web_defaults_equal_generate():
    options, fields = Generation(), dict(re.findall(r'<input id="(\w+)"[^>]* value="([^"]*)"', SOURCES["index.html"]))
    for name in ("temperature", "top_p", "min_p", "top_k", "repetition_penalty", "seed"):
        expected = getattr(options, name)
        assert fields[name] == ("" if expected is None else f"{expected:g}")


# Talking


def test_web_chat_streams_the_answer_of_the_server(chatty, look, monkeypatch):
    slow(chatty.engine, monkeypatch)
    seen = look(chatty)
    seen.page.fill("#temperature", "0")
    seen.page.fill("#max_tokens", "24")
    seen.page.focus("#message")
    seen.say("hi")
    said = seen.page.locator(".turn.assistant .said")
    seen.page.wait_for_function("() => document.querySelector('.assistant .said')?.textContent.length > 3")
    early = said.text_content()
    assert seen.page.locator("[aria-busy=true]").count() == 1
    whole = seen.answered()
    assert whole.startswith(early)
    assert len(whole) > len(early)
    (body,) = seen.bodies()
    plain = chatty.post("/v1/chat/completions", **{**body, "stream": False, "stream_options": None}).json()
    assert whole == plain["choices"][0]["message"]["content"]
    stats = seen.page.locator(".assistant .stats").text_content()
    assert re.fullmatch(
        r"24 tokens · [\d.,]+ tokens/s · first after \d\.\d\d s · \d+ of 128 in context · cut at the limit", stats
    )
    assert 5 < float(re.search(r"([\d.]+) tokens/s", stats)[1]) < 1 / 0.03


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_web_stop_frees_the_slot_and_keeps_the_text(chatty, look, monkeypatch, how):
    slow(chatty.engine, monkeypatch)
    seen = look(chatty)
    seen.most(120)
    seen.say("hi")
    seen.page.wait_for_function("() => document.querySelector('.assistant .said')?.textContent.length > 3")
    assert chatty.engine.used_slots == 1
    if how == "button":
        seen.page.get_by_role("button", name="Stop").click()
    else:
        seen.page.keyboard.press("Escape")
    assert seen.answered()
    assert chatty.idle(1)
    assert "stopped" in seen.page.locator(".assistant .stats").text_content()
    assert seen.page.get_by_role("button", name="Send").is_visible()


@pytest.mark.long
def test_web_runs_one_generation_at_a_time_in_both_views(chatty, look, monkeypatch):
    """While the chat is answering, the document's Regenerate asks for nothing, and Stop still stops."""
    seen = look(chatty)
    seen.page.fill("#temperature", "0")
    seen.page.fill("#max_tokens", "4")
    seen.page.get_by_role("button", name="Complete").click()
    seen.say("the")
    seen.page.wait_for_selector("body:not(.busy) #regenerate:enabled")
    slow(chatty.engine, monkeypatch, 0.1)
    seen.page.fill("#max_tokens", "90")
    seen.page.get_by_role("button", name="Chat").click()
    seen.say("hi")
    seen.page.wait_for_function("() => document.querySelector('.assistant .said')?.textContent.length > 3")
    seen.page.get_by_role("button", name="Complete").click()
    seen.page.get_by_role("button", name="Regenerate").click()
    seen.page.keyboard.press("Escape")
    seen.page.wait_for_selector("body:not(.busy)")
    assert chatty.idle(1)
    assert len(seen.bodies()) == 2
    assert "stopped" in seen.page.locator(".assistant .stats").text_content()


def test_web_settings_all_reach_the_server(chatty, look):
    seen = look(chatty)
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "max_tokens": 3,
        "seed": 11,
    }
    for name, value in given.items():
        seen.page.get_by_label(re.compile(f"^{name.replace('_', ' ')}$", re.I)).fill(str(value))
    seen.page.get_by_label("Stop at").fill("never ever\n\\n\\n")
    seen.page.get_by_label("System prompt").fill("be kind")
    seen.page.get_by_label("Temperature, as a slider").press("ArrowRight")
    seen.page.focus("#message")
    seen.say("hi")
    seen.answered()
    (body,) = seen.bodies()
    assert {name: body[name] for name in given} == given | {"temperature": 0.55}
    assert body["stop"] == ["never ever", "\n\n"]
    assert body["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    seen.reload()
    assert seen.page.input_value("#top_k") == "7"
    seen.page.get_by_role("button", name="Back to these defaults").click()
    seen.page.wait_for_function("() => document.getElementById('top_k').value === ''")
    assert seen.page.input_value("#temperature") == "0.8"


def test_web_chat_can_edit_regenerate_copy_clear_and_undo(chatty, look):
    seen = look(chatty)
    seen.context.grant_permissions(["clipboard-read", "clipboard-write"])
    seen.most(4)
    for number, text in enumerate(("one", "two"), 1):
        seen.say(text)
        seen.answered(number)
    first = seen.page.locator(".assistant .said").first.text_content()
    assert [message["content"] for message in seen.bodies()[-1]["messages"]] == ["one", first, "two"]
    seen.reload()
    assert seen.answered(2)
    seen.page.get_by_role("button", name="Regenerate").last.click()
    seen.answered(2)
    assert seen.bodies()[-1]["messages"] == seen.bodies()[-2]["messages"]
    seen.page.get_by_role("button", name="Copy").last.click()
    seen.page.get_by_role("button", name="Copied").wait_for()
    assert seen.page.evaluate("navigator.clipboard.readText()") == seen.page.locator(".said").last.text_content()
    seen.page.get_by_role("button", name="Edit").first.click()
    seen.page.keyboard.press("ControlOrMeta+A")
    seen.say("three")
    seen.answered()
    assert seen.page.locator(".turn.user .said").all_text_contents() == ["three"]
    seen.page.get_by_role("button", name="Clear").click()
    assert seen.page.locator(".turn").count() == 0
    seen.page.get_by_role("button", name="Undo clear").click()
    assert seen.page.locator(".turn").count() == 2
    seen.page.get_by_role("button", name="Clear").click()
    seen.reload()
    assert seen.page.locator("#welcome").is_visible()


# Tokens


def test_web_tokens_show_their_alternatives(chatty, look):
    seen = look(chatty)
    seen.most(12)
    seen.say("hi")
    text = seen.answered()
    spans = seen.page.locator(".assistant .token")
    assert "".join(spans.all_text_contents()) == text
    card = seen.page.locator("#alternatives")
    clean = next(i for i, each in enumerate(spans.all_text_contents()) if re.fullmatch(r" ?\w+", each))
    spans.nth(clean).hover()
    shares = [float(share.strip("% <")) for share in card.locator(".share").all_text_contents()]
    assert len(shares) in (5, 6)
    assert shares[:5] == sorted(shares[:5], reverse=True)
    assert card.locator(".own .name").text_content() == spans.nth(clean).text_content().replace(" ", "␣")
    seen.page.mouse.move(0, 0)
    assert card.is_hidden()
    spans.nth(0).focus()
    seen.page.keyboard.press("ArrowRight")
    assert card.is_visible()
    assert spans.nth(1).get_attribute("aria-describedby") == "alternatives"
    seen.page.keyboard.press("Escape")
    assert card.is_hidden()
    seen.page.get_by_role("button", name="Probabilities").click()
    assert spans.count() == 0
    assert seen.page.locator(".assistant .said").text_content() == text
    seen.page.focus("#message")
    seen.say("hi")
    seen.answered(2)
    assert "logprobs" not in seen.bodies()[-1]


def test_web_token_colors_equal_the_probabilities(base, look):
    seen = look(base, "#document")
    seen.page.fill("#temperature", "0")
    seen.page.fill("#max_tokens", "6")
    seen.page.focus("#document")
    seen.say("the")
    seen.page.wait_for_selector("body:not(.busy) #regenerate:enabled")
    told = base.post("/v1/completions", prompt="the", max_tokens=6, temperature=0, logprobs=5).json()["choices"][0]
    doubts = seen.page.eval_on_selector_all(
        "#printed .token", "all => all.map(e => +e.style.getPropertyValue('--doubt'))"
    )
    expected = [min(1, logprob / -4.60517) for logprob in told["logprobs"]["token_logprobs"]]
    assert doubts == pytest.approx(expected, abs=2e-3)
    assert seen.page.input_value("#document") == "the" + told["text"]


@pytest.mark.long
def test_web_completion_continues_a_document(base, look):
    seen = look(base, "#document")
    assert seen.page.locator("#chat").is_hidden()
    assert seen.page.get_by_role("button", name="Chat").is_disabled()
    seen.most(8)
    seen.page.focus("#document")
    seen.page.keyboard.type("one")
    seen.page.keyboard.press("Shift+Enter")
    seen.say("two")
    seen.page.wait_for_selector("body:not(.busy) #regenerate:enabled")
    whole = seen.page.input_value("#document")
    assert whole.startswith("one\ntwo")
    assert seen.page.locator("#printed").text_content() == whole
    box = seen.page.locator("#printed .token").nth(3).bounding_box()
    seen.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert seen.page.locator("#alternatives").is_visible()
    seen.page.mouse.move(0, 0)
    seen.page.keyboard.press("ControlOrMeta+End")
    seen.page.keyboard.press("ArrowLeft")
    assert seen.page.locator("#alternatives").is_visible()
    assert "chosen" in seen.page.locator("#status").text_content()
    seen.page.get_by_role("button", name="Regenerate").click()
    seen.page.wait_for_selector("body:not(.busy) #regenerate:enabled")
    assert [body["prompt"] for body in seen.bodies()] == ["one\ntwo"] * 2
    before = seen.page.locator("#printed .token").all_text_contents()
    seen.page.keyboard.press("ControlOrMeta+Home")
    seen.page.keyboard.type("zero ")
    assert seen.page.locator("#printed .token").all_text_contents() == before, "behind an edit they stay what they are"
    whole = seen.page.input_value("#document")
    assert seen.page.locator("#printed").text_content() == whole
    seen.reload()
    assert seen.page.input_value("#document") == whole
    assert seen.page.locator("#printed .token").all_text_contents() == before


def test_web_tokens_are_aligned_with_the_text(chatty, look):
    """Characters of two tokens, characters of two UTF-16 units, text that is held back behind its tokens, and edits."""
    run = """async ([choices, after]) => {
        const { Growing, edited } = await import("/page/tokens.js");
        const growing = new Growing("so: ");
        for (const choice of choices) growing.add(choice);
        const told = (text, tokens) => tokens.map((token) => text.slice(token.start, token.end));
        const kept = after === null ? [] : edited(growing.visible, growing.text, after);
        return [told(growing.text, growing.visible), told(after ?? "", kept)];
    }"""
    parts = [("🙂", b"\xf0\x9f\x99\x82"), ("", b"\xc3"), ("é", b"\xa9"), (" end", b" end"), ("", b"STOP")]
    rows = [(text, {"token": "?", "logprob": -1.0, "bytes": list(part), "top_logprobs": []}) for text, part in parts]
    chat = [{"delta": {"content": text}, "logprobs": {"content": [row]}} for text, row in rows]
    offsets = [("🙂", [0]), ("", [1]), ("é", [1]), ("", [2]), (" end", [6])]
    scores = {"tokens": ["?"], "token_logprobs": [-1.0], "top_logprobs": [{"?": -1.0}]}
    completion = [{"text": text, "logprobs": {**scores, "text_offset": place}} for text, place in offsets]
    seen = look(chatty)
    assert seen.page.evaluate(run, [chat, None])[0] == ["🙂", "é", " end"]
    assert seen.page.evaluate(run, [completion, "so, 🙂é end"]) == [["🙂", "é", " end"]] * 2
    assert seen.page.evaluate(run, [completion, "so: 🙂 and é end"])[1] == ["🙂", "é", " end"]
    assert seen.page.evaluate(run, [completion, "so: 🙂é bend"])[1] == ["🙂", "é"]


def test_web_last_token_excludes_text_typed_after_it(chatty, look):
    """What was typed between two answers stays text, whether the second tells of tokens or not."""
    run = """async (choice) => {
        const { Growing } = await import("/page/tokens.js");
        const growing = new Growing("the model and", [{ start: 3, end: 9, name: " model", logprob: -1, top: [] }]);
        growing.add(choice);
        return growing.visible.map((token) => growing.text.slice(token.start, token.end));
    }"""
    scores = {"tokens": [" so"], "token_logprobs": [-1.0], "top_logprobs": [{" so": -1.0}], "text_offset": [0]}
    seen = look(chatty)
    assert seen.page.evaluate(run, {"text": " so", "logprobs": scores}) == [" model", " so"]
    assert seen.page.evaluate(run, {"text": " so", "logprobs": None}) == [" model"]


def test_web_document_normalizes_line_ends(base, look):
    """Wherever a token ends: between the two characters of a line's end as well."""
    seen = look(base, "#document")
    parts = ["a", "\r\n", "b", "\r", "\nc", "\r", "d\r"]
    offsets = [len("".join(parts[:i])) for i in range(len(parts))]
    scores = {"tokens": parts, "token_logprobs": [-1.0] * 7, "top_logprobs": [{}] * 7, "text_offset": offsets}
    choice = {"index": 0, "text": "".join(parts), "logprobs": scores, "finish_reason": "length"}
    body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    events = {"content-type": "text/event-stream"}
    seen.page.route("**/v1/completions", lambda route: route.fulfill(headers=events, body=body))
    seen.page.fill("#document", "x\n")
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_selector("body:not(.busy) #regenerate:enabled")
    assert seen.page.input_value("#document") == "x\na\nb\nc\nd\n"
    assert seen.page.locator("#printed .token").all_text_contents() == ["a", "\n", "b", "\nc", "\n", "d\n"]


# What must not happen


def answer_of(text):
    """A chat's stream that says this and nothing else, with it as its token and its alternative."""
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}
    token = {"token": text, "logprob": -0.5, "bytes": list(text.encode())}
    scored = {"content": [{**token, "top_logprobs": [token]}]}
    choices = [{"index": 0, "delta": {"content": text}, "logprobs": scored, "finish_reason": "stop"}]
    return f"data: {json.dumps({**head, 'choices': choices})}\n\ndata: [DONE]\n\n"


def test_web_shows_html_as_plain_text(chatty, look):
    seen = look(chatty)
    events = {"content-type": "text/event-stream"}
    seen.page.route("**/v1/chat/completions", lambda route: route.fulfill(headers=events, body=answer_of(HOSTILE)))
    card = {"object": "list", "data": [{"id": HOSTILE, "max_model_len": 9}]}
    seen.page.route("**/v1/models", lambda route: route.fulfill(json=card))
    seen.reload()
    assert seen.page.locator("#model").text_content() == HOSTILE
    seen.say(HOSTILE)
    assert seen.answered() == HOSTILE
    seen.page.locator(".token").hover(position={"x": 5, "y": 5})
    assert "onerror" in seen.page.locator("#alternatives .name").first.text_content()
    wrong = {"error": {"message": HOSTILE}}
    seen.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json=wrong))
    seen.page.focus("#message")
    seen.say("again")
    seen.page.wait_for_selector(".assistant .trouble:not([hidden])")
    assert HOSTILE in seen.page.locator(".assistant .trouble").last.text_content()
    assert seen.page.evaluate("window.hurt") is None
    assert seen.page.locator("main img, main script, #alternatives img, header img").count() == 0
    with pytest.raises(Exception, match="TrustedHTML"):
        seen.page.evaluate("document.body.innerHTML = '<b>'")
    seen.complaints = [said for said in seen.complaints if "400" not in said and "TrustedHTML" not in said]


def test_web_reports_every_error_in_one_sentence(chatty, look, monkeypatch):
    seen = look(chatty)
    seen.page.fill("#temperature", "3")
    seen.page.focus("#message")
    seen.say("hi")
    trouble = seen.page.locator(".assistant .trouble")
    trouble.wait_for()
    assert trouble.text_content() == "Temperature: Input should be less than or equal to 2."
    seen.page.fill("#temperature", "1")
    seen.page.fill("#max_tokens", "3")
    seen.page.get_by_role("button", name="Try again").click()
    seen.answered()
    assert trouble.count() == 1
    assert trouble.is_hidden()
    cut = 'data: {"choices":[{"delta":{"content":"half"}}]}\n\ndata: {"ch'
    seen.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=cut))
    seen.page.focus("#message")
    seen.say("hi")
    seen.page.wait_for_selector(".assistant:last-child .trouble:not([hidden])")
    assert trouble.last.text_content() == "The connection ended before the answer did."
    assert seen.page.locator(".said").last.text_content() == "half"
    seen.page.route("**/v1/chat/completions", lambda route: route.abort())
    seen.page.get_by_role("button", name="Try again").click()
    seen.page.wait_for_function(
        "() => [...document.querySelectorAll('.trouble')].some(e => e.textContent.includes('reached'))"
    )
    assert trouble.last.text_content() == "The server cannot be reached; is it still running?"
    seen.complaints = [said for said in seen.complaints if "Failed to load resource" not in said]


@pytest.mark.long
def test_web_key_is_kept_only_for_the_tab(keyed, look):
    seen = look(keyed, "#key-form:not([hidden])")
    for key in ("wrong", KEY):
        seen.page.get_by_label("This server wants its key").fill(key)
        seen.page.keyboard.press("Enter")
        if key == "wrong":
            seen.page.get_by_text("That is not this server's key.").wait_for()
    seen.page.wait_for_selector("#message")
    seen.most(3)
    seen.say("hi")
    seen.answered()
    assert KEY not in seen.page.evaluate("JSON.stringify(localStorage)")
    assert KEY not in seen.page.content()
    seen.reload()
    assert seen.answered()
    assert all("401" in said for said in seen.complaints)
    seen.complaints = []


def test_web_event_stream_is_parsed_at_any_chunk_size(chatty, look):
    """Between any two bytes, those of one character among them."""
    seen = look(chatty)
    text = 'data: {"a":"é 漢 🙂"}\r\n\r\n: comment\n\ndata:two\ndata: lines\n\ndata: [DONE]\n\ndata: unfinished'
    read = """async ([text, cuts]) => {
        const { events } = await import("/page/api.js");
        const bytes = new TextEncoder().encode(text);
        const stream = new ReadableStream({ start(controller) {
            for (let i = 0; i < bytes.length; i += cuts) controller.enqueue(bytes.slice(i, i + cuts));
            controller.close();
        }});
        const found = [];
        for await (const data of events(stream)) found.push(data);
        return found;
    }"""
    for cuts in (1, 2, 3, 1000):
        assert seen.page.evaluate(read, [text, cuts]) == ['{"a":"é 漢 🙂"}', "two\nlines", "[DONE]"]


# For everyone


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.long
def test_web_follows_the_color_scheme_or_the_user(chatty, look):
    style = "getComputedStyle(document.{}).{}"
    for scheme, other in (("light", "Dark"), ("dark", "Light")):
        seen = look(chatty, color_scheme=scheme)
        paper = seen.page.evaluate(style.format("documentElement", "backgroundColor"))
        assert (luminance(paper) > 0.5) == (scheme == "light")
        for element in ("body", "querySelector('#chat-hint')", "querySelector('.model')"):
            ink = luminance(seen.page.evaluate(style.format(element, "color")))
            high, low = sorted((ink, luminance(paper)), reverse=True)
            assert (high + 0.05) / (low + 0.05) > 4.5, "WCAG AA"
        seen.page.get_by_role("button", name=other).click()
        seen.reload()
        assert (luminance(seen.page.evaluate(style.format("documentElement", "backgroundColor"))) > 0.5) == (
            scheme == "dark"
        )


@pytest.mark.long
def test_web_fits_a_narrow_screen(chatty, look):
    seen = look(chatty, viewport={"width": 360, "height": 640})
    seen.most(8)
    seen.say("a" * 70)
    seen.answered()
    wide = "[...document.querySelectorAll('html, body, .scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert seen.page.evaluate(wide) == 0
    assert seen.page.locator("#settings").is_hidden()
    seen.page.locator(".token", has_text=re.compile(r"\w")).first.click()
    box = seen.page.locator("#alternatives").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    seen.page.get_by_role("button", name="Settings").click()
    assert seen.page.get_by_label("Temperature", exact=True).is_visible()
    assert seen.page.evaluate(wide) == 0
    seen.page.keyboard.press("Escape")
    assert seen.page.locator("#settings").is_hidden()
    for name in ("Send", "Complete", "Probabilities", "Dark"):
        button = seen.page.get_by_role("button", name=name).bounding_box()
        assert button["x"] + button["width"] <= 360
        assert button["y"] + button["height"] <= 640


@pytest.mark.long
def test_web_works_with_the_keyboard_alone(chatty, look):
    """Say something, stop it, walk to an answer's tokens, change a setting and the view, without a mouse."""
    seen = look(chatty)
    press = seen.page.keyboard.press
    focused = "document.activeElement.id || document.activeElement.className || document.activeElement.textContent"

    def tab_to(wanted, key="Tab"):
        for _ in range(40):
            if seen.page.evaluate(focused) == wanted:
                ring = seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert ring == "solid" or wanted in ("message", "document"), "where the keyboard is must be seen"
                return
            press(key)
        raise AssertionError(f"Tab never comes to {wanted}")

    seen.most(20)
    tab_to("max_tokens", "Shift+Tab")
    press("ControlOrMeta+A")
    seen.page.keyboard.type("6")
    tab_to("message")
    seen.page.keyboard.type("two")
    press("Shift+Enter")
    seen.say("lines")
    seen.answered()
    assert seen.bodies()[0]["messages"][0]["content"] == "two\nlines"
    assert seen.bodies()[0]["max_tokens"] == 6
    tab_to("token shown", "Shift+Tab")
    press("End")
    assert seen.page.locator("#alternatives").is_visible()
    tab_to("to-completion", "Shift+Tab")
    press("Enter")
    assert seen.page.evaluate(focused) == "document"
    unnamed = """[...document.querySelectorAll('button, input, textarea')]
        .filter(e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).length"""
    assert seen.page.evaluate(unnamed) == 0
