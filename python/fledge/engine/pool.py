"""Which cache slot belongs to whom, and what a new prompt may reuse of what was read before.

A slot holds one sequence; places are positions. What a slot holds is only ever added to, so any
row may read the first tokens of any other row's sequence in place (`Segment`) as long as the slot
is held. A slot that nobody owns or reads keeps its tokens until it is needed: the next turn of a
conversation then finds its past. Used by `engine.scheduler`; knows tokens and slots, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fledge.model.kv_cache import Segment

MIN_REUSE = 16  # tokens: less is read again sooner than looked after
MIN_SHARE = 48  # tokens: a shorter shared prefix costs more calls a step than it saves reading
MAX_SEGMENTS = 3  # every further one costs a call per layer


@dataclass
class Slot:
    """The state of one slot: its sequence as far as it is stored, its owner and its readers."""

    tokens: list[int] = field(default_factory=list)  # the whole sequence, segments included
    segments: tuple[Segment, ...] = ()
    owned: bool = False
    readers: int = 0  # rows that have a segment in this slot
    last_used: int = 0

    @property
    def base(self) -> int:
        return self.segments[-1].end if self.segments else 0


@dataclass(frozen=True)
class Grant:
    """A slot for a row: the first `cached` tokens of its prompt need not be read again."""

    slot: int
    segments: tuple[Segment, ...]
    cached: int


class SlotPool:
    """Hands out slots, the least recently used first; counts who reads what."""

    def __init__(self, slots: int, *, reuse: bool) -> None:
        self.slots = [Slot() for _ in range(slots)]
        self.reuse = reuse
        self._tick = 0

    @property
    def free(self) -> int:
        """Slots that can be handed out now."""
        return sum(not s.owned and not s.readers for s in self.slots)

    def acquire(self, prompt: list[int]) -> Grant | None:
        """A slot for a row with this prompt, or None while all are held.

        At least the last token of the prompt is left to be read: its logits are needed.
        """
        match, length = self._longest_match(prompt) if self.reuse else (None, 0)
        if match is not None:
            slot = self.slots[match]
            idle = not slot.owned and not slot.readers
            if idle and (length >= 0.9 * len(slot.tokens) or length < MIN_SHARE or self.free == 1):
                return self._take_over(match, length)
            segments = self._segments(match, length)
            if length >= MIN_SHARE and len(segments) <= MAX_SEGMENTS:
                return self._grant_behind(segments, prompt[:length], exclude=match)
        return self._grant_behind((), [], exclude=None)

    def acquire_behind(self, segments: tuple[Segment, ...], prefix: list[int]) -> Grant | None:
        """A slot for a row whose first tokens, `prefix`, lie in `segments`."""
        return self._grant_behind(segments, prefix, exclude=None)

    def take_back(
        self, index: int, segments: tuple[Segment, ...], prefix: list[int]
    ) -> Grant | None:
        """The slot that holds a prompt, when its only reader is the group that keeps it."""
        slot = self.slots[index]
        if slot.owned or slot.readers != 1:
            return None
        slot.owned, slot.tokens, slot.segments = True, list(prefix), segments
        self.hold(segments)
        return Grant(index, segments, len(prefix))

    def segments_of(self, slot: int, length: int) -> tuple[Segment, ...]:
        """Where the first `length` tokens of a slot's sequence lie."""
        return self._segments(slot, length)

    def share_own_prefix(self, slot: int, length: int) -> tuple[Segment, ...]:
        """Turns the first `length` tokens of an owned slot into segments that its own row reads."""
        segments = self._segments(slot, length)
        for segment in segments[len(self.slots[slot].segments) :]:
            self.slots[segment.slot].readers += 1
        self.slots[slot].segments = segments
        return segments

    def hold(self, segments: tuple[Segment, ...]) -> None:
        """One more reader of these segments."""
        for segment in segments:
            self.slots[segment.slot].readers += 1

    def drop(self, segments: tuple[Segment, ...]) -> None:
        """One reader less."""
        for segment in segments:
            self.slots[segment.slot].readers -= 1

    def release(self, slot: int) -> None:
        """The row is done; its tokens stay for reuse until the slot is needed.

        The segments stay held by the slot only while somebody may come back to them: they are
        given up here, and the slot's tokens with them if they are not all its own.
        """
        state = self.slots[slot]
        state.owned = False
        self._tick += 1
        state.last_used = self._tick
        if state.segments:
            only_own = all(s.slot == slot for s in state.segments)
            self.drop(state.segments)
            state.segments = ()
            if not only_own:
                state.tokens = []

    def forget(self) -> None:
        """Nothing that was read before is valid any more (new weights)."""
        for slot in self.slots:
            if not slot.owned and not slot.readers:
                slot.tokens = []

    def _longest_match(self, prompt: list[int]) -> tuple[int | None, int]:
        best, length = None, MIN_REUSE - 1
        head, limit = prompt[:MIN_REUSE], len(prompt) - 1
        for index, slot in enumerate(self.slots):
            if len(slot.tokens) > length and slot.tokens[:MIN_REUSE] == head:
                common = common_prefix(slot.tokens, prompt, limit)
                if common > length:
                    best, length = index, common
        return best, length

    def _segments(self, slot: int, length: int) -> tuple[Segment, ...]:
        state, parts = self.slots[slot], []
        for s in state.segments:
            if s.start < length:
                parts.append(Segment(s.slot, s.start, min(s.end, length)))
        if length > state.base:
            if parts and parts[-1].slot == slot:  # the own prefix, shared before, and what follows
                parts[-1] = Segment(slot, parts[-1].start, length)
            else:
                parts.append(Segment(slot, state.base, length))
        return tuple(parts)

    def _take_over(self, index: int, length: int) -> Grant:
        slot = self.slots[index]
        slot.owned = True
        del slot.tokens[length:]
        return Grant(index, (), length)

    def _grant_behind(
        self, segments: tuple[Segment, ...], prefix: list[int], *, exclude: int | None
    ) -> Grant | None:
        taken = {s.slot for s in segments} | {exclude}
        idle = [
            (slot.last_used if slot.tokens else -1, index)
            for index, slot in enumerate(self.slots)
            if not slot.owned and not slot.readers and index not in taken
        ]
        if not idle:
            return None
        index = min(idle)[1]
        slot = self.slots[index]
        slot.owned, slot.tokens, slot.segments = True, list(prefix), segments
        self.hold(segments)
        return Grant(index, segments, len(prefix))


def common_prefix(a: list[int], b: list[int], limit: int) -> int:
    """Length of the longest common beginning of a and b, at most `limit`."""
    low, high = 0, min(len(a), len(b), limit)
    while low < high:  # lists compare in C: halve the interval
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
