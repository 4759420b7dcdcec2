"""The web page in headless Chromium against the fake engine: every feature of a conversation."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time

import pytest

from fledge.serve.keys import Key, Keys
from fledge.serve.settings import Settings
from tests.serve.browser import a_page, answered, last, press, say, until
from tests.serve.fake import fake_server
from tests.serve.test_http import ask, chat
from tests.serve.test_openai_client import wait_until

pytestmark = pytest.mark.browser

SECRET = b"a key of at least some length"


def request_of(served):
    """The request that the engine got last."""
    return list(served.engine.requests.values())[-1]


def prompt_of(served) -> str:
    return served.engine.tokenizer.decode(request_of(served).prompt)


def tools_text(page) -> str:
    return page.locator(".message.assistant .tools").last.inner_text()


def test_a_conversation(page):
    assert page.locator("#empty").is_visible()
    say(page, "count 30")
    assert last(page) == " ".join(str(i + 1) for i in range(30))
    assert "tokens/s" in tools_text(page) and "first after" in tools_text(page)
    say(page, "say \u00e9\U0001f468\u200d\U0001f469 \u4f60\u597d")
    assert last(page) == "\u00e9\U0001f468\u200d\U0001f469 \u4f60\u597d"
    assert page.locator(".message").count() == 4
    assert page.locator("#empty").is_hidden()
    assert "of 65536 tokens used" in page.inner_text("#context")


def test_text_streams_and_stop_stops(page, served):
    say(page, "count 3000", wait=False)
    until(page, "document.querySelector('.assistant .body').innerText.length > 40")
    assert page.locator("#stop").is_visible()
    page.keyboard.press("Escape")
    answered(page)
    wait_until(lambda: served.engine.in_flight == 0)
    assert "stopped" in tools_text(page)
    assert len(last(page)) < 5000
    say(page, "say again")
    assert last(page) == "again"


def test_a_regenerated_answer_is_a_branch(page, served):
    say(page, "say first")
    assert request_of(served).params.temperature == 0
    press(page, "Regenerate")
    answered(page)
    assert request_of(served).params.temperature == 0.7
    assert last(page) == "first" and page.locator(".message").count() == 2
    switch = page.locator(".assistant .switch")
    assert switch.inner_text() == "\u20392/2\u203a"
    say(page, "say more")
    press(page, "Previous version")
    assert switch.inner_text() == "\u20391/2\u203a" and page.locator(".message").count() == 2
    assert page.get_by_role("button", name="Previous version").is_disabled()
    press(page, "Next version")
    assert page.locator(".message").count() == 4 and last(page) == "more"


def test_an_edited_question_is_a_branch(page):
    say(page, "say first")
    say(page, "say deeper")
    page.get_by_role("button", name="Edit this question").first.click()
    box = page.get_by_label("Edit the question")
    assert box.input_value() == "say first"
    page.keyboard.press("Escape")
    assert page.locator(".message").count() == 4
    page.get_by_role("button", name="Edit this question").first.click()
    box.fill("say second")
    press(page, "Ask this instead")
    answered(page)
    assert page.locator(".message .body").all_inner_texts() == ["say second", "second"]
    assert page.locator(".user .switch").inner_text() == "\u20392/2\u203a"
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert page.locator(".message .body").all_inner_texts() == ["say second", "second"]
    press(page, "Previous version")
    assert page.locator(".message .body").all_inner_texts()[0::2] == ["say first", "say deeper"]
    press(page, "Edit this question")  # the last question, with ArrowUp's twin
    page.get_by_label("Edit the question").fill("say third")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".message .body").all_inner_texts()[2:] == ["say third", "third"]


def test_a_cut_answer_goes_on(page, served):
    page.get_by_role("button", name="Settings").click()
    page.fill("#s-max_tokens", "5")
    press(page, "Done")
    say(page, "say abcdefgh \U0001f600")
    assert last(page) == "abcde" and "cut at its longest" in tools_text(page)
    press(page, "Continue")
    answered(page)
    assert last(page).startswith("abcdeabcde")  # the fake engine says it anew: joined, no branch
    assert page.locator(".switch").count() == 0
    assert prompt_of(served).endswith("<|assistant_start|>abcde")
    assert request_of(served).prompt[-1] not in served.engine.tokenizer.special_tokens.values()


def test_copying(page):
    say(page, "say some **text**\n```python\nx = 1\n```")
    press(page, "Copy the answer")
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "some **text**\n```python\nx = 1\n```"
    page.locator(".code pre").hover()
    press(page, "Copy code")
    until(page, "navigator.clipboard.readText().then((t) => t === 'x = 1')")
    page.get_by_role("button", name="Copy the question").click()
    until(page, "navigator.clipboard.readText().then((t) => t.startsWith('say some'))")


def test_python_is_shown_as_a_card_and_goes_back_to_the_model(page, served):
    say(page, "python (12+30)*2")
    card = page.locator("details.card")
    assert "Python ran in" in card.locator("summary").inner_text()
    assert "84" in card.locator("summary").inner_text()
    card.locator("summary").click()
    assert card.locator("pre").all_inner_texts() == ["(12+30)*2", "84"]
    assert page.locator(".assistant [data-kind=text]").all_inner_texts() == ["so:", "done"]
    say(page, "python 1/0")
    failed = page.locator("details.card.bad")
    assert "failed" in failed.locator("summary").inner_text()
    assert served.engine.tokenizer.special_tokens["<|python_start|>"] in request_of(served).prompt


def test_a_card_stands_right_behind_an_emoji(page):
    """The server counts code points, JavaScript UTF-16."""
    found = page.evaluate(
        """async () => {
          const { stream, blank } = await import("/web/answer.js");
          const chunks = [
            { choices: [{ delta: { content: "\\u{1f600}\\u{1f468} " } }] },
            { choices: [{ delta: { tool_events: [{ type: "python", at: 3, code: "1" }] } }] },
            { choices: [{ delta: { content: "rest" }, finish_reason: "stop" }] }];
          const text = chunks.map((c) => `data: ${JSON.stringify(c)}\\n\\n`).join("");
          const real = window.fetch;
          window.fetch = async () => new Response(text + "data: [DONE]\\n\\n");
          const message = blank("m");
          await stream(message, { path: "/x", body: {} }, undefined, () => {});
          window.fetch = real;
          return [message.content.slice(0, message.tool_events[0].at), message.fault];
        }"""
    )
    assert found == ["\U0001f600\U0001f468 ", None]


def test_reload_keeps_conversations(page):
    say(page, "say kept <b>bold</b>")
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert last(page) == "kept <b>bold</b>"
    press(page, "New")
    assert page.locator("#empty").is_visible()
    say(page, "say other")
    assert page.locator("#chats li").count() == 2
    page.locator("#chats .open", has_text="kept").click()
    assert last(page) == "kept <b>bold</b>"


def test_search_rename_delete_and_undo(page):
    say(page, "say apples and pears")
    press(page, "New")
    say(page, "say the moon")
    page.fill("#search", "PEARS")
    until(page, "document.querySelectorAll('#chats li').length == 1")
    page.fill("#search", "nothing like it")
    until(page, "document.querySelector('#none').textContent == 'Nothing found.'")
    page.fill("#search", "")
    until(page, "document.querySelectorAll('#chats li').length == 2")
    press(page, "Rename say the moon")
    page.get_by_label("Name of the conversation").fill("Night")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chats >> text=Night")
    press(page, "Delete Night")
    until(page, "document.querySelectorAll('#chats li').length == 1")
    assert page.locator("#empty").is_visible()
    press(page, "Undo")
    until(page, "document.querySelectorAll('#chats li').length == 2")
    assert last(page) == "the moon"
    page.reload()
    page.wait_for_selector("#chats >> text=Night")


def test_export_and_import(page, tmp_path):
    say(page, "say # one")
    press(page, "Regenerate")
    answered(page)
    say(page, "python 6*7")
    with page.expect_download() as download:
        press(page, "Export say # one as Markdown")
    text = download.value.path().read_text()
    assert download.value.suggested_filename == "say-one.md"
    assert "**You**\n\nsay # one" in text and "```python\n6*7\n```\n\n```\n42\n```" in text
    with page.expect_download() as download:
        press(page, "Export say # one as JSON")
    kept = tmp_path / "kept.json"
    download.value.save_as(kept)
    assert [n["role"] for n in json.loads(kept.read_text())["nodes"]] == [
        "user", "assistant", "assistant", "user", "assistant",
    ]  # fmt: skip
    press(page, "Delete say # one")
    page.set_input_files("#import", kept)
    page.wait_for_selector(".message.assistant")
    assert page.locator(".message").count() == 4
    assert page.locator(".switch").inner_text() == "\u20392/2\u203a"
    for wrong in ("{", "[]", '{"nodes": [{"id": 1}]}', '{"id": "x", "nodes": [null]}',
                  '{"id": "x", "nodes": [{"id": "a", "parent": "a"}]}'):  # fmt: skip
        bad = tmp_path / "bad.json"
        bad.write_text(wrong)
        page.set_input_files("#import", bad)
        page.wait_for_selector("text=no conversation that this page exported")
        press(page, "New")


def test_a_conversation_of_the_first_version_opens(page):
    page.evaluate(
        """async () => {
          const { save } = await import("/web/store.js");
          await save({ id: "old", title: "old", messages: [{ role: "user", content: "hi" },
            { role: "assistant", content: "hello", tool_events: [] }] });
        }"""
    )
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert page.locator(".message .body").all_inner_texts() == ["hi", "hello"]


def test_settings_are_of_the_conversation_and_reach_the_server(page, served):
    press(page, "Settings")
    page.fill("#s-system", "Be brief.")
    page.fill("#s-persona", "You are Ada.")
    page.fill("#s-seed", "42")
    page.fill("#s-temperature", "0.3")
    page.fill("#s-top_p", "0.9")
    page.fill("#s-max_tokens", "3")
    press(page, "Done")
    say(page, "say abcdefgh")
    params = request_of(served).params
    assert (params.seed, params.temperature, params.top_p, params.max_tokens) == (42, 0.3, 0.9, 3)
    assert "Be brief.\n\nYou are Ada." in prompt_of(served)
    press(page, "New")
    say(page, "say abcdefgh")
    assert last(page) == "abcdefgh" and "Be brief" not in prompt_of(served)
    press(page, "Settings")
    page.fill("#s-system", "Always.")
    page.check("#s-default")
    press(page, "Done")
    press(page, "New")
    say(page, "say x")
    assert "Always." in prompt_of(served)
    page.locator("#chats .open").last.click()
    page.reload()
    until(page, "document.querySelectorAll('#chats li').length == 3")
    page.locator("#chats .open").last.click()
    press(page, "Settings")
    assert page.input_value("#s-persona") == "You are Ada."


def test_settings_count_from_the_click_on(page, served):
    """A dialog's close event comes a task later; what is sent before it has the new settings."""
    press(page, "Settings")
    page.fill("#s-seed", "7")
    page.evaluate(
        """() => {
          document.querySelector("#drawer .main").click();
          document.getElementById("box").value = "say at once";
          document.getElementById("composer").requestSubmit();
        }"""
    )
    answered(page)
    assert request_of(served).params.seed == 7
    press(page, "Settings")
    page.fill("#s-seed", "8")
    page.keyboard.press("Escape")  # closes without a click, and keeps what was written
    until(page, "!document.querySelector('#drawer').open")
    press(page, "Settings")
    assert page.input_value("#s-seed") == "8"
    press(page, "Done")


