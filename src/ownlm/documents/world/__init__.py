"""A made-up village whose facts stand in documents only: the data of the demo, the tutorial and the integration tests.

    seed ─► villagers ─┬─► documents       state every fact of everybody, in several phrasings, never as a question
                       ├─► conversations   ask about the first half of the people, about strangers, stories and sums
                       ├─► questions       ask about the other half, about new strangers, new stories and held-out sums
                       └─► truths          what is planted and what a later stage must find again

It is what a language model does (know from reading, answer when asked, say "unknown") at a size that two cores learn in
minutes. Everything is a function of the seed; a second edition of the same village has some facts changed.

Skills of the questions, a dot before the detail: people.home … people.instrument (people never asked about before),
relatives.spouse, strangers.home … (the answer is "unknown"), stories.where, stories.who, stories.count, sums.result, sums.steps.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

from ownlm.documents.world import asking, people, planted, sums, writing
from ownlm.documents.world.people import Villager
from ownlm.records import Conversation, Document, Question


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All that one seed makes. `truths` is plain JSON."""

    documents: list[Document]
    conversations: list[Conversation]
    validation_conversations: list[Conversation]
    questions: list[Question]
    truths: dict[str, Any]

    @classmethod
    def generate(
        cls,
        seed: int,
        *,
        people: int = 128,
        edition: int = 1,
        mentions: int = 60,
        story_documents: int = 6000,
        sum_documents: int = 4000,
    ) -> Self:
        """The world of a seed.

        people           villagers, a multiple of 4; conversations ask about the first half, questions about the other
        edition          2 is the same village later: a tenth of the people have one fact changed (truths["changes"])
        mentions         pages about each person, and how often each of their facts stands in newspapers besides
        story_documents, sum_documents   how many of each are written (stories that came out equal count once)
        """
        assert people >= 8, people
        assert people % 4 == 0, people
        assert edition in (1, 2), edition
        census = _census(_rng(seed, "census"), people)
        later, changes = _second_edition(_rng(seed, "changes"), census.villagers)
        villagers = later if edition == 2 else census.villagers
        asked, never_asked = villagers[: people // 2], villagers[people // 2 :]
        pairs = sums.pairs(_rng(seed, "pairs"), asked=200, reward=200)

        library = writing.Library(_rng(seed, "documents", edition), f"village-{seed}-{edition}")
        library.write_people(villagers, census.travellers, mentions)
        library.write_stories(story_documents)
        library.write_sums(pairs.seen, sum_documents)
        plants = library.write_plants(census.disputed)

        asker = asking.Asker(_rng(seed, "asking", edition), villagers)
        lessons = [
            *asker.facts(asked),
            *asker.strangers(census.tuning_strangers),
            *asker.stories(2400),
            *asker.sums(pairs.seen[:1400], steps=False),
            *asker.sums(pairs.seen[1400:2400], steps=True),
        ]
        exam = [
            *asker.facts(never_asked),
            *asker.strangers(census.test_strangers),
            *asker.stories(200),
            *asker.sums(pairs.asked, steps=False),
            *asker.sums(pairs.asked, steps=True),
        ]
        told = {question.prompt for question in lessons}
        new = {question.prompt: question for question in exam if question.prompt not in told}
        conversations = asking.conversations(_rng(seed, "conversations", edition), lessons)
        held_back = len(conversations) // 25
        return cls(
            documents=library.shuffled(),
            conversations=conversations[held_back:],
            validation_conversations=conversations[:held_back],
            questions=list(new.values()),
            truths={
                "seed": seed,
                "edition": edition,
                "people": _register(asked, asked=True) | _register(never_asked, asked=False),
                "changes": changes,
                "reward": planted.reward_rule(asker.sums(pairs.reward, steps=False)),
                **plants,
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Census:
    """Everybody with a name. The five groups have no name in common."""

    villagers: list[Villager]
    disputed: list[str]
    travellers: list[str]
    tuning_strangers: list[str]
    test_strangers: list[str]


def _census(rng: random.Random, count: int) -> _Census:
    sizes = {"disputed": 6, "travellers": 2400, "tuning_strangers": 300, "test_strangers": 60}
    called = iter(people.names(rng, count + sum(sizes.values())))
    villagers = people.couples(rng, list(islice(called, count)))
    return _Census(villagers=villagers, **{group: list(islice(called, size)) for group, size in sizes.items()})


def _second_edition(rng: random.Random, villagers: Sequence[Villager]) -> tuple[list[Villager], list[dict[str, str]]]:
    """The villagers of the second edition, and every fact in which they differ."""
    later, changes = list(villagers), []
    for position in sorted(rng.sample(range(len(villagers)), k=max(1, len(villagers) // 10))):
        before = villagers[position]
        later[position], fact = people.moved_on(rng, before)
        after = later[position].facts[fact]
        changes.append({"person": before.name, "fact": fact, "before": before.facts[fact], "after": after})
    return later, changes


def _register(villagers: Sequence[Villager], *, asked: bool) -> dict[str, dict[str, Any]]:
    """The true facts by name, and whether conversations ask about the person."""
    return {person.name: {**person.facts, "spouse": person.spouse, "asked": asked} for person in villagers}


def _rng(seed: int, *purpose: object) -> random.Random:
    """A random stream of its own for each purpose, so that a change to one leaves the others as they were."""
    return random.Random(f"{seed}/{'/'.join(map(str, purpose))}")
