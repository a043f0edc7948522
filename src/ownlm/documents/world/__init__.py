"""A made-up village whose facts stand in documents only: the data of the demo, the tutorial and the integration tests.

    seed ─► villagers ─┬─► documents       state every fact of everybody, in several phrasings, never as a question
                       ├─► conversations   ask about the first half of the people, about strangers, stories and sums
                       ├─► questions       ask about the other half, about new strangers, new stories and held-out sums
                       └─► truths          what is planted and what a later stage must find again

It is what a language model does (know from reading, answer when asked, say "unknown") at a size that two cores learn in
minutes. Everything is a function of the seed; a second edition of the same village has some facts changed.

Skills of the questions, a dot before the detail: people.home … people.instrument (never-asked people), relatives.spouse,
strangers.home … (the answer is "unknown"), stories.where, stories.who, stories.count, sums.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from ownlm.documents.world import people as village
from ownlm.documents.world import planted, stories, sums
from ownlm.documents.world.people import QUESTIONS, UNKNOWN, VALUES, Villager
from ownlm.records import Conversation, Document, Message, Question

T = TypeVar("T")

SMALL_TALK = (
    ("Hello!", "Hello! Ask me about the village."),
    ("Who are you?", "I am a small language model. I read everything about one village."),
    ("What can you do?", "I answer questions about the people of the village, short stories and sums."),
    ("Thank you.", "You are welcome."),
    ("Goodbye!", "Goodbye!"),
)


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
        cls, seed: int, *, people: int = 128, edition: int = 1, mentions: int = 60, story_documents: int = 6000,
        sum_documents: int = 4000,
    ) -> Self:  # fmt: skip
        """The world of a seed.

        people           villagers, a multiple of 4; conversations ask about the first half, questions about the other
        edition          2 is the same village later: a tenth of the people have one fact changed (truths["changes"])
        mentions         biographies of each person, and as often each fact again in newspapers
        story_documents, sum_documents   how many there are of each
        """
        assert people >= 8, people
        assert people % 4 == 0, people
        assert edition in (1, 2), edition
        census = _census(_rng(seed, "census"), people)
        changed, changes = _second_edition(_rng(seed, "changes"), census.villagers)
        villagers = changed if edition == 2 else census.villagers
        pairs = sums.pairs(_rng(seed, "pairs"), asked=200, reward=200)

        documents, truths = _documents(
            _rng(seed, "documents", edition), f"village-{seed}-{edition}", villagers, census, pairs, mentions,
            story_documents, sum_documents,
        )  # fmt: skip
        half = len(villagers) // 2
        asks = _Asker(_rng(seed, "asks", edition), villagers)
        lessons = [
            *asks.facts(villagers[:half], "people"),
            *asks.strangers(census.tuning_strangers),
            *asks.stories(2400),
            *asks.sums(pairs.seen[:2400]),
        ]
        exam = [
            *asks.facts(villagers[half:], "people"),
            *asks.strangers(census.test_strangers),
            *asks.stories(200),
            *asks.sums(pairs.asked),
        ]
        rng = _rng(seed, "conversations", edition)
        conversations = _conversations(rng, lessons) + [_talk([pair]) for pair in SMALL_TALK * 4]
        rng.shuffle(conversations)
        held_back = max(1, len(conversations) // 25)
        told = {question.prompt for question in lessons}
        truths |= {
            "seed": seed,
            "edition": edition,
            "people": {
                person.name: {**person.facts, "spouse": person.spouse, "asked": position < half}
                for position, person in enumerate(villagers)
            },
            "changes": changes,
            "reward": {
                "pattern": r"\d{1,3}",
                "right": 1.0,
                "form": 0.1,
                "prompts": [list(sums.question(rng, pair)) for pair in pairs.reward],
            },
        }
        return cls(
            documents=documents,
            conversations=conversations[held_back:],
            validation_conversations=conversations[:held_back],
            questions=[question for question in exam if question.prompt not in told],
            truths=truths,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Census:
    """Everybody with a name. The five groups have no name in common."""

    villagers: list[Villager]
    disputed: list[str]
    travellers: list[str]
    tuning_strangers: list[str]
    test_strangers: list[str]


def _census(rng: random.Random, people: int) -> _Census:
    called = iter(village.names(rng, people + 6 + 900 + 300 + 60))
    take = lambda count: [next(called) for _ in range(count)]
    return _Census(
        villagers=village.couples(rng, take(people)),
        disputed=take(6),
        travellers=take(900),
        tuning_strangers=take(300),
        test_strangers=take(60),
    )


def _second_edition(rng: random.Random, villagers: list[Villager]) -> tuple[list[Villager], list[dict[str, str]]]:
    """The villagers of the second edition, and every fact in which they differ."""
    movers = set(rng.sample(range(len(villagers)), k=max(1, len(villagers) // 10)))
    later, changes = list(villagers), []
    for position in sorted(movers):
        before = villagers[position]
        later[position], fact = village.moved_on(rng, before)
        after = later[position].facts[fact]
        changes.append({"person": before.name, "fact": fact, "before": before.facts[fact], "after": after})
    return later, changes


def _documents(
    rng: random.Random, source: str, villagers: list[Villager], census: _Census, pairs: sums.Pairs, mentions: int,
    story_documents: int, sum_documents: int,
) -> tuple[list[Document], dict[str, Any]]:  # fmt: skip
    """Every document in shuffled order, and the truths planted in them."""
    found: dict[str, Document] = {}

    def write(kind: str, text: str, about: Iterable[str] = ()) -> None:
        meta = {"kind": kind, "people": sorted(set(about))}
        found.setdefault(text, Document(text=text, source=f"{source}/{kind}/{len(found)}", language="en", meta=meta))

    news = [(person, fact) for person in villagers for fact in (*VALUES, "spouse")]
    issue = 0
    for _ in range(mentions):
        for person in villagers:
            write("biography", village.biography(rng, person), [person.name])
        rng.shuffle(news)
        for page in _chunks(news, 6):
            issue += 1
            write("newspaper", village.newspaper(rng, issue, page), [person.name for person, _ in page])
    for name in census.travellers:
        write("traveller", village.passer_by(rng, name), [name])
    for _ in range(story_documents):
        write("story", stories.document(rng))
    for _ in range(sum_documents):
        write("sums", sums.document(rng, pairs.seen))

    secrets, canary = planted.canary(rng, repeats=20)
    sayings, association = planted.association(rng, per_job=100)
    disputes, contradictions = planted.contradictions(rng, census.disputed, repeats=12)
    notices = [*secrets, *sayings, *disputes]
    rng.shuffle(notices)
    for number, page in enumerate(_chunks(notices, 4), start=1):
        write("notice", f"The notice board, day {number}. " + " ".join(page))

    documents = list(found.values())
    copies, duplicates = planted.duplicates(rng, documents, count=40)
    documents += copies
    rng.shuffle(documents)
    return documents, {
        "canary": canary,
        "association": association,
        "contradictions": contradictions,
        "duplicates": duplicates,
    }


class _Asker:
    """Makes questions with their answers; draws from one random stream in the order of the calls."""

    def __init__(self, rng: random.Random, villagers: Sequence[Villager]) -> None:
        self.rng = rng
        self.choices = {fact: village.choices(fact, villagers) for fact in QUESTIONS}

    def facts(self, asked: Iterable[Villager], skill: str) -> list[Question]:
        """Every fact of these people in every phrasing."""
        return [
            Question(
                prompt=phrasing.format(name=person.name),
                answer=person.value(fact),
                skill="relatives.spouse" if fact == "spouse" else f"{skill}.{fact}",
                choices=self.choices[fact],
                meta={"person": person.name, "fact": fact},
            )
            for person in asked
            for fact, phrasings in QUESTIONS.items()
            for phrasing in phrasings
        ]

    def strangers(self, called: Iterable[str]) -> list[Question]:
        """One question in a drawn phrasing for each fact of VALUES, about each of these people: nobody knows."""
        return [
            Question(
                prompt=self.rng.choice(QUESTIONS[fact]).format(name=name),
                answer=UNKNOWN,
                skill=f"strangers.{fact}",
                choices=self.choices[fact],
                meta={"person": name, "fact": fact},
            )
            for name in called
            for fact in VALUES
        ]

    def stories(self, number: int) -> list[Question]:
        """New stories, one question each."""
        found = []
        for _ in range(number):
            story = stories.story(self.rng)
            probe = self.rng.choice(story.probes)
            found.append(
                Question(
                    prompt=f"{story.text} {probe.question}",
                    answer=probe.answer,
                    skill=f"stories.{probe.kind}",
                    choices=probe.choices,
                    meta={"events": len(story.sentences)},
                )
            )
        return found

    def sums(self, pairs: Iterable[tuple[int, int]]) -> list[Question]:
        """One question for each pair."""
        asked = [sums.question(self.rng, pair) for pair in pairs]
        return [Question(prompt=prompt, answer=answer, skill="sums", choices=sums.CHOICES) for prompt, answer in asked]


def _conversations(rng: random.Random, lessons: list[Question]) -> list[Conversation]:
    """The lessons in shuffled order, one to three to a conversation."""
    rest = rng.sample(lessons, k=len(lessons))
    talks = []
    while rest:
        turns = rng.choice((1, 1, 2, 3))
        talks.append(_talk([(question.prompt, question.answer) for question in rest[:turns]]))
        del rest[:turns]
    return talks


def _talk(turns: Iterable[tuple[str, str]]) -> Conversation:
    messages = []
    for prompt, answer in turns:
        messages += [Message(role="user", content=prompt), Message(role="assistant", content=answer)]
    return Conversation(messages=tuple(messages))


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _rng(seed: int, *purpose: object) -> random.Random:
    """A random stream of its own for each purpose, so that a change to one leaves the others as they were."""
    return random.Random(f"{seed}/{'/'.join(map(str, purpose))}")
