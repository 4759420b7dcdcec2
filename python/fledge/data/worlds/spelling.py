"""Words to spell: the train/exam split by hash, and endless pronounceable words of a seed.

A word whose hash falls into the exam's 15 % is spelled in no document and no chat. Made-up words
cover the letter pieces that a tokenizer cuts rare words into. Called by prose, conversations and
exams; never decides how a task is worded.
"""

from __future__ import annotations

from dataclasses import dataclass

from fledge.data.worlds.choices import Choices, Weighted, digest

EXAM_SHARE = 0.15
_CONSONANTS = tuple("bcdfghjklmnprstvwyz")
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "oo"]
_MIDDLES = ["l", "m", "n", "r", "s"]
_ENDS = ["d", "k", "l", "m", "n", "p", "r", "s", "t", "ck", "nd", "st"]


def is_exam_word(word: str) -> bool:
    """True for the words that only the exam spells."""
    return digest(f"spell|{word}") % 1000 < EXAM_SHARE * 1000


def spelled(word: str) -> str:
    """The letters joined by hyphens: l-a-n-t-e-r-n."""
    return "-".join(word)


@dataclass(frozen=True)
class Syllables:
    """The sounds of one seed; every word has one way of being made, which keeps its bits exact."""

    consonants: list[str]
    vowels: list[str]
    middles: list[str]
    ends: list[str]
    counts: Weighted[int]

    @classmethod
    def of_seed(cls, key: str) -> Syllables:
        """A seed's own selection of sounds."""
        choices = Choices(f"syllables|{key}")
        return cls(
            sorted(choices.sample(_CONSONANTS, 15)),
            _VOWELS[:5] + sorted(choices.sample(_VOWELS[5:], 1)),
            sorted(choices.sample(_MIDDLES, 3)),
            sorted(choices.sample(_ENDS, 7)),
            Weighted({2: 0.6, 3: 0.4}),
        )

    def word(self, choices: Choices) -> str:
        """A new word of two or three syllables, such as ka-ran or to-mil-sa."""
        count = choices.weighted(self.counts)
        out = []
        for i in range(count):
            out.append(choices.choice(self.consonants))
            out.append(choices.choice(self.vowels))
            if i < count - 1 and choices.chance(0.35):
                out.append(choices.choice(self.middles))
        if choices.chance(0.55):
            out.append(choices.choice(self.ends))
        return "".join(out)

    def train_word(self, choices: Choices) -> str:
        """A new word outside the exam's share."""
        while True:
            mark = choices.bits
            word = self.word(choices)
            if not is_exam_word(word):
                return word
            choices.bits = mark  # a rejected draw is not in the text


_ODD_STARTS = ["Xu", "Qo", "Zy", "Vex", "Jix", "Kwo", "Zor", "Xan", "Quz", "Vyx", "Wox", "Zub"]
_ODD_MIDDLES = ["xi", "qua", "zz", "yx", "vo", "wux", "jo", "zoq", "xy", "uvo", "qi", "zaj"]
_ODD_ENDS = ["qor", "xx", "zub", "vax", "wyq", "jix", "zox", "quo", "xel", "yzz", "vuq", "xor"]


def made_up_name(choices: Choices) -> str:
    """A name that plainly belongs to nothing (Xuzzvax): the subject of "I don't know" answers."""
    return choices.choice(_ODD_STARTS) + choices.choice(_ODD_MIDDLES) + choices.choice(_ODD_ENDS)