def test_the_probabilities_of_tokens(page, served):
    say(page, "say abc")
    assert request_of(served).params.top_logprobs == 4
    press(page, "How sure the model was of each token")
    tokens = page.locator(".heat [role=option]")
    assert tokens.all_inner_texts() == ["a", "b", "c"]
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "b"
    told = page.locator(".told").inner_text()
    assert "\u201cb\u201d 78 %" in told and "\u201cc\u201d 22 %" in told  # exp(-0.25), exp(-1.5)
    press(page, "How sure the model was of each token")
    assert page.locator(".heat").count() == 0
    press(page, "Settings")
    page.uncheck("#s-tokens")
    press(page, "Done")
    say(page, "say abc")
    assert request_of(served).params.top_logprobs == 0
    assert page.locator(".message.assistant").last.get_by_role("button").count() == 2


def test_two_models_side_by_side(page, served):
    page.select_option("#other", "other")
    say(page, "say same")
    assert page.locator(".lane .who").all_inner_texts() == ["fake", "other"]
    assert page.locator(".lane .body").all_inner_texts() == ["same", "same"]
    say(page, "say once more")
    page.reload()
    page.wait_for_selector(".pair")
    assert page.locator(".lane .body").all_inner_texts() == [
        "same",
        "same",
        "once more",
        "once more",
    ]
    say(page, "count 2000", wait=False)
    until(page, "document.querySelectorAll('.lane')[5]?.innerText.length > 60")
    page.click("#stop")
    answered(page)
    assert page.locator(".lane .tools", has_text="stopped").count() == 2


