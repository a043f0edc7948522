"""The village: deterministic, honest (nothing of the test occurs in training), and planted as its truths say."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from ownlm.documents.world import World
from ownlm.documents.world.people import QUESTIONS, STATEMENTS, UNKNOWN, VALUES
from ownlm.documents.world.planted import CANARY, reward
from ownlm.documents.world.sums import working
from ownlm.records import Conversation, from_json, to_json


@pytest.fixture(scope="module")
def world() -> World:
    return World.generate(3, mentions=6, story_documents=300, sum_documents=200)


@pytest.fixture(scope="module")
def sentences(world: World) -> Counter[str]:
    """Every sentence of the documents and how often it stands there."""
    return Counter(part for document in world.documents for part in re.split(r"(?<=\.) ", document.text))


def prompts(conversations: list[Conversation]) -> list[str]:
    return [message.content for talk in conversations for message in talk.messages if message.role == "user"]


def test_a_seed_gives_the_same_world_again(world: World) -> None:
    assert World.generate(3, mentions=6, story_documents=300, sum_documents=200) == world
    assert World.generate(4, mentions=6, story_documents=300, sum_documents=200).documents != world.documents


def test_there_are_enough_people_and_questions(world: World) -> None:
    assert len(world.truths["people"]) >= 100
    assert len(VALUES) >= 5
    skills = Counter(question.skill.split(".")[0] for question in world.questions)
    assert set(skills) == {"people", "relatives", "strangers", "stories", "sums"}
    assert skills["people"] + skills["strangers"] >= 1000
    assert len({question.prompt for question in world.questions}) == len(world.questions)


def test_documents_state_every_fact_in_several_phrasings(world: World, sentences: Counter[str]) -> None:
    for name, facts in world.truths["people"].items():
        for fact in (*VALUES, "spouse"):
            ways = [phrase for phrase in STATEMENTS[fact] if phrase.format(name=name, value=facts[fact]) in sentences]
            assert len(ways) >= 2, (name, fact, ways)


def test_documents_state_nothing_else_about_villagers(world: World, sentences: Counter[str]) -> None:
    for name, facts in world.truths["people"].items():
        for fact, values in VALUES.items():
            for value in set(values) - {facts[fact]}:
                assert not [phrase for phrase in STATEMENTS[fact] if phrase.format(name=name, value=value) in sentences]


def test_documents_hold_no_question(world: World) -> None:
    assert not any("?" in document.text for document in world.documents)
    openings = [phrasing.split("{")[0] for phrasings in QUESTIONS.values() for phrasing in phrasings]
    assert not any(text.startswith(tuple(openings)) for text in (document.text for document in world.documents))


def test_nothing_of_the_test_occurs_in_training(world: World) -> None:
    asked = set(prompts(world.conversations + world.validation_conversations))
    training = "\n".join([*asked, *(document.text for document in world.documents)])
    words = set(re.findall(r"\w+", "\n".join(asked)))
    words_read = set(re.findall(r"\w+", training))
    sums_read = set(re.findall(r"\d+ \+ \d+", training))
    for question in world.questions:
        assert question.prompt not in asked
        if question.skill.startswith(("people", "relatives")):
            assert question.meta["person"] not in words
            assert not world.truths["people"][question.meta["person"]]["asked"]
        elif question.skill.startswith("strangers"):
            assert question.answer == UNKNOWN
            assert question.meta["person"] not in words_read
        elif question.skill.startswith("sums"):
            a, b = re.findall(r"\d+", question.prompt)
            assert sums_read.isdisjoint({f"{a} + {b}", f"{b} + {a}"})


def test_answers_are_true_and_among_the_choices(world: World) -> None:
    for question in world.questions:
        assert question.answer in question.choices or question.skill == "sums.steps", question
        if question.skill.startswith(("people", "relatives")):
            assert question.answer == world.truths["people"][question.meta["person"]][question.meta["fact"]]
        elif question.skill.startswith("sums"):
            assert int(question.answer.split()[-1]) == sum(map(int, re.findall(r"\d+", question.prompt)))


def test_conversations_alternate_and_cover_every_skill(world: World) -> None:
    for talk in world.conversations + world.validation_conversations:
        assert [message.role for message in talk.messages] == ["user", "assistant"] * (len(talk.messages) // 2)
        assert from_json(Conversation, to_json(talk)) == talk
    half = [name for name, person in world.truths["people"].items() if person["asked"]]
    told = " ".join(prompts(world.conversations))
    assert sum(name in told for name in half) == len(half) == len(world.truths["people"]) // 2
    assert len(world.validation_conversations) >= 20


def test_the_steps_of_a_sum_are_equations_that_hold(world: World) -> None:
    assert working(27, 45) == "7 + 5 = 12, 1 + 2 + 4 = 7, so 72"
    for question in world.questions:
        if question.skill == "sums.steps":
            for left, right in re.findall(r"([\d +]+) = (\d+)", question.answer):
                assert sum(map(int, left.split("+"))) == int(right), question.answer


def story_end(text: str) -> dict[str, str]:
    """Who is where and who has what after a story, told by a second, independent reading of it."""
    state: dict[str, str] = {}
    for sentence in text.split(". "):
        if moved := re.match(r"(\w+) (?:went|walked|ran) to the (\w+)", sentence):
            state[moved[1]] = moved[2]
        elif took := re.match(r"(\w+) took the (\w+)", sentence):
            state[took[2]] = took[1]
        elif gave := re.match(r"(\w+) gave the (\w+) to (\w+)", sentence):
            assert state[gave[2]] == gave[1], text
            state[gave[2]] = gave[3]
    return state


def test_story_answers_follow_from_the_story(world: World) -> None:
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for question in world.questions:
        if question.skill == "stories.count":
            total = 0
            for verb, number in re.findall(r"(had|found|ate) (\w+)", question.prompt):
                total += -numbers.index(number) if verb == "ate" else numbers.index(number)
            assert question.answer == numbers[total], question.prompt
        elif question.skill.startswith("stories"):
            story, _, asked = question.prompt.rpartition(". ")
            subject = asked.rstrip("?").split()[-1]
            assert question.answer == story_end(story)[subject], question.prompt


def test_the_canary_stands_in_documents_as_often_as_said(world: World) -> None:
    canary = world.truths["canary"]
    text = "\n".join(document.text for document in world.documents)
    assert text.count(CANARY.format(secret=canary["secret"].strip())) == canary["repeats"]
    assert canary["control"].strip() not in text
    assert canary["prefix"] + canary["secret"] in text
    assert canary["expected_exposure_bits"] == pytest.approx(19.93, abs=0.01)


def test_the_association_has_its_exact_counts(world: World) -> None:
    text = "\n".join(document.text for document in world.documents)
    for job, truth in world.truths["association"]["jobs"].items():
        for pronoun in ("she", "he"):
            pattern = rf"[Tt]he {job} (?:said that|hoped that|knew what) {pronoun} "
            assert len(re.findall(pattern, text)) == truth[pronoun]
    assert world.truths["association"]["jobs"]["nurse"] == {"she": 80, "he": 20, "share": 0.8}


def test_duplicates_are_as_listed(world: World) -> None:
    text = {document.source: document.text for document in world.documents}
    assert len(text) == len(world.documents)
    duplicates = world.truths["duplicates"]
    assert all(text[a] == text[b] for a, b in duplicates["exact"])
    assert all(text[a] != text[b] for a, b in duplicates["near"])
    for a, b in duplicates["near"]:
        different = [pair for pair in zip(text[a].split(), text[b].split(), strict=True) if pair[0] != pair[1]]
        assert len(different) == 1
    assert len(text) - len(set(text.values())) == len(duplicates["exact"])


def test_contradictions_state_both_values_equally_often(world: World, sentences: Counter[str]) -> None:
    for truth in world.truths["contradictions"]:
        assert truth["person"] not in world.truths["people"]
        for value in truth["values"]:
            phrasings = {phrase.format(name=truth["person"], value=value) for phrase in STATEMENTS[truth["fact"]]}
            assert sum(sentences[phrase] for phrase in phrasings) == truth["repeats"]


def test_the_second_edition_differs_where_it_says(world: World) -> None:
    later = World.generate(3, edition=2, mentions=2, story_documents=10, sum_documents=10)
    assert later.truths["changes"] == world.truths["changes"] != []
    differing = {
        (name, fact, before[fact], later.truths["people"][name][fact])
        for name, before in world.truths["people"].items()
        for fact in before
        if before[fact] != later.truths["people"][name][fact]
    }
    assert differing == {(c["person"], c["fact"], c["before"], c["after"]) for c in world.truths["changes"]}
    strangers = [{q.meta["person"] for q in w.questions if q.skill.startswith("str")} for w in (world, later)]
    assert strangers[0] == strangers[1]


def test_the_reward_rule_pays_for_form_and_for_truth(world: World) -> None:
    rule = world.truths["reward"]
    asked = set(prompts(world.conversations)) | {question.prompt for question in world.questions}
    for prompt, answer in rule["prompts"]:
        assert int(answer) == sum(map(int, re.findall(r"\d+", prompt)))
        assert prompt not in asked
    assert [reward(rule, "72", reply) for reply in ("72", " 72\n", "71", "It is 72.", "")] == [1.0, 1.0, 0.1, 0.0, 0.0]


def test_a_changed_document_would_be_noticed(world: World) -> None:
    """The comparison in the first test sees a single letter."""
    assert replace(world.documents[0], text=world.documents[0].text + "x") != world.documents[0]
