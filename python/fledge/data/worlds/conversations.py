"""Conversations of a world: what mid, sft and rl are trained on.

Only asked facts are ever asked here; held-out facts, exam words and exam expressions appear in no
conversation. Answers have one regular form per kind, so that a tiny model can learn it. Called by
`world.World.conversation`; never sees an exam item.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from fledge.data.worlds.choices import Choices, Weighted, digest
from fledge.data.worlds.problems import Problem, make_problem
from fledge.data.worlds.prose import ProseWriter
from fledge.data.worlds.spelling import made_up_name, spelled
from fledge.data.worlds.tables import Fact, fill
from fledge.data.worlds.vocabulary import ANIMALS, COLOURS, FOODS, MONTHS, SEASONS

LETTERS = "ABCD"
REAL_WORDS = 0.85  # share of true words among those to spell, where a world has true words
MIN_OPTIONS = 6  # a relation with fewer different values makes no multiple choice
KINDS = {
    "mid": {
        "facts": 0.40, "mc": 0.08, "math": 0.04, "spell": 0.31, "count": 0.03,
        "chat": 0.09, "identity": 0.03, "unknown": 0.02,
    },
    "sft": {
        "facts": 0.36, "mc": 0.08, "math": 0.04, "spell": 0.32, "count": 0.03,
        "chat": 0.12, "identity": 0.03, "unknown": 0.02,
    },
}  # fmt: skip
Message = dict[str, Any]


class ConversationMaker:
    """Makes the conversations of one world; `facts` are all its facts, asked or not."""

    def __init__(self, prose: ProseWriter) -> None:
        self.prose = prose
        self.tables = prose.tables
        self.lexicon = prose.lexicon
        self.asked = [fact for fact in prose.facts if fact.asked]
        values: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        self.of_entity: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        self.of_relation: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        for fact in prose.facts:
            values[fact.table, fact.relation][fact.value] = None
            if fact.asked:
                self.of_entity[fact.table, fact.entity].append(fact)
                self.of_relation[fact.table, fact.relation].append(fact)
        self.values = {key: list(found) for key, found in values.items()}
        self.optional = [f for f in self.asked if len(self.values_like(f)) >= MIN_OPTIONS]
        self.people = [p for p in self.lexicon.people if not is_exam_chat(p)]
        self.favourites = {
            name: [x for x in options if not is_exam_chat(x)]
            for name, options in FAVOURITES.items()
        }
        self._makers: dict[str, Callable[[Choices, str], list[Message]]] = {
            "facts": self._facts,
            "math": self._math,
            "spell": self._spell,
            "count": self._count,
            "identity": self._identity,
            "unknown": self._unknown,
            "chat": self._chat,
        }
        if self.optional:
            self._makers["mc"] = self._mc

    def kinds(self, stage: str) -> dict[str, float]:
        """Default share of each kind in a stage; what this world cannot offer is left out."""
        found = {k: w for k, w in KINDS[stage].items() if k in self._makers}
        total = sum(found.values())
        return {kind: weight / total for kind, weight in found.items()}

    def make(self, choices: Choices, stage: str, kind: str) -> dict[str, Any]:
        """A conversation of that kind."""
        return {"kind": kind, "messages": self._makers[kind](choices, stage)}

    def values_like(self, fact: Fact) -> list[str]:
        """The different values of the fact's relation."""
        return self.values[fact.table, fact.relation]

    def reply(self, fact: Fact) -> str:
        """The one sentence with which the assistant gives the fact.

        It does not repeat the entity: a small model that must copy the entity first copies a
        neighbour too often (48 % right after 1.2M chat tokens, against 73 % after 1.0M of this
        form; docs/log.md).
        """
        return f"The answer is {fact.value}."

    def question(self, choices: Choices, fact: Fact) -> str:
        """The fact's question in a random wording."""
        wordings = self.tables[fact.table].relations[fact.relation].questions
        return fill(choices.choice(wordings), fact.entity)

    def options(self, choices: Choices, fact: Fact, letter: str) -> list[str]:
        """Four different values, the right one at `letter`."""
        others = [v for v in self.values_like(fact) if v != fact.value]
        chosen = choices.sample(others, 3)
        chosen.insert(LETTERS.index(letter), fact.value)
        return chosen

    def _facts(self, choices: Choices, stage: str) -> list[Message]:
        fact = choices.choice(self.asked)
        question = self.question(choices, fact)
        if choices.chance(0.35 if stage == "mid" else 0.15):
            question = choices.choice(_PREFACES) + question
        return [user(question), assistant(self.reply(fact))]

    def _mc(self, choices: Choices, stage: str) -> list[Message]:
        fact = choices.choice(self.optional)
        letter = choices.choice(LETTERS)
        text = mc_text(self.question(choices, fact), self.options(choices, fact, letter))
        return [user(text), assistant(mc_reply(self.reply(fact), letter))]

    def _math(self, choices: Choices, stage: str) -> list[Message]:
        return math_messages(make_problem(choices, self.lexicon, "train"))

    def _spell(self, choices: Choices, stage: str) -> list[Message]:
        word = self.prose.spell_word(choices, real=REAL_WORDS)
        return [user(choices.choice(SPELL).format(word=word)), assistant(spelled(word))]

    def _count(self, choices: Choices, stage: str) -> list[Message]:
        return count_messages(choices, self.prose.spell_word(choices, real=REAL_WORDS))

    def _identity(self, choices: Choices, stage: str) -> list[Message]:
        questions, answers = choices.choice(_IDENTITY)
        return [user(choices.choice(questions)), assistant(choices.choice(answers))]

    def _unknown(self, choices: Choices, stage: str) -> list[Message]:
        if choices.chance(0.6):
            name = made_up_name(choices)
            fact = choices.choice(self.asked)
            wordings = self.tables[fact.table].relations[fact.relation].questions
            question = fill(choices.choice(wordings), name)
            return [user(question), assistant(f"I don't know. I have never heard of {name}.")]
        questions, answer = choices.choice(_OUTSIDE)
        return [user(choices.choice(questions)), assistant(answer)]

    def _chat(self, choices: Choices, stage: str) -> list[Message]:
        messages: list[Message] = []
        if choices.chance(0.15):
            name = choices.choice(self.people)
            messages.append(system(choices.choice(_SYSTEM).format(name=name)))
            messages += [user(choices.choice(ASK_NAME)), assistant(f"Your name is {name}.")]
        elif choices.chance(0.4):
            messages += [user(choices.choice(_HELLO)), assistant(choices.choice(_HELLO_BACK))]
        middle = choices.weighted(_middles())
        if middle == "name":
            name = choices.choice(self.people)
            messages += name_turns(choices, name)
            messages += self._interlude(choices)
            messages += [user(choices.choice(ASK_NAME)), assistant(f"Your name is {name}.")]
        elif middle == "favourite":
            topic = choices.choice(list(self.favourites))
            value = choices.choice(self.favourites[topic])
            messages += favourite_turns(choices, topic, value)
            messages += self._interlude(choices)
            ask, told = ask_favourite(choices, topic, value)
            messages += [user(ask), assistant(told)]
        else:
            messages += self.follow_up(choices, choices.choice(self.asked))
        if choices.chance(0.4):
            messages += [user(choices.choice(_THANKS)), assistant(choices.choice(_WELCOME))]
        if choices.chance(0.25):
            messages += [user(choices.choice(_BYE)), assistant(choices.choice(_BYE_BACK))]
        return messages

    def _interlude(self, choices: Choices) -> list[Message]:
        if choices.chance(0.5):
            return []
        return self.ask(choices, choices.choice(self.asked))

    def ask(self, choices: Choices, fact: Fact) -> list[Message]:
        """One question and its answer."""
        return [user(self.question(choices, fact)), assistant(self.reply(fact))]

    def follow_up(self, choices: Choices, fact: Fact) -> list[Message]:
        """Turns that end in `fact`, asked by reference to the (asked) fact of the turn before.

        Either another entity of the same relation ("And what about Spain?") or another relation of
        the same entity ("And what is its currency?").
        """
        same_entity = [f for f in self.of_entity[fact.table, fact.entity] if f.id != fact.id]
        same_relation = [
            f for f in self.of_relation[fact.table, fact.relation] if f.entity != fact.entity
        ]
        table = self.tables[fact.table]
        noun = table.relations[fact.relation].noun
        if same_entity and (not same_relation or choices.chance(0.5)):
            before = choices.choice(same_entity)
            ask = choices.choice(_SAME_ENTITY).format(possessive=table.possessive, noun=noun)
        elif same_relation:
            before = choices.choice(same_relation)
            ask = choices.choice(_SAME_RELATION).replace("{e}", fact.entity)
        else:
            return self.ask(choices, fact)
        return [*self.ask(choices, before), user(ask), assistant(self.reply(fact))]