def test_a_base_model_continues_the_text(page, served):
    """It never saw a chat, so it is asked through /v1/completions."""
    found = page.evaluate(
        """async () => {
          const { requestOf } = await import("/web/answer.js");
          const model = { id: "m", fledge: { stage: "base" } };
          const asked = [{ role: "user", content: "The cat" }];
          return requestOf(asked, { seed: "3", system: "x" }, model);
        }"""
    )
    assert found["path"] == "/v1/completions"
    assert found["body"]["prompt"] == "The cat" and found["body"]["seed"] == 3
    assert "messages" not in found["body"]


def test_what_no_longer_fits_is_left_out_and_told(browser, toy):
    made = fake_server(toy, Settings(), context=200)
    with made.server, a_page(browser, made.url) as page:
        for i in range(8):
            say(page, f"say {i} some words to fill it")
        assert last(page) == "7 some words to fill it"
        assert "which no longer fit" in tools_text(page)
        assert "oldest questions are left out" in page.inner_text("#context")
        prompt = prompt_of(made)
        assert "say 7" in prompt and "say 0" not in prompt
        assert len(request_of(made).prompt) <= 200 - 200 // 3
        say(page, "say " + "too long " * 60)
        page.expected.append("400")
        assert "maximum context length" in page.locator(".fault").inner_text()


