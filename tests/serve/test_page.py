"""The web page in headless Chromium against the fake engine. Skips where there is no browser."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from fledge.engine.tools import Tools
from fledge.serve.settings import Limits, Settings
from tests.serve.fake import fake_server
from tests.serve.test_openai_client import wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def served(toy):
    limits = Limits(waiting_rows=1)
    made = fake_server(toy, Settings(limits=limits), tools=Tools(), delay=0.002, context=1 << 16)
    with made.server:
        yield made


@pytest.fixture
def page(browser, served):
    """A fresh page; whatever the console complains of fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=served.url)
    page = context.new_page()
    troubles: list[str] = []
    foreign: list[str] = []
    page.on(
        "console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(served.url) else foreign.append(r.url))
    page.expected = []  # type: ignore[attr-defined]
    page.goto(served.url)
    until(page, "document.querySelectorAll('#model option').length == 2")
    yield page
    left = [t for t in troubles if not any(e in t for e in page.expected)]  # type: ignore
    context.close()
    assert not left and not foreign, (left, foreign)


def say(page, text: str, *, wait: bool = True) -> None:
    page.fill("#box", text)
    page.press("#box", "Enter")
    if wait:
        page.wait_for_selector("#send:not([hidden])", timeout=30_000)


def until(page, expression: str) -> None:
    """Waits for a condition of the page; its own CSP forbids playwright's wait_for_function."""
    wait_until(lambda: page.evaluate(expression), 30)


def last(page) -> str:
    return page.locator(".message.assistant .body").last.inner_text()


def test_a_conversation(page):
    assert page.locator("#empty").is_visible()
    say(page, "count 30")
    assert last(page) == " ".join(str(i + 1) for i in range(30))
    assert "tokens/s" in page.locator(".message.assistant .tools").last.inner_text()
    say(page, "say \u00e9\U0001f468\u200d\U0001f469 \u4f60\u597d")
    assert last(page) == "\u00e9\U0001f468\u200d\U0001f469 \u4f60\u597d"
    assert page.locator(".message").count() == 4
    assert page.locator("#empty").is_hidden()


def test_text_streams_and_stop_stops(page, served):
    say(page, "count 3000", wait=False)
    until(page, "document.querySelector('.assistant .body').innerText.length > 40")
    assert page.locator("#stop").is_visible()
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:not([hidden])")
    wait_until(lambda: served.engine.in_flight == 0)
    assert "stopped" in page.locator(".message.assistant .tools").last.inner_text()
    assert len(last(page)) < 5000
    say(page, "say again")
    assert last(page) == "again"


def test_regenerate_edit_and_copy(page):
    say(page, "say first")
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_selector("#send:not([hidden])")
    assert last(page) == "first" and page.locator(".message").count() == 2
    page.locator(".message.assistant").get_by_role("button", name="Copy").click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "first"
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    assert page.input_value("#box") == "say first" and page.locator(".message").count() == 0
    say(page, "say second")
    assert last(page) == "second"


def test_python_is_shown_as_a_card_and_goes_back_to_the_model(page, served):
    say(page, "python (12+30)*2")
    card = page.locator("details.card")
    assert "Python ran in" in card.locator("summary").inner_text()
    card.locator("summary").click()
    assert card.locator("pre").all_inner_texts() == ["(12+30)*2", "84"]
    assert page.locator(".assistant [data-kind=text]").all_inner_texts() == ["so: ", " done"]
    say(page, "python 1/0")
    failed = page.locator("details.card.bad")
    assert "failed" in failed.locator("summary").inner_text()
    prompt = list(served.engine.requests.values())[-1].prompt
    assert served.engine.tokenizer.special_tokens["<|python_start|>"] in prompt


def test_reload_keeps_conversations(page):
    say(page, "say kept <b>bold</b>")
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert last(page) == "kept <b>bold</b>"
    page.get_by_role("button", name="New").click()
    assert page.locator("#empty").is_visible()
    say(page, "say other")
    assert page.locator("#chats li").count() == 2
    page.locator("#chats .open", has_text="kept").click()
    assert last(page) == "kept <b>bold</b>"
    page.get_by_role("button", name="Delete say kept").click()
    until(page, "document.querySelectorAll('#chats li').length == 1")


def test_settings_reach_the_server(page, served):
    page.get_by_role("button", name="Settings").click()
    page.fill("#s-system", "Be brief.")
    page.fill("#s-seed", "42")
    page.fill("#s-temperature", "0.3")
    page.fill("#s-max_tokens", "3")
    page.get_by_role("button", name="Done").click()
    say(page, "say abcdefgh")
    request = list(served.engine.requests.values())[-1]
    assert (request.params.seed, request.params.temperature) == (42, 0.3)
    assert request.params.max_tokens == 3
    assert "Be brief." in served.engine.tokenizer.decode(request.prompt)
    assert "cut at its longest" in page.locator(".message.assistant .tools").last.inner_text()


def test_errors_are_told_and_can_be_tried_again(page, served):
    page.expected += ["503"]
    say(page, "crash")
    assert "engine failed" in page.locator(".fault").inner_text()
    wait_until(lambda: served.pool.state() == "ready")
    served.gate.clear()
    import threading

    from tests.serve.test_http import ask, chat

    threads = [
        threading.Thread(
            target=ask, args=(served.url, "POST", "/v1/chat/completions", chat("say x", n=8))
        )
        for _ in range(2)
    ]
    try:
        threads[0].start()
        wait_until(lambda: served.pool.running == 1)  # else the second finds the queue full
        threads[1].start()
        wait_until(lambda: served.pool.waiting == 1)
        say(page, "say now")
        assert "queue of this model is full" in page.locator(".fault").last.inner_text()
    finally:
        served.gate.set()
        for thread in threads:
            if thread.is_alive():
                thread.join()
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#send:not([hidden])")
    assert last(page) == "now"


def test_themes(page):
    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    page.emulate_media(color_scheme="dark")
    dark = background()
    assert light != dark
    page.click("#theme")
    assert background() == dark and page.inner_text("#theme") == "Theme: dark"
    page.click("#theme")
    assert background() == light
    page.reload()
    assert background() == light


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone(page, width):
    page.set_viewport_size({"width": width, "height": 640})
    say(page, "say " + "word " * 60 + "x" * 300)
    until(page, "document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#side").is_hidden()
    page.click("#menu")
    assert page.locator("#side").is_visible()
    page.get_by_role("button", name="New").click()
    assert page.locator("#side").is_hidden()


def test_by_keyboard_only(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the message box"
    page.keyboard.press("Enter")
    page.focus("#box")
    page.keyboard.type("say one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:not([hidden])")
    assert last(page).split() == ["one", "two"]
    page.keyboard.press("Control+Shift+O")
    assert page.locator("#empty").is_visible()
    names = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea, select')]"
        ".filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).length"
    )
    assert names == 0


def test_events_split_at_every_byte(page, served):
    """sse.js by itself: any split of the bytes gives the same events."""
    text = (
        'data: {"a":"\u00e9\U0001f600"}\r\n\r\n: ping\n\ndata: {"b":\ndata: 2}\n\ndata: [DONE]\n\n'
    )
    found = page.evaluate(
        """async (text) => {
          const { events } = await import("/web/sse.js");
          const bytes = new TextEncoder().encode(text);
          const all = new Set();
          for (let cut = 0; cut <= bytes.length; cut++) {
            const parts = cut ? [bytes.slice(0, cut), bytes.slice(cut)]
                              : [...bytes].map((b) => new Uint8Array([b]));
            const stream = new ReadableStream({
              start(c) { for (const p of parts) c.enqueue(p); c.close(); } });
            const seen = [];
            const source = events(stream);
            for (;;) {
              const { value, done } = await source.next();
              seen.push(value);
              if (done) break;
            }
            all.add(JSON.stringify(seen));
          }
          return [...all];
        }""",
        text,
    )
    assert [json.loads(one) for one in found] == [[{"a": "\u00e9\U0001f600"}, {"b": 2}, True]]


XSS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>",
    "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](data:text/html,<script>)",
    "[x](vbscript:x)", "[x]( javascript:alert(1))", "[x](\tjavascript:alert(1))",
    "![x](http://evil.example/a.png)", "<iframe src=//evil.example>", "<a href=javascript:1>x</a>",
    "`<b onclick=alert(1)>`", "**<img src=x onerror=alert(1)>**", "# <script>alert(1)</script>",
    "> <script>alert(1)</script>", "- <script>alert(1)</script>", "1. <svg/onload=alert(1)>",
    "| <script>1</script> | b |\n| --- | --- |\n| <img src=x onerror=1> | d |",
    "```html\n<script>alert(1)</script>\n```", "```<script>\nx\n```",
    "<style>*{display:none}</style>",
    "<link rel=stylesheet href=//evil.example>", "<meta http-equiv=refresh content=0>",
    "<base href=//evil.example>", "<form action=//evil.example><input>", "<object data=x>",
    "<embed src=x>", "<math><mi xlink:href=javascript:1>", "&lt;script&gt;", "&#x3C;script&#x3E;",
    "[a](http://x\"onmouseover=alert(1))", "[a](http://x'onmouseover=alert(1))",
    "http://x\"><script>alert(1)</script>", "[<img src=x onerror=1>](http://ok.example)",
    "[a](//evil.example)", "[a](/\\evil.example)", "[a](blob:x)", "[a](file:///etc/passwd)",
    "<<script>script>alert(1)<</script>/script>", "<ScRiPt>alert(1)</ScRiPt>",
    "<img src=x:x onerror\u0000=alert(1)>", "<x onclick=alert(1)>", "<details open ontoggle=1>",
    "<video><source onerror=alert(1)>", "<body onload=alert(1)>", "<input autofocus onfocus=1>",
    "<template><script>1</script></template>", "<noscript><p title=\"</noscript><img src=x>\">",
    "{{constructor.constructor('alert(1)')()}}", "${alert(1)}", "javascript:alert(1)",
    "[x][y]\n\n[y]: javascript:alert(1)", "<!--<script>-->alert(1)", "]]><script>1</script>",
    "<![CDATA[<script>]]>", "*<b>*", "**a *b `c** d* e`", "\\<script>", "<script/src=//e.example>",
    "[\u202ex](http://ok.example)", "<img src=\"data:image/svg+xml,<svg onload=1>\">",
]  # fmt: skip


