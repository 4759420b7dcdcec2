"""What the handlers share: models, settings, figures, tools, keys in flight.

One `Context` per server, made by `serve.app.create_app`; nothing of it is global.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from fledge.engine.tools import Tools
from fledge.serve import api_errors
from fledge.serve.metrics import Metrics
from fledge.serve.models import Models
from fledge.serve.settings import Settings


@dataclass
class Context:
    """The server as its handlers see it."""

    models: Models
    settings: Settings
    metrics: Metrics
    tools: Tools | None = None
    draining: bool = False
    in_flight: collections.Counter[str] = field(default_factory=collections.Counter)

    @contextlib.contextmanager
    def place(self, key: str) -> Iterator[None]:
        """A place among the requests in flight; ApiError where the key has no more, or no new work
        is taken."""
        if self.draining:
            raise api_errors.unavailable("The server is shutting down.", "shutting_down")
        limit = self.settings.limits.key_requests
        if key and self.in_flight[key] >= limit:
            raise api_errors.key_busy(limit)
        self.in_flight[key] += 1
        try:
            yield
        finally:
            self.in_flight[key] -= 1
            if not self.in_flight[key]:
                del self.in_flight[key]
