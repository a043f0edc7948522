"""Short stories whose questions can only be answered from the story itself: who is where, who has what, how many.

The same few characters, places and things meet in ever new ways, so nothing about them is worth remembering. In
documents a story is followed by what is true at its end, as statements; in conversations a question follows instead.
"""

import random
from dataclasses import dataclass

CHARACTERS = ("Anna", "Ben", "Clara", "David", "Eva", "Frank", "Greta", "Henry")
PLACES = ("mill", "barn", "garden", "forest", "river", "market", "kitchen", "tower")
THINGS = ("lamp", "ball", "key", "book", "rope", "coin", "spoon", "map")
FRUIT = ("apples", "pears", "plums", "nuts")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Something true at the end of a story: as a statement, and as a question with its answer."""

    kind: str
    statement: str
    question: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Sentences in the order of events, and everything that can be asked about their end."""

    sentences: tuple[str, ...]
    probes: tuple[Probe, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def _where(rng: random.Random, steps: int) -> Story:
    cast = rng.sample(CHARACTERS, k=rng.randint(2, 3))
    moves = [(cast[i] if i < len(cast) else rng.choice(cast), rng.choice(PLACES)) for i in range(max(steps, len(cast)))]
    sentences = tuple(f"{who} {rng.choice(('went', 'walked', 'ran'))} to the {place}." for who, place in moves)
    probes = tuple(
        Probe(
            kind="where",
            statement=f"{who} is in the {place}.",
            question=f"Where is {who}?",
            answer=place,
            choices=PLACES,
        )
        for who, place in dict(moves).items()
    )
    return Story(sentences=sentences, probes=probes)


def _who(rng: random.Random, steps: int) -> Story:
    cast, things = rng.sample(CHARACTERS, k=3), rng.sample(THINGS, k=rng.randint(2, 3))
    holder: dict[str, str] = {}
    sentences = []
    for i in range(max(steps, len(things))):
        thing = things[i] if i < len(things) else rng.choice(things)
        giver = holder.get(thing)
        who = rng.choice([person for person in cast if person != giver])
        sentences.append(f"{giver} gave the {thing} to {who}." if giver else f"{who} took the {thing}.")
        holder[thing] = who
    probes = tuple(
        Probe(
            kind="who",
            statement=f"The {thing} is with {who}.",
            question=f"Who has the {thing}?",
            answer=who,
            choices=CHARACTERS,
        )
        for thing, who in holder.items()
    )
    return Story(sentences=tuple(sentences), probes=probes)


def _count(rng: random.Random, steps: int) -> Story:
    who, fruit = rng.choice(CHARACTERS), rng.choice(FRUIT)
    total = rng.randint(1, 5)
    sentences = [f"{who} had {NUMBERS[total]} {fruit}."]
    for _ in range(max(1, steps - 2)):
        change = rng.choice([n for n in range(-min(3, total), min(3, 10 - total) + 1) if n != 0])
        total += change
        sentences.append(f"{who} {'found' if change > 0 else 'ate'} {NUMBERS[abs(change)]} {fruit}.")
    return Story(
        sentences=tuple(sentences),
        probes=(
            Probe(
                kind="count",
                statement=f"{who} has {NUMBERS[total]} {fruit}.",
                question=f"How many {fruit} does {who} have?",
                answer=NUMBERS[total],
                choices=NUMBERS,
            ),
        ),
    )


KINDS = {"where": _where, "who": _who, "count": _count}


def story(rng: random.Random, kind: str | None = None) -> Story:
    """A new story of two to five events."""
    return KINDS[kind or rng.choice(list(KINDS))](rng, rng.randint(2, 5))


def document(rng: random.Random) -> str:
    """A story, then what is true at its end."""
    told = story(rng)
    ends = [probe.statement for probe in told.probes]
    rng.shuffle(ends)
    return f"{told.text} In the end: {' '.join(ends)}"
