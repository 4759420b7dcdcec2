"""Tokens in, text out: safe to show as it comes, cut at stop strings.

A token may end in the middle of a code point, and a stop string may begin in one token and end in
another. `TextStream` holds back exactly what cannot be told yet: the bytes of an unfinished code
point, and the longest end of the text that a stop string begins with. Used by the server and by
whoever streams text; it knows nothing of batches and never runs a model.
"""

from __future__ import annotations

from fledge.tokenizer import Tokenizer


class TextStream:
    """The text of one answer. `push` every token, `finish` once; `stopped` tells of a stop string.

    The pieces given out, joined, are the text up to the first stop string, which is not given out.
    Special tokens add no text. Bytes that are not UTF-8 become U+FFFD, as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str] | None = None) -> None:
        self._decoder = tokenizer.decoder(skip_special=True)
        self._stop = [s for s in stop or [] if s]
        self._held = ""
        self.stopped: str | None = None  # the stop string that ended the text

    @property
    def finished(self) -> bool:
        """A stop string was met: whatever is pushed from now on is dropped."""
        return self.stopped is not None

    def push(self, token: int) -> str:
        """The text that is certain now; "" while the token completes nothing."""
        if self.finished or token < 0:  # -1: the event of a cancelled choice
            return ""
        return self._emit(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back, when no more tokens will come."""
        if self.finished:
            return ""
        text = self._emit(self._decoder.finish())
        rest, self._held = self._held, ""
        return text + rest

    def _emit(self, new: str) -> str:
        text = self._held + new
        found = [(text.find(s) + len(s), -len(s), s) for s in self._stop if s in text]
        if found:
            # the first to be complete, so that the split into tokens changes nothing
            end, _, self.stopped = min(found)
            place = end - len(self.stopped)
            self._held = ""
            return text[:place]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        longest = max((len(s) for s in self._stop), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stop):
                return size
        return 0