def test_two_conversations_may_be_answered_at_once(page):
    say(page, "count 400", wait=False)
    until(page, "document.querySelector('.assistant .body')?.innerText.length > 20")
    press(page, "New")
    assert page.locator("#send").is_visible()
    say(page, "say quick")
    assert last(page) == "quick"
    page.locator("#chats .open", has_text="count 400").click()
    answered(page)
    assert last(page).endswith("399 400")


def test_the_queue_is_shown(page, served):
    served.gate.clear()
    threads = [
        threading.Thread(
            target=ask, args=(served.url, "POST", "/v1/chat/completions", chat("say x", n=8))
        )
    ]
    try:
        threads[0].start()
        wait_until(lambda: served.pool.running == 1)  # else the second finds the queue full
        say(page, "say now", wait=False)
        page.wait_for_selector("text=In the queue: 1 request waiting")
        assert page.locator(".cursor").count() == 1
    finally:
        served.gate.set()
        for thread in threads:
            thread.join()
    answered(page)
    assert last(page) == "now"


def test_errors_are_told_and_can_be_tried_again(page, served):
    page.expected += ["503"]
    say(page, "crash")
    assert "engine failed" in page.locator(".fault").inner_text()
    wait_until(lambda: served.pool.state() == "ready")
    served.gate.clear()
    threads = [
        threading.Thread(
            target=ask, args=(served.url, "POST", "/v1/chat/completions", chat("say x", n=8))
        )
        for _ in range(2)
    ]
    try:
        threads[0].start()
        wait_until(lambda: served.pool.running == 1)
        threads[1].start()
        wait_until(lambda: served.pool.waiting == 1)
        say(page, "say now")
        assert "queue of this model is full" in page.locator(".fault").last.inner_text()
    finally:
        served.gate.set()
        for thread in threads:
            if thread.is_alive():
                thread.join()
    press(page, "Try again")
    answered(page)
    assert last(page) == "now"


