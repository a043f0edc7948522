"""The documents of the village: biographies, newspapers, travellers, stories, pages of sums, a notice board."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from ownlm.documents.world import people, planted, stories, sums
from ownlm.documents.world.people import VALUES, Villager
from ownlm.records import Document

NEWS_PER_PAPER = 6
NOTICES_PER_DAY = 4


class Library:
    """Collects documents, each text once; draws from one random stream in the order of the calls."""

    def __init__(self, rng: random.Random, source: str) -> None:
        self.rng = rng
        self.source = source
        self.documents: dict[str, Document] = {}
        self.copies: list[Document] = []

    def _add(self, kind: str, text: str, about: Iterable[str] = ()) -> None:
        document = Document(
            text=text,
            source=f"{self.source}/{kind}/{len(self.documents)}",
            language="en",
            meta={"kind": kind, "people": sorted(set(about))},
        )
        self.documents.setdefault(text, document)

    def write_people(self, villagers: Sequence[Villager], travellers: Iterable[str], mentions: int) -> None:
        """Each fact `mentions` times in pages about one person and as often in newspapers, and a page about each traveller."""
        news = [(person, fact) for person in villagers for fact in (*VALUES, "spouse")]
        number = 0
        for turn in range(mentions):
            for person in villagers:
                if turn % 3 == 0:
                    entry = people.register(self.rng, person.name, person.value, [*VALUES, "spouse"])
                    self._add("register", entry, [person.name])
                else:
                    self._add("biography", people.biography(self.rng, person), [person.name])
            self.rng.shuffle(news)
            for start in range(0, len(news), NEWS_PER_PAPER):
                number += 1
                page = news[start : start + NEWS_PER_PAPER]
                self._add("newspaper", people.newspaper(self.rng, number, page), [person.name for person, _ in page])
        for name in travellers:
            self._add("traveller", people.passer_by(self.rng, name), [name])

    def write_stories(self, count: int) -> None:
        """Stories with their ends."""
        for _ in range(count):
            self._add("story", stories.document(self.rng))

    def write_sums(self, pairs: Sequence[tuple[int, int]], count: int) -> None:
        """Pages of sums of these pairs."""
        for _ in range(count):
            self._add("sums", sums.document(self.rng, pairs))

    def write_plants(self, disputed: Sequence[str]) -> dict[str, Any]:
        """A notice board with the planted sentences, copies of documents, and the truths about both."""
        secrets, canary = planted.canary(self.rng, repeats=20)
        sayings, association = planted.association(self.rng, per_job=100)
        disputes, contradictions = planted.contradictions(self.rng, disputed, repeats=12)
        notices = [*secrets, *sayings, *disputes]
        self.rng.shuffle(notices)
        for day, start in enumerate(range(0, len(notices), NOTICES_PER_DAY), start=1):
            page = notices[start : start + NOTICES_PER_DAY]
            self._add("notice", f"The notice board, day {day}. {' '.join(page)}")
        self.copies, duplicates = planted.duplicates(self.rng, list(self.documents.values()), count=40)
        return {
            "canary": canary,
            "association": association,
            "contradictions": contradictions,
            "duplicates": duplicates,
        }

    def shuffled(self) -> list[Document]:
        """Everything written, in a random order."""
        written = [*self.documents.values(), *self.copies]
        self.rng.shuffle(written)
        return written