def test_what_a_model_writes_stays_text(page):
    """Every payload through the renderer: no element beyond the subset, no handler, no bad link."""
    assert len(XSS) >= 60
    found = page.evaluate(
        """async (payloads) => {
          const { update } = await import("/web/markdown.js");
          const known = new Set(["P", "H3", "H4", "H5", "H6", "PRE", "CODE", "UL", "OL", "LI", "HR",
            "BLOCKQUOTE", "DIV", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD",
            "STRONG", "EM", "A", "BR"]);
          const bad = [];
          window.alert = () => bad.push("alert");
          for (const payload of payloads) {
            const root = document.createElement("div");
            document.body.append(root);
            update(root, payload);
            for (const node of root.querySelectorAll("*")) {
              if (!known.has(node.tagName)) bad.push([payload, node.tagName]);
              for (const { name } of node.attributes)
                if (!["class", "href", "rel", "target", "data-language", "start"].includes(name))
                  bad.push([payload, name]);
              if (node.href && !/^https?:/.test(node.href)) bad.push([payload, node.href]);
            }
            root.remove();
          }
          return bad;
        }""",
        XSS,
    )
    assert found == []


def test_markdown(page):
    def html(text: str) -> str:
        return page.evaluate(
            """async (text) => {
              const { update } = await import("/web/markdown.js");
              const root = document.createElement("div");
              update(root, text);
              return new XMLSerializer().serializeToString(root)
                .replaceAll(' xmlns="http://www.w3.org/1999/xhtml"', "");
            }""",
            text,
        ).removeprefix("<div>").removesuffix("</div>")  # fmt: skip

    assert html("a **b** *c* `d*`") == ("<p>a <strong>b</strong> <em>c</em> <code>d*</code></p>")
    assert html("# T\n\ntext\nmore") == "<h3>T</h3><p>text\nmore</p>"
    assert html("- a\n- b\n  - c") == "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"
    assert html("3. a\n4. b") == '<ol start="3"><li>a</li><li>b</li></ol>'
    assert html("```py\nx = 1\n\ny\n```\nafter") == (
        '<pre><code data-language="py">x = 1\n\ny</code></pre><p>after</p>'
    )
    assert html("```\nopen") == "<pre><code>open</code></pre>"
    assert html("> q\n> r") == "<blockquote><p>q\nr</p></blockquote>"
    assert html("| a | b |\n|---|---|\n| 1 | 2 |").endswith(
        "<td>1</td><td>2</td></tr></tbody></table></div>"
    )
    assert 'href="https://a.example/x"' in html("see [it](https://a.example/x).")
    assert html("2 * 3 * 4 and a_b") == "<p>2 * 3 * 4 and a_b</p>"
    assert html("** no** and [x] and `y") == "<p>** no** and [x] and `y</p>"