def test_a_server_that_goes_away_and_comes_back(page, served):
    page.expected += ["ERR_CONNECTION", "ERR_FAILED", "Failed to load"]
    say(page, "say before")
    page.context.set_offline(True)
    page.wait_for_selector("text=You are offline")
    say(page, "say lost")
    assert "cannot be reached" in page.locator(".fault").inner_text()
    page.context.set_offline(False)
    page.wait_for_selector("#status", state="hidden")
    press(page, "Try again")
    answered(page)
    assert last(page) == "lost"


def test_a_page_of_a_server_with_keys(browser, toy):
    made = fake_server(toy, Settings(), keys=Keys((Key("me", hashlib.sha256(SECRET).digest()),)))
    with made.server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(made.url)
        page.wait_for_selector("text=This server asks for an API key")
        press(page, "Enter it")
        page.fill("#s-key", SECRET.decode())
        press(page, "Done")
        until(page, "document.querySelectorAll('#model option').length == 2")
        page.wait_for_selector("#status", state="hidden")
        say(page, "say in")
        assert last(page) == "in"
        context.close()


def test_a_model_that_is_still_loading(browser, served):
    with a_page(browser, served.url) as page:
        state = "loading"

        def models(route):
            body = {"id": "fake", "max_model_len": 100, "fledge": {"state": state}}
            route.fulfill(json={"data": [body]})

        page.route("**/v1/models", models)
        page.reload()
        page.wait_for_selector("text=fake is loading.")
        state = "ready"
        page.wait_for_selector("#status", state="hidden")


def test_a_damaged_conversation_does_not_lock_the_page(page):
    page.evaluate(
        """async () => {
          const { save } = await import("/web/store.js");
          await save({ id: "bad", title: "bad", nodes: [
            { id: "a", parent: null, role: "assistant", content: "x", tool_events: 3 }] });
        }"""
    )
    page.reload()
    page.wait_for_selector("text=That conversation is damaged")
    say(page, "say fine")
    assert last(page) == "fine"


def test_what_is_edited_while_an_answer_comes_is_not_lost(page, served):
    say(page, "say first")
    press(page, "Edit this question")
    page.get_by_label("Edit the question").fill("say second")
    served.gate.clear()
    try:
        say(page, "say other", wait=False)
        press(page, "Ask this instead")
        assert page.get_by_label("Edit the question").input_value() == "say second"
    finally:
        served.gate.set()
    answered(page)
    press(page, "Ask this instead")
    answered(page)
    assert page.locator(".message .body").all_inner_texts() == ["say second", "second"]


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
    say(page, "say " + "word " * 60 + "x" * 300 + "\n\n|" + "a|" * 30 + "\n|" + "-|" * 30)
    page.select_option("#other", "other")
    say(page, "say two")
    until(page, "document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#side").is_hidden()
    page.click("#menu")
    assert page.locator("#side").is_visible()
    press(page, "New")
    assert page.locator("#side").is_hidden()
    for name, close in (("Settings", "Done"), ("About", "Close")):
        press(page, name)
        until(page, "document.documentElement.scrollWidth <= window.innerWidth")
        box = page.locator("dialog[open]").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        press(page, close)


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


