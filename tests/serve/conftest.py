"""One live server on the fake engine for most tests here, and one on a tiny real model."""

from __future__ import annotations

import pytest

from fledge.engine.tools import Tools
from fledge.serve.settings import Settings
from tests.helpers_model import tiny_tokenizer
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
