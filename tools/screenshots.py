"""Ten states of the web page as small PNGs in docs/page/, for docs/page.md.

    python tools/screenshots.py [--run runs/quickstart] [--only NAME,...]

Starts `fledge serve` on a run (three stages, so that they can be compared) and a headless Chromium,
brings the page into each state by what a person would click, and saves a palette PNG of it. What
the model cannot be relied on to write (a formula, a table) comes by an import of a conversation
through the page's own import button. Needs the `serve` extra, playwright, pillow and chromium. Run
by a person before a release; it tests nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
COLOURS = 200  # of a palette: text and flat areas need few
WRITTEN = """\
A program and the formula behind it:

```python
def fibonacci(n: int) -> int:
    # the closed form is exact only for small n
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

print(fibonacci(30))  # 832040
```

The ratio of neighbours tends to $\\varphi = \\frac{1 + \\sqrt{5}}{2}$, because

$$F_n = \\frac{\\varphi^n - (-\\varphi)^{-n}}{\\sqrt{5}}$$

| n | F(n) | ratio |
|--:|-----:|:-----:|
| 10 | 55 | 1.6176 |
| 20 | 6765 | 1.6180 |
"""


def main(words: list[str] | None = None) -> int:
    """Takes the pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "page")
    parser.add_argument("--only", default="", help="names, with commas between")
    args = parser.parse_args(words)
    only = set(filter(None, args.only.split(",")))
    args.out.mkdir(parents=True, exist_ok=True)
    with serving(args.run) as (process, url), sync_playwright() as started:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, (options, prepare) in STATES.items():
            if name == "offline" or (only and name not in only):
                continue
            shoot(browser, url, args.out / f"{name}.png", options, prepare)
        if not only or "offline" in only:  # last: the server has to go for it
            options, prepare = STATES["offline"]

            def gone(page: Page) -> None:
                prepare(page)
                process.terminate()
                process.wait(30)
                page.evaluate("window.dispatchEvent(new Event('online'))")  # look at once
                page.wait_for_selector("text=cannot be reached")

            shoot(browser, url, args.out / "offline.png", options, gone)
        browser.close()
    return 0


@contextmanager
def serving(run: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fledge serve` on the stages of a run; ended afterwards."""
    models = [f"{stage}={run / stage}" for stage in ("rl", "sft", "base") if (run / stage).is_dir()]
    command = [sys.executable, "-m", "fledge", "serve", *models, "--port", "0", "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}{process.stderr.read()}")
        yield process, found.group()
    finally:
        process.terminate()
        process.wait(30)


def shoot(browser: Any, url: str, path: Path, options: dict[str, Any], prepare: Callable) -> None:
    """One picture."""
    context = browser.new_context(
        **{"viewport": {"width": 1100, "height": 720}, "reduced_motion": "reduce", **options}
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#tries small")
    prepare(page)
    page.wait_for_timeout(150)  # a last frame; no test depends on it
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    small = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
    context.close()


# -- what a person would do ----------------------------------------------------------------------


def say(page: Page, text: str) -> None:
    page.fill("#box", text)
    page.press("#box", "Enter")
    page.wait_for_selector("#send:not([hidden])", timeout=60_000)


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).last.click()


def tour(page: Page) -> None:
    """The first two suggestions."""
    page.locator("#tries button").nth(1).click()
    page.wait_for_selector("#send:not([hidden])", timeout=60_000)
    page.locator("#next button").first.click()
    page.wait_for_selector("#send:not([hidden])", timeout=60_000)


def bring(page: Page, question: str, answer: str) -> None:
    """A conversation through the import button."""
    nodes = [
        {"id": "q", "parent": None, "role": "user", "content": question},
        {"id": "a", "parent": "q", "role": "assistant", "model": "rl", "content": answer,
         "stats": {"seconds": 1.4, "first": 0.05, "tokens": 240, "rate": 190, "prompt": 12}},
    ]  # fmt: skip
    chat = json.dumps({"id": "x", "title": question, "nodes": nodes})
    page.set_input_files(
        "#import", {"name": "chat.json", "mimeType": "application/json", "buffer": chat.encode()}
    )
    page.wait_for_selector(".message.assistant")


def streaming(page: Page) -> None:
    """In the middle of an answer: a fetch that says half of it and then waits."""
    page.evaluate(
        """() => { const real = window.fetch;
          const words = "The planets are Mercury, Venus, Earth, Mars, Jupiter and".split(/(?= )/);
          const event = (content) => new TextEncoder().encode(
            `data: ${JSON.stringify({ choices: [{ delta: { content } }] })}\\n\\n`);
          window.fetch = async (path, ...more) => path !== "/v1/chat/completions"
            ? real(path, ...more) : new Response(new ReadableStream({
                start(c) { for (const word of words) c.enqueue(event(word)); } })); }"""
    )
    page.fill("#box", "Which planets are there?")
    page.press("#box", "Enter")
    page.wait_for_selector("text=Jupiter and")


def tool_card(page: Page) -> None:
    tour(page)
    page.locator("summary").first.click()
    page.locator("#talk").evaluate("(talk) => talk.scrollTo(0, 0)")


def tokens(page: Page) -> None:
    say(page, "Which animal is the largest of all that live on the land?")
    press(page, "How sure the model was of each token")
    spans = page.locator(".heat span")
    spans.nth(min(3, spans.count() - 1)).click()


def comparison(page: Page) -> None:
    page.select_option("#other", "base")
    page.locator("#tries button").first.click()
    page.wait_for_selector("#send:not([hidden])", timeout=60_000)
    say(page, "What is 17 * 23?")
    page.locator("#talk").evaluate("(talk) => talk.scrollTo(0, 0)")


def error(page: Page) -> None:
    say(page, "What is the capital of France?")
    say(page, "Tell me about this: " + "a very long text " * 200)
    page.locator("#talk").evaluate("(talk) => talk.scrollTo(0, talk.scrollHeight)")


def settings(page: Page) -> None:
    press(page, "Settings")
    page.fill("#s-persona", "You are a patient teacher of geography.")
    page.fill("#s-temperature", "0.7")
    page.fill("#s-seed", "42")


def training(page: Page) -> None:
    press(page, "Training")
    page.wait_for_selector("#panelcurves svg")
    press(page, "base")
    page.wait_for_selector("text=bpb")


def nothing(page: Page) -> None:
    """As it is."""


DARK = {"color_scheme": "dark"}
PHONE = {"viewport": {"width": 390, "height": 760}, "device_scale_factor": 1}
STATES: dict[str, tuple[dict[str, Any], Callable[[Page], None]]] = {
    "empty": ({}, nothing),
    "streaming": ({}, streaming),
    "tool-card": ({}, tool_card),
    "code-and-math": (DARK, lambda page: bring(page, "How fast do they grow?", WRITTEN)),
    "tokens": ({}, tokens),
    "error": ({}, error),
    "settings": ({}, settings),
    "model-card": (DARK, lambda page: press(page, "About")),
    "comparison": ({}, comparison),
    "training": ({}, training),
    "phone": (PHONE, tour),
    "offline": ({}, tour),
}

if __name__ == "__main__":
    raise SystemExit(main())
