"""Short stories whose questions can only be answered from the story itself: who is where, who has what, how many.

The same few characters, places and things meet in ever new ways, so nothing about them is worth remembering. Documents
say between the events and at the end what is true by then, in sentences or as a list; near events come before far ones,
which is the easier half of learning to look back. In conversations the events stand alone and a question follows.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CHARACTERS = ("Anna", "Ben", "Clara", "David", "Eva", "Frank", "Greta", "Henry")
PLACES = ("mill", "barn", "garden", "forest", "river", "market", "kitchen", "tower")
THINGS = ("lamp", "ball", "key", "book", "rope", "coin", "spoon", "map")
FRUIT = ("apples", "pears", "plums", "nuts")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Something true after an event: as a statement, as the head of a list entry, and as a question with its answer."""

    kind: str
    statement: str
    entry: str
    question: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A sentence, and everything that can be asked after it."""

    sentence: str
    probes: tuple[Probe, ...]


def _where(rng: random.Random) -> Iterator[Event]:
    cast = rng.sample(CHARACTERS, k=rng.randint(2, 3))
    movers = [*cast, *rng.choices(cast, k=rng.randint(0, 2))]
    place_of: dict[str, str] = {}
    for mover in movers:
        place_of[mover] = rng.choice([place for place in PLACES if place != place_of.get(mover)])
        yield Event(
            sentence=f"{mover} {rng.choice(('went', 'walked', 'ran'))} to the {place_of[mover]}.",
            probes=tuple(
                Probe(
                    kind="where",
                    statement=f"{person} is in the {place}.",
                    entry=f"place of {person}",
                    question=f"Where is {person}?",
                    answer=place,
                    choices=PLACES,
                )
                for person, place in place_of.items()
            ),
        )


def _who(rng: random.Random) -> Iterator[Event]:
    cast, things = rng.sample(CHARACTERS, k=3), rng.sample(THINGS, k=rng.randint(2, 3))
    holder: dict[str, str] = {}
    for thing in [*things, *rng.choices(things, k=rng.randint(0, 2))]:
        giver = holder.get(thing)
        holder[thing] = rng.choice([person for person in cast if person != giver])
        taken, given = f"{holder[thing]} took the {thing}.", f"{giver} gave the {thing} to {holder[thing]}."
        yield Event(
            sentence=given if giver else taken,
            probes=tuple(
                Probe(
                    kind="who",
                    statement=f"The {held} is with {person}.",
                    entry=f"holder of the {held}",
                    question=f"Who has the {held}?",
                    answer=person,
                    choices=CHARACTERS,
                )
                for held, person in holder.items()
            ),
        )


def _count(rng: random.Random) -> Iterator[Event]:
    who, fruit = rng.choice(CHARACTERS), rng.choice(FRUIT)
    total, sentence = rng.randint(2, 6), ""
    for step in range(rng.randint(2, 3)):
        if step == 0:
            sentence = f"{who} had {NUMBERS[total]} {fruit}."
        else:
            change = rng.choice([n for n in range(-min(4, total), min(4, 10 - total) + 1) if abs(n) > 1])
            total += change
            sentence = f"{who} {'found' if change > 0 else 'ate'} {NUMBERS[abs(change)]} {fruit}."
        probe = Probe(
            kind="count",
            statement=f"{who} has {NUMBERS[total]} {fruit}.",
            entry=f"{fruit} of {who}",
            question=f"How many {fruit} does {who} have?",
            answer=NUMBERS[total],
            choices=NUMBERS,
        )
        yield Event(sentence=sentence, probes=(probe,))


KINDS: dict[str, Callable[[random.Random], Iterator[Event]]] = {"where": _where, "who": _who, "count": _count}


def story(rng: random.Random) -> list[Event]:
    """The events of a new story, two to five."""
    return list(KINDS[rng.choice(list(KINDS))](rng))


def document(rng: random.Random) -> str:
    """A story with what is true after some of its events and, in any order, at its end."""
    events = story(rng)
    told = []
    for event in events[:-1]:
        told.append(event.sentence)
        if rng.random() < 0.6:
            told.append(rng.choice(event.probes).statement)
    ends = list(events[-1].probes)
    rng.shuffle(ends)
    text = " ".join([*told, events[-1].sentence, "In the end:"])
    if rng.random() < 0.5:
        return text + "".join(f" {probe.statement}" for probe in ends)
    return text + "".join(f"\n{probe.entry}\n{probe.answer}" for probe in ends)
