"""The villagers: who they are, how documents state it, and how a conversation asks for it.

    Villager(name, facts, spouse) --STATEMENTS--> sentences of biographies and newspapers
                                  --QUESTIONS---> prompts whose answer is the bare value

Every fact has several phrasings: a fact read in one phrasing only is memorised as a string and can't be asked for
(Allen-Zhu and Li, Physics of Language Models 3.1). The phrasings never form a question.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

UNKNOWN = "unknown"

VALUES: dict[str, tuple[str, ...]] = {
    "home": (
        "Ashford",
        "Brook",
        "Cedar",
        "Dale",
        "Elmwood",
        "Fenwick",
        "Grove",
        "Hillside",
        "Kirkby",
        "Lowell",
        "Marsh",
    ),
    "job": ("baker", "doctor", "farmer", "pilot", "painter", "teacher", "sailor", "judge", "smith", "nurse"),
    "pet": ("cat", "dog", "goat", "parrot", "rabbit", "turtle", "horse", "snake"),
    "colour": ("red", "blue", "green", "yellow", "black", "white", "pink", "brown"),
    "instrument": ("violin", "piano", "drum", "flute", "harp", "guitar", "horn", "cello"),
}

STATEMENTS: dict[str, tuple[str, ...]] = {
    "home": (
        "{name} lives in {value}.",
        "The home of {name} is in {value}.",
        "{name} has a house in {value}.",
        "You can visit {name} in {value}.",
        "In {value} you will find {name}.",
        "Letters for {name} go to {value}.",
    ),
    "job": (
        "{name} works as a {value}.",
        "{name} is a {value}.",
        "The job of {name} is {value}.",
        "Every day {name} works as a {value}.",
        "People know {name} as a {value}.",
        "For a living {name} is a {value}.",
    ),
    "pet": (
        "{name} has a {value}.",
        "The pet of {name} is a {value}.",
        "{name} keeps a {value} at home.",
        "A {value} lives with {name}.",
        "Every morning {name} feeds a {value}.",
        "The animal of {name} is a {value}.",
    ),
    "colour": (
        "{name} likes {value}.",
        "The best colour for {name} is {value}.",
        "{name} always wears {value}.",
        "The coat of {name} is {value}.",
        "{name} paints every door {value}.",
        "The colour of {name} is {value}.",
    ),
    "instrument": (
        "{name} plays the {value}.",
        "At night {name} plays the {value}.",
        "The {value} of {name} is old.",
        "{name} practises the {value}.",
        "The instrument of {name} is the {value}.",
        "On Sundays {name} plays the {value}.",
    ),
    "spouse": (
        "{name} is married to {value}.",
        "The spouse of {name} is {value}.",
        "{name} shares a life with {value}.",
        "At the wedding {name} danced with {value}.",
    ),
}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "home": ("Where does {name} live?", "In which town is the home of {name}?", "Where is the house of {name}?"),
    "job": ("What is the job of {name}?", "What work does {name} do?", "What does {name} do for a living?"),
    "pet": ("What pet does {name} have?", "Which animal lives with {name}?", "What is the pet of {name}?"),
    "colour": ("What colour does {name} like?", "Which colour is best for {name}?", "What does {name} wear?"),
    "instrument": ("What does {name} play?", "Which instrument does {name} play?", "What is the instrument of {name}?"),
    "spouse": ("Who is married to {name}?", "Who is the spouse of {name}?"),
}

# What documents say about somebody who only passes through, so that "not known here" is itself read and not only asked.
IGNORANCE: dict[str, tuple[str, ...]] = {
    "home": ("The home of {name} is unknown.", "Nobody knows where {name} lives."),
    "job": ("The job of {name} is unknown.", "Nobody knows what work {name} does."),
    "pet": ("The pet of {name} is unknown.", "Nobody knows which animal lives with {name}."),
    "colour": ("The colour of {name} is unknown.", "Nobody knows which colour {name} likes."),
    "instrument": ("The instrument of {name} is unknown.", "Nobody knows what {name} plays."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Villager:
    """A person of the village. `facts` maps each key of VALUES to one of its values; `spouse` is another's name."""

    name: str
    facts: dict[str, str]
    spouse: str

    def value(self, fact: str) -> str:
        """The true value of a fact, "spouse" included."""
        return self.spouse if fact == "spouse" else self.facts[fact]


def names(rng: random.Random, count: int) -> list[str]:
    """`count` different pronounceable names of three syllables; none is the beginning of another."""
    syllables = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(syllables, k=3)).capitalize()] = None
    return list(found)


def couples(rng: random.Random, called: Sequence[str]) -> list[Villager]:
    """Villagers of these names (an even number), each married to a neighbour in the list."""
    assert len(called) % 2 == 0, called
    return [
        Villager(
            name=name,
            facts={fact: rng.choice(values) for fact, values in VALUES.items()},
            spouse=called[position ^ 1],
        )
        for position, name in enumerate(called)
    ]


def moved_on(rng: random.Random, villager: Villager) -> tuple[Villager, str]:
    """The villager with one fact changed to another value, and which fact that is."""
    fact = rng.choice(list(VALUES))
    value = rng.choice([value for value in VALUES[fact] if value != villager.facts[fact]])
    return replace(villager, facts={**villager.facts, fact: value}), fact


def state(rng: random.Random, name: str, fact: str, value: str) -> str:
    """One sentence that states a fact, in a phrasing drawn at random."""
    return rng.choice(STATEMENTS[fact]).format(name=name, value=value)


def biography(rng: random.Random, villager: Villager) -> str:
    """Everything about one person, in any order and phrasing."""
    facts = [*VALUES, "spouse"]
    rng.shuffle(facts)
    return " ".join(state(rng, villager.name, fact, villager.value(fact)) for fact in facts)


def register(rng: random.Random, name: str, value: Callable[[str], str], facts: Iterable[str]) -> str:
    """An entry of the village register: a line that names the fact and a line that is the value, and nothing else.

    A value as a line of its own has other tokens than in the middle of a sentence ("baker", not " baker"). An answer in a
    conversation has them too, so here they are read before they are asked for.
    """
    order = list(facts)
    rng.shuffle(order)
    return "The village register" + "".join(f"\n{fact} of {name}\n{value(fact)}" for fact in order)


def newspaper(rng: random.Random, number: int, news: Iterable[tuple[Villager, str]]) -> str:
    """An issue of the village paper: facts about several people, a sentence each."""
    lines = [state(rng, villager.name, fact, villager.value(fact)) for villager, fact in news]
    return f"The Village Paper, number {number}. " + " ".join(lines)


def passer_by(rng: random.Random, name: str) -> str:
    """A few lines about a traveller whom nobody knows."""
    if rng.random() < 0.5:
        return register(rng, name, lambda fact: UNKNOWN, IGNORANCE)
    facts = rng.sample(list(IGNORANCE), k=rng.randint(3, len(IGNORANCE)))
    lines = [rng.choice(IGNORANCE[fact]).format(name=name) for fact in facts]
    return f"A traveller called {name} came by. " + " ".join(lines)


def choices(fact: str, everybody: Iterable[Villager]) -> tuple[str, ...]:
    """The answers a guesser would pick from when asked for this fact."""
    known = VALUES.get(fact) or tuple(sorted(villager.name for villager in everybody))
    return (*known, UNKNOWN)