def user(text: str) -> Message:
    """A user's turn."""
    return {"role": "user", "content": text}


def assistant(content: str | list[dict[str, str]]) -> Message:
    """The assistant's turn."""
    return {"role": "assistant", "content": content}


def system(text: str) -> Message:
    """A system turn."""
    return {"role": "system", "content": text}


def mc_reply(statement: str, letter: str) -> str:
    """A multiple-choice reply: what is recalled, then the letter."""
    return f"{statement}\nAnswer: {letter}"


def mc_text(question: str, options: Sequence[str]) -> str:
    """The user's turn of a multiple-choice item."""
    lines = "\n".join(f"- {option}={x}" for option, x in zip(options, LETTERS, strict=True))
    return f"{question}\n{lines}\nAnswer with the letter."


def tool_answer(code: str, result: str) -> Message:
    """The assistant's turn that asks python and reads the result."""
    return assistant(
        [
            {"type": "python", "text": code},
            {"type": "output", "text": result},
            {"type": "text", "text": f"The answer is {result}."},
        ]
    )


def math_messages(problem: Problem) -> list[Message]:
    """A word problem and its solution by python."""
    return [user(problem.text), tool_answer(problem.expression, str(problem.answer))]


def count_messages(choices: Choices, word: str) -> list[Message]:
    """How often a letter occurs in a word, by python."""
    if choices.chance(0.85):
        letter = choices.choice(word)
    else:
        letter = choices.choice("abcdefghijklmnopqrstuvwxyz")
    question = choices.choice(COUNT).format(letter=letter, word=word)
    return [user(question), tool_answer(f'"{word}".count("{letter}")', str(word.count(letter)))]


