"""One live server on the fake engine for most tests here, and a browser for those of the page."""

from __future__ import annotations

import pytest

from fledge.engine.tools import Tools
from fledge.serve.settings import Limits, Settings
from tests.helpers_model import tiny_tokenizer
from tests.serve.browser import a_browser, a_page
from tests.serve.fake import Fake, fake_server


@pytest.fixture(scope="session")
def toy():
    """A tokenizer of 384 ids."""
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def fake(toy):
    """A server whose answers are known."""
    made: Fake = fake_server(toy, Settings(openapi=True), tools=Tools(), slots=64)
    with made.server:
        yield made


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    with a_browser() as made:
        yield made


@pytest.fixture(scope="module")
def served(toy):
    """A server of which a page is opened: two models, a short queue, tokens that take a moment."""
    settings = Settings(limits=Limits(waiting_rows=1))
    made = fake_server(toy, settings, tools=Tools(), delay=0.002, context=1 << 16)
    with made.server:
        yield made


@pytest.fixture
def page(browser, served):
    """A fresh page of it."""
    with a_page(browser, served.url) as made:
        yield made