def test_a_whole_answer_split_at_every_byte(page):
    """The bytes of a real reply, emoji and tool card in it, cut in two at each place."""
    found = page.evaluate(
        """async () => {
          const messages = [{ role: "user", content: "python '\\u{1f600}'*2" }];
          const body = { messages, stream: true };
          const reply = await fetch("/v1/chat/completions", { method: "POST",
            headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
          const bytes = new Uint8Array(await reply.arrayBuffer());
          const { stream, blank } = await import("/web/answer.js");
          const real = window.fetch;
          const all = new Set();
          for (let cut = 1; cut < bytes.length; cut++) {
            window.fetch = async () => new Response(new ReadableStream({ start(c) {
              c.enqueue(bytes.slice(0, cut)); c.enqueue(bytes.slice(cut)); c.close(); } }));
            const message = blank("m");
            await stream(message, { path: "/x", body: {} }, undefined, () => {});
            const { content, fault, tool_events: tools } = message;
            all.add(JSON.stringify([content, fault, tools.map((t) => t.output ?? t.code)]));
          }
          window.fetch = real;
          return [bytes.length, ...all];
        }"""
    )
    assert found[0] > 1500
    assert [json.loads(one) for one in found[1:]] == [
        ["so:  done", None, ["'\U0001f600'*2", "\U0001f600\U0001f600"]]
    ]


def test_the_page_holds_circles_back_as_the_terminal_does():
    from fledge.plan.defaults import CHAT_DRY_MULTIPLIER
    from fledge.serve import pages

    script = b"".join(body for body, _ in pages.files().values()).decode()
    assert f"dry_multiplier: {CHAT_DRY_MULTIPLIER}" in script


def test_weight(served):
    """What a browser loads, uncompressed; nothing of it is anybody else's."""
    from fledge.serve import pages

    files = {path: body for path, (body, _) in pages.files().items() if path != "/"}
    assert sum(map(len, files.values())) < 80_000
    for path, body in files.items():
        for line in body.split(b"\n"):  # pages strips lines: no text may go over several
            code = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", line)
            assert code.count(b"`") % 2 == 0 or re.search(rb"[=(] ?/", code), (path, line)


def test_first_paint_is_quick(browser, served):
    """The best of five loads; benchmarks gate on seconds, tests on a multiple of the aim."""
    times = []
    for _ in range(5):
        page = browser.new_page()
        page.goto(served.url)
        until(page, "performance.getEntriesByName('first-contentful-paint').length == 1")
        times.append(
            page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        )
        page.close()
    print("first contentful paint, ms:", [round(t) for t in times])
    assert min(times) < 900  # aim 300


@pytest.mark.slow
def test_a_long_answer_stays_smooth(browser, toy):
    """20,000 tokens at the speed at which they come: frames go on, and the heap stays small."""
    made = fake_server(toy, Settings(), context=1 << 17)
    with made.server, a_page(browser, made.url) as page:
        page.evaluate(
            """() => { window.gaps = []; let before = performance.now();
              const tick = (now) => { window.gaps.push(now - before); before = now;
                requestAnimationFrame(tick); }; requestAnimationFrame(tick); }"""
        )
        text = "".join(f"{i} **bold** `x`\n{'' if i % 4 else chr(10)}" for i in range(1250))
        assert len(text) > 20_000
        page.fill("#box", f"say {text}")
        page.evaluate("window.gaps.length = 0")
        page.press("#box", "Enter")
        began = time.monotonic()
        page.wait_for_selector("#send:not([hidden])", timeout=100_000)
        took = time.monotonic() - began
        gaps = sorted(page.evaluate("window.gaps.slice(1)"))  # the first is from before
        late = gaps[int(0.95 * len(gaps))]
        print(
            f"{len(gaps)} frames in {took:.1f} s, 95 % within {late:.0f} ms, worst {gaps[-1]:.0f}"
        )
        assert "1249 bold x" in last(page)
        assert len(gaps) / took > 10 and late < 200 and gaps[-1] < 1000  # aim: 30 a second
        assert page.evaluate("performance.memory.usedJSHeapSize") < 150e6