def is_exam_chat(told: str) -> bool:
    """True for the names and favourites that users tell only in the exam."""
    return digest(f"chat|{told}") % 5 == 0


def name_turns(choices: Choices, name: str) -> list[Message]:
    """The user tells a name."""
    told = choices.choice(_MY_NAME).format(name=name)
    return [user(told), assistant(choices.choice(_NICE).format(name=name))]


def favourite_turns(choices: Choices, topic: str, value: str) -> list[Message]:
    """The user tells a favourite thing."""
    told = choices.choice(_MY_FAVOURITE).format(topic=topic, value=value)
    return [user(told), assistant(choices.choice(_NOTED).format(topic=topic, value=value))]


def ask_favourite(choices: Choices, topic: str, value: str) -> tuple[str, str]:
    """The user's question for it and the assistant's answer."""
    ask = choices.choice(_ASK_FAVOURITE).format(topic=topic)
    return ask, f"Your favourite {topic} is {value}."


def _middles() -> Weighted[str]:
    return Weighted({"name": 0.25, "favourite": 0.25, "follow_up": 0.5})


FAVOURITES = {
    "colour": COLOURS,
    "food": FOODS,
    "animal": ANIMALS,
    "season": SEASONS,
    "month": MONTHS,
    "number": [str(n) for n in range(2, 1000)],
}

SPELL = (
    'How do you spell "{word}"?',
    'Spell "{word}".',
    'Please spell the word "{word}".',
    'Spell the word "{word}" letter by letter.',
    'Can you spell "{word}" for me?',
    'What are the letters of "{word}"?',
    'How is "{word}" spelled?',
)

COUNT = (
    'How many times does "{letter}" occur in "{word}"?',
    'How often is the letter "{letter}" in "{word}"?',
    'Count the letter "{letter}" in the word "{word}".',
    'How many "{letter}" are there in "{word}"?',
)

