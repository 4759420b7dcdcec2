"""schemathesis throws requests made from /openapi.json at a live server: never a 5xx."""

from __future__ import annotations

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from fledge.serve import openapi
from fledge.serve.settings import Limits, Settings
from tests.serve.fake import fake_server
from tests.serve.test_http import ask

schema = schemathesis.openapi.from_dict(openapi.document(Limits()))


@pytest.fixture(scope="module")
def served(toy):
    made = fake_server(toy, Settings(openapi=True), context=256, slots=64)
    with made.server:
        yield made


def test_the_document_is_served(served):
    status, _, body = ask(served.url, "GET", "/openapi.json")
    assert status == 200 and json.loads(body) == openapi.document(Limits())


def test_it_is_off_by_default(toy):
    with fake_server(toy).server as server:
        assert ask(server.url, "GET", "/openapi.json")[0] == 404


@schema.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_no_server_errors(case, served):
    reply = case.call(base_url=served.url)
    assert reply.status_code < 500 or reply.status_code == 503, reply.content
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert reply.headers["x-request-id"]


def test_nothing_is_left_over(served):
    """After all that, nothing runs and the engine never crashed."""
    assert served.pool.running == 0 and served.pool.waiting == 0
    assert len(served.engines) == 1
