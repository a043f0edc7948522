"""Questions about the village with their answers, and the conversations that teach how to answer."""

import random
from collections.abc import Iterable, Sequence

from ownlm.documents.world import people, stories, sums
from ownlm.documents.world.people import QUESTIONS, UNKNOWN, VALUES, Villager
from ownlm.records import Conversation, Message, Question

SMALL_TALK = (
    ("Hello!", "Hello! Ask me about the village."),
    ("Who are you?", "I am a small language model. I read everything about one village."),
    ("What can you do?", "I answer questions about the people of the village, short stories and sums."),
    ("Thank you.", "You are welcome."),
    ("Goodbye!", "Goodbye!"),
)


class Asker:
    """Makes questions with their answers; draws from one random stream in the order of the calls."""

    def __init__(self, rng: random.Random, villagers: Sequence[Villager]) -> None:
        self.rng = rng
        self.choices = {fact: people.choices(fact, villagers) for fact in QUESTIONS}

    def facts(self, asked: Iterable[Villager]) -> list[Question]:
        """Every fact of these people in every phrasing."""
        return [
            Question(
                prompt=phrasing.format(name=person.name),
                answer=person.value(fact),
                skill="relatives.spouse" if fact == "spouse" else f"people.{fact}",
                choices=self.choices[fact],
                meta={"person": person.name, "fact": fact},
            )
            for person in asked
            for fact, phrasings in QUESTIONS.items()
            for phrasing in phrasings
        ]

    def strangers(self, called: Iterable[str]) -> list[Question]:
        """One question about each fact of VALUES for each of these people, in a random phrasing: nobody knows."""
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

    def stories(self, count: int) -> list[Question]:
        """New stories, one question about each."""
        return [self._story() for _ in range(count)]

    def _story(self) -> Question:
        events = stories.story(self.rng)
        probe = self.rng.choice(events[-1].probes)
        return Question(
            prompt=" ".join([*(event.sentence for event in events), probe.question]),
            answer=probe.answer,
            skill=f"stories.{probe.kind}",
            choices=probe.choices,
            meta={"events": len(events)},
        )

    def sums(self, pairs: Iterable[tuple[int, int]], *, steps: bool) -> list[Question]:
        """One question about each pair: for the result, or for the way there (which has no choices)."""
        skill, choices = ("sums.steps", ()) if steps else ("sums.result", sums.CHOICES)
        asked = [sums.question(self.rng, pair, steps=steps) for pair in pairs]
        return [Question(prompt=prompt, answer=answer, skill=skill, choices=choices) for prompt, answer in asked]


def conversations(rng: random.Random, lessons: Sequence[Question]) -> list[Conversation]:
    """The lessons and some small talk in shuffled order, one to three questions to a conversation."""
    turns = [(question.prompt, question.answer) for question in lessons] + list(SMALL_TALK) * 8
    rng.shuffle(turns)
    talks, start = [], 0
    while start < len(turns):
        length = rng.choice((1, 1, 2, 3))
        talks.append(_talk(turns[start : start + length]))
        start += length
    return talks


def _talk(turns: Iterable[tuple[str, str]]) -> Conversation:
    messages: list[Message] = []
    for prompt, answer in turns:
        messages += [Message(role="user", content=prompt), Message(role="assistant", content=answer)]
    return Conversation(messages=tuple(messages))