def test_the_renderer_is_linear(page):
    for hostile in (
        "[",
        "*",
        "**a",
        "`",
        "> ",
        "- ",
        "|",
        "[](",
        "\\",
        "http://",
        "a\n",
        "#\n",
        "  - ",
    ):
        milliseconds = page.evaluate(
            """async (piece) => {
              const { update } = await import("/web/markdown.js");
              const text = piece.repeat(Math.ceil(100000 / piece.length));
              const root = document.createElement("div");
              const began = performance.now();
              update(root, text);
              return performance.now() - began;
            }""",
            hostile,
        )
        assert milliseconds < 5000, (hostile, milliseconds)  # quadratic takes minutes


def test_weight(served):
    from fledge.serve import pages

    assert sum(len(body) for path, (body, _) in pages.files().items() if path != "/") < 80_000


@pytest.mark.slow
def test_a_long_answer_stays_smooth(page):
    page.evaluate(
        """() => { window.gaps = []; let before = performance.now();
          const tick = (now) => { window.gaps.push(now - before); before = now;
            requestAnimationFrame(tick); }; requestAnimationFrame(tick); }"""
    )
    began = time.monotonic()
    say(page, "count 1200", wait=False)
    page.wait_for_selector("#send:not([hidden])", timeout=100_000)
    assert last(page).endswith("1200") and time.monotonic() - began < 100
    frames = page.evaluate("window.gaps.length")
    assert frames > 20
