"""Who else can use the page: axe-core in every state, the keyboard alone, a screen reader's view.

axe-core comes with axe-playwright-python (dev); it is given to the browser through the debugger, as
the page's own CSP lets no script in. Without it the checks below it still run: names, roles and
contrast by our own count.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browser import answered, last, press, say, until

pytestmark = pytest.mark.browser

RICH = (
    "say # Title\n\ntext **bold** [link](http://e.example) `code` $x^2$\n\n> quote\n\n"
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\ndef f(x):  # no\n    return 'a' + str(1)\n```\n"
    "\n1. one\n2. two"
)


def axe_source() -> str:
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe-playwright-python is not installed")
    return (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def violations(page: Any) -> list[Any]:
    """What axe-core finds on the page as it is now: WCAG 2.2 A and AA, and good practice."""
    page.evaluate(axe_source())
    found = page.evaluate(
        """() => axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa",
                                     "best-practice"] }).then((r) => r.violations)"""
    )
    return [
        (
            v["id"],
            [(n["html"][:160], n["any"][0]["message"] if n["any"] else "") for n in v["nodes"]],
        )
        for v in found
    ]


STATES = {
    "empty": lambda page: None,
    "conversation": lambda page: say(page, RICH),
    "tokens": lambda page: (say(page, "say abc"), press(page, "How sure the model was"),
                            page.locator(".heat span").first.click()),
    "cards": lambda page: (say(page, "python 6*7"), page.locator("summary").click(),
                           say(page, "python 1/0")),
    "branches": lambda page: (say(page, "say x"), press(page, "Regenerate"), answered(page)),
    "editing": lambda page: (say(page, "say x"), press(page, "Edit this question")),
    "fault": lambda page: (page.expected.append("503"), say(page, "crash")),
    "pair": lambda page: (page.select_option("#other", "other"), say(page, "say two")),
    "settings": lambda page: press(page, "Settings"),
    "card": lambda page: press(page, "About"),
    "renaming": lambda page: (say(page, "say x"), press(page, "Rename say x")),
    "phone": lambda page: (page.set_viewport_size({"width": 320, "height": 640}),
                           say(page, "say x"), page.click("#menu")),
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES)
def test_axe_finds_nothing(page, served, state, scheme):
    axe_source()
    page.emulate_media(color_scheme=scheme)
    STATES[state](page)
    assert violations(page) == []


def test_own_check_of_names_roles_and_contrast(page):
    """Where axe is missing too: every control has a name, every text 4.5 to 1."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        say(page, RICH)
        found = page.evaluate(
            """() => {
              const bad = [];
              const controls = "button, input, textarea, select, [role=option]";
              for (const e of document.querySelectorAll(controls)) {
                const named = e.textContent.trim() || e.ariaLabel || e.labels?.length;
                if (!named) bad.push(e.outerHTML);
              }
              const parse = (c) => (c.match(/[\\d.]+/g) ?? []).map(Number);
              const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
              const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255)
                + 0.0722 * linear(b / 255);
              const back = (e) => {
                for (; e; e = e.parentElement) {
                  const c = parse(getComputedStyle(e).backgroundColor);
                  if (c.length === 3 || c[3] === 1) return c;
                }
                return [255, 255, 255];
              };
              const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
              while (walker.nextNode()) {
                const e = walker.currentNode.parentElement;
                if (!walker.currentNode.data.trim()) continue;
                if (!e.checkVisibility({ checkOpacity: true })) continue;
                if (e.matches(".hidden, .skip, option, :disabled")) continue;
                const [a, b] = [light(parse(getComputedStyle(e).color)), light(back(e))];
                const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
                if (ratio < 4.5) bad.push([walker.currentNode.data, ratio]);
              }
              return bad;
            }"""
        )
        assert found == []


