"""What the tests of the page share: a browser, a page that may not complain, small verbs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.test_openai_client import wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

SERIALISE = """(text) => import("/web/markdown.js").then(({ update }) => {
  const root = document.createElement("div");
  update(root, text);
  const plain = (node) => node.nodeType === 3 ? node.data
    : [node.localName, Object.fromEntries([...node.attributes].map((a) => [a.name, a.value])),
       [...node.childNodes].map(plain)];
  root.normalize();
  return [...root.childNodes].map(plain);
})"""


@contextlib.contextmanager
def a_browser() -> Iterator[Any]:
    """Headless Chromium; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@contextlib.contextmanager
def a_page(browser: Any, url: str, *, models: int = 2, **options: Any) -> Iterator[Any]:
    """A fresh page; whatever its console complains of, or a request elsewhere, fails the test.

    A test that provokes an error appends a part of its text to `page.expected`.
    """
    options.setdefault("viewport", {"width": 1200, "height": 800})
    context = browser.new_context(**options)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
    page = context.new_page()
    troubles: list[str] = []
    foreign: list[str] = []
    page.on(
        "console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda r: None if _own(r.url, url) else foreign.append(r.url))
    page.expected = []
    page.goto(url)
    until(page, f"document.querySelectorAll('#model option').length == {models}")
    yield page
    left = [t for t in troubles if not any(e in t for e in page.expected)]
    context.close()
    assert not left and not foreign, (left, foreign)


def _own(address: str, url: str) -> bool:
    return address.startswith((url, f"blob:{url}"))


def until(page: Any, expression: str, seconds: float = 30) -> None:
    """Waits for a condition of the page; its own CSP forbids playwright's wait_for_function."""
    wait_until(lambda: page.evaluate(expression), seconds)


def say(page: Any, text: str, *, wait: bool = True) -> None:
    """Types a message and sends it."""
    page.fill("#box", text)
    page.press("#box", "Enter")
    if wait:
        answered(page)


def answered(page: Any) -> None:
    """Waits until nothing is being written."""
    page.wait_for_selector("#send:not([hidden])", timeout=30_000)


def last(page: Any) -> str:
    """The text of the last answer."""
    return page.locator(".message.assistant .body").last.inner_text()


def press(page: Any, name: str, **options: Any) -> None:
    """Clicks the last button of that name."""
    page.get_by_role("button", name=name, **options).last.click()