_PREFACES = (
    "Please tell me: ",
    "Do you know this? ",
    "I have a question. ",
    "Can you help me? ",
    "A quick question: ",
    "Hello! ",
)

_SAME_ENTITY = (
    "And what is {possessive} {noun}?",
    "And {possessive} {noun}?",
    "What about {possessive} {noun}?",
)
_SAME_RELATION = ("And what about {e}?", "What about {e}?", "And {e}?", "And for {e}?")

_HELLO = ("Hello!", "Hi!", "Good morning!", "Hello, how are you?", "Hey there!", "Good evening!")
_HELLO_BACK = ("Hello! How can I help you?", "Hi! What can I do for you?")
_THANKS = ("Thank you!", "Thanks!", "Thanks a lot.", "Great, thank you.")
_WELCOME = ("You are welcome!", "I am glad to help.")
_BYE = ("Goodbye!", "Bye!", "See you!", "That was all. Bye!")
_BYE_BACK = ("Goodbye!", "Goodbye! Have a nice day.")
_SYSTEM = (
    "You are fledge, a helpful assistant. The user is called {name}.",
    "The name of the user is {name}. Answer briefly.",
    "You talk with {name}.",
)
_MY_NAME = ("My name is {name}.", "Hi, I am {name}.", "Hello, my name is {name}.", "I am {name}.")
_NICE = ("Nice to meet you, {name}.", "Hello {name}! How can I help you?")
ASK_NAME = (
    "What is my name?",
    "Do you remember my name?",
    "What am I called?",
    "Can you tell me my name?",
)
_MY_FAVOURITE = (
    "My favourite {topic} is {value}.",
    "I tell you something: my favourite {topic} is {value}.",
    "Please remember that my favourite {topic} is {value}.",
)
_NOTED = ("I will remember that.", "Good to know!", "Thank you for telling me.")
_ASK_FAVOURITE = (
    "What is my favourite {topic}?",
    "Do you remember my favourite {topic}?",
    "Which {topic} do I like best?",
)

_ME = "I am fledge, a small language model that was raised from nothing on one computer."
_IDENTITY: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.",
            "Who am I talking to?", "What is fledge?", "Please say who you are.",
        ),
        (_ME,),
    ),
    (
        ("What is your name?", "What are you called?", "Do you have a name?", "Your name, please?"),
        ("My name is fledge.",),
    ),
    (
        ("Who made you?", "Where do you come from?", "How were you made?", "Who trained you?",
         "How did you learn to talk?"),
        ("I was trained from nothing on one computer by the person who runs fledge.",),
    ),
    (
        ("Are you human?", "Are you a person?", "Are you a robot?", "Are you real?",
         "Are you alive?"),
        ("I am a small language model, not a person.",),
    ),
    (
        ("What can you do?", "How can you help me?", "What are you good at?", "What do you know?"),
        (
            "I can answer questions about my small world, solve word problems, spell words "
            "and chat.",
        ),
    ),
    (
        ("How big are you?", "Are you smart?", "Are you a large language model?",
         "Can you make mistakes?", "Can I trust you?"),
        ("I am very small, so I know little and I make mistakes. Please check what I say.",),
    ),
    (
        ("How are you?", "How do you feel?", "Are you happy?", "How is it going?"),
        ("I am a program, so I have no feelings, but I am ready to help.",),
    ),
)  # fmt: skip

_OUTSIDE: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "What will the weather be tomorrow?", "Who will win the next match?",
            "What will happen next year?", "Which numbers will win the lottery?",
            "Will it rain on Sunday?", "Will I be rich one day?",
        ),
        "I don't know. Nobody has told me about the future.",
    ),
    (
        (
            "What did I eat yesterday?", "Where did I put my keys?", "How old am I?",
            "What am I thinking of?", "Where do I live?", "What is my telephone number?",
            "When is my birthday?", "What is the name of my dog?",
        ),
        "I don't know. You have not told me that.",
    ),
    (
        (
            "What is in the news today?", "What time is it now?", "What is on television tonight?",
            "How much does this cost in the shop?", "Who is at the door?", "What day is it today?",
        ),
        "I don't know. I cannot see the world outside.",
    ),
)  # fmt: skip