def test_by_keyboard_only(page):
    """From the first Tab to an edited branch without a mouse."""

    def focused() -> str:
        return page.evaluate(
            "document.activeElement.ariaLabel || document.activeElement.textContent"
        ).strip()

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(60):
            page.keyboard.press(key)
            if focused() == name:
                return
        raise AssertionError(f"{name} cannot be reached")

    page.keyboard.press("Tab")
    assert focused() == "Skip to the message box"
    page.keyboard.press("Enter")
    assert focused() == "Message"
    page.keyboard.type("say one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answered(page)
    assert last(page).split() == ["one", "two"]
    tab_to("Edit this question", "Shift+Tab")
    page.keyboard.press("Enter")
    assert focused() == "Edit the question"
    page.keyboard.press("Control+A")
    page.keyboard.type("say three")
    page.keyboard.press("Enter")
    answered(page)
    assert last(page) == "three"
    tab_to("Previous version", "Shift+Tab")
    page.keyboard.press("Enter")
    assert last(page).split() == ["one", "two"]
    page.keyboard.press("Control+Shift+O")
    assert page.locator("#empty").is_visible() and focused() == "Message"
    tab_to("Settings", "Shift+Tab")
    page.keyboard.press("Enter")
    assert page.locator("#drawer").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#drawer").is_hidden() and focused() == "Settings"


def test_the_focus_goes_where_the_eye_goes(page):
    """Tab order is reading order: what comes later in it is never further up in its column."""
    say(page, "say one")
    page.evaluate("document.activeElement.blur(); document.querySelector('.skip').focus()")
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        place = page.evaluate(
            """() => { const e = document.activeElement, b = e.getBoundingClientRect();
              return e === document.body ? null : [e.closest("aside, header, section, form")?.id
                || e.closest("header")?.localName || "", b.top]; }"""
        )
        if place is None:
            break
        seen.append(place)
    assert [region for region, _ in seen] == sorted(
        (region for region, _ in seen), key=["side", "header", "talk", "composer"].index
    )
    for region in ("side", "talk", "composer"):
        tops = [top for where, top in seen if where == region]
        assert len(tops) >= 2 and all(a <= b + 8 for a, b in itertools.pairwise(tops))


SPOKEN = "The first one is here. Then comes a **second** one! And 3.5 is no end.\nLast"


def test_a_screen_reader_hears_sentences(page):
    """Text that grows by a character at a time is told by whole sentences, each once."""
    heard = page.evaluate(
        """async (text) => {
          const { Speaker } = await import("/web/speak.js");
          const heard = [];
          const speaker = new Speaker({ set textContent(told) { if (told) heard.push(told); } });
          speaker.begin();
          for (let i = 1; i <= text.length; i++) speaker.feed(text.slice(0, i));
          speaker.feed(text, "The answer is complete.");
          return heard;
        }""",
        SPOKEN,
    )
    assert heard == [
        "The first one is here.", "Then comes a second one!", "And 3.5 is no end.",
        "Last The answer is complete.",
    ]  # fmt: skip


def test_the_page_tells_a_screen_reader_everything_once(page, served):
    """However many sentences come within one frame."""
    page.evaluate(
        """() => { window.heard = []; new MutationObserver(() => {
            const text = document.getElementById("spoken").textContent;
            if (text) window.heard.push(text);
          }).observe(document.getElementById("spoken"), { childList: true, characterData: true,
                                                          subtree: true }); }"""
    )
    say(page, f"say {SPOKEN}")
    until(page, "window.heard.at(-1)?.endsWith('complete.')")
    heard = page.evaluate("window.heard")
    assert " ".join(" ".join(heard).split()) == (
        "The first one is here. Then comes a second one! And 3.5 is no end. "
        "Last The answer is complete."
    )
    assert all(re.search(r"[.!]$", told) for told in heard)
    assert page.locator(".message.assistant .body").get_attribute("aria-live") is None


def test_reduced_motion(page, served):
    """No animation for those who asked for none."""
    served.gate.clear()
    try:
        say(page, "say x", wait=False)
        page.wait_for_selector(".cursor")
        moving = "getComputedStyle(document.querySelector('.cursor'), '::after').animationName"
        assert page.evaluate(moving) == "beat"
        page.emulate_media(reduced_motion="reduce")
        assert page.evaluate(moving) == "none"
    finally:
        served.gate.set()
    answered(page)


def test_text_twice_as_large_still_fits(page):
    """At 200 % zoom (half the width) nothing is cut off sideways."""
    page.set_viewport_size({"width": 640, "height": 400})
    say(page, RICH)
    until(page, "document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#box").is_visible() and page.locator("#send").is_visible()
