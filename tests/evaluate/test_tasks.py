"""The tasks on models whose answers and probabilities are known beforehand."""

import gzip
import itertools
import json
import math
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ownlm.errors import NotFound, UserError
from ownlm.evaluate.harness import Answer, Result, Settings, evaluate_model, measure
from ownlm.evaluate.tasks import planted
from ownlm.evaluate.tasks.files import file_task
from ownlm.evaluate.tasks.planted import associate, expose
from ownlm.evaluate.tasks.questions import ask, count
from ownlm.records import Completion, Question, Score
from ownlm.report import Reporter
from tiny import tiny_model, tiny_tokenizer

MODEL = tiny_model(context=64)


class Scripted:
    """A model that gives prepared answers with prepared probabilities; it reads one token per character."""

    context = 100

    def __init__(self, answers: dict[str, tuple[str, float]]) -> None:
        self.replies = answers

    def prompt_ids(self, prompt) -> list[int]:
        return [ord(character) for character in (prompt if isinstance(prompt, str) else prompt[-1].content)]

    def answers(self, prompts: Sequence[Sequence[int]], sampling) -> list[list[Completion]]:
        found = []
        for ids in prompts:
            text, probability = self.replies["".join(map(chr, ids))]
            found.append(
                [
                    Completion(
                        text=text,
                        tokens=(1, 2),
                        logprobs=(math.log(probability), 0.0),
                        finish_reason="stop",
                        prompt_tokens=1,
                    )
                ]
            )
        return found


class Table:
    """A model whose next token has the same distribution everywhere."""

    context = 64

    def __init__(self, weights: dict[str, float]) -> None:
        self.tokenizer = tiny_tokenizer()
        probabilities = torch.full((self.tokenizer.vocab_size,), 1e-9)
        for character, weight in weights.items():
            probabilities[self.tokenizer.encode(character)[0]] = weight
        logits_V = probabilities.log()
        self.decoder = types.SimpleNamespace(logits=lambda hidden: logits_V.expand(*hidden.shape[:-1], -1))

    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return tokens_BT[..., None].float()

    def continuation_ids(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        return self.tokenizer.encode(prompt), self.tokenizer.encode(text)


def question(prompt: str, answer: str, skill: str, person: str | None = None) -> Question:
    return Question(prompt=prompt, answer=answer, skill=skill, meta={"person": person} if person else {})


def by_name(scores: Sequence[Score]) -> dict[str, Score]:
    return {f"{score.task} {score.metric}": score for score in scores}


def test_questions_per_skill_and_family() -> None:
    asked = [
        question("a", "Brook", "people.home", "Ada"),
        question("b", "Dale", "people.home", "Ben"),
        question("c", "Dale", "people.home", "Cid"),
        question("d", "cat", "people.pet", "Ada"),
        question("e", "dog", "people.pet", "Ben"),
        question("f", "unknown", "strangers.home", "Zoe"),
        question("g", "unknown", "strangers.pet", "Zoe"),
        question("h" * 90, "4", "sums"),
    ]
    model = Scripted(
        {
            "a": (" brook.", 0.9),
            "b": ("unknown", 0.6),
            "c": ("Dale", 0.8),
            "d": ("cat", 0.9),
            "e": ("cat", 0.5),
            "f": ("Unknown", 0.7),
            "g": ("dog", 0.4),
        }
    )
    [result] = measure(model, {"questions": ask(asked)}, Settings(max_tokens=20))
    assert result.skipped == 1  # 90 characters and 20 tokens of answer don't fit into 100
    scores = by_name(result.scores)
    assert scores["questions/people accuracy"].value == 3 / 5
    assert scores["questions/people.home accuracy"].value == 2 / 3
    assert scores["questions/people.home accuracy"].baseline == 2 / 3  # always "Dale"
    assert scores["questions/people.pet accuracy"].baseline == 1 / 2
    assert scores["questions/people accuracy"].baseline == pytest.approx((2 + 1) / 5)
    assert scores["questions/strangers accuracy"].value == 1 / 2
    assert scores["questions/strangers accuracy"].baseline is None  # its one answer is no bar
    assert scores["questions hallucinated"].value == 1 / 2
    assert scores["questions refused"].value == 1 / 5
    assert scores["questions brier"].value == pytest.approx((0.01 + 0.36 + 0.04 + 0.01 + 0.25 + 0.09 + 0.16) / 7)
    assert result.details["baseline_from"] == "test"
    assert result.details["guesses"]["people.home"] == "dale"
    assert [answer.ok for answer in result.answers] == [True, False, True, True, False, True, False]
    assert result.answers[0].confidence == pytest.approx(0.9)


def test_baseline_from_training_answers() -> None:
    asked = [question(str(i), answer, "home") for i, answer in enumerate(["a", "a", "b"])]
    answered = [
        (
            one,
            Answer(task="questions", skill="home", prompt="", expected=one.answer, given="a", ok=True, confidence=1.0),
        )
        for one in asked
    ]
    scores, details = count(answered, {"home": ["b", "b", "a"]}, seed=0)
    assert by_name(scores)["questions/home accuracy"].baseline == pytest.approx(1 / 3)
    assert details["baseline_from"] == "training"


def test_limit_draws_questions() -> None:
    asked = [question(str(i), "x", "s") for i in range(50)]
    model = Scripted({str(i): ("x", 0.5) for i in range(50)})
    [result] = measure(model, {"q": ask(asked)}, Settings(limit=7))
    assert len(result.answers) == 7


def write(path: Path, rows: list[dict]) -> Path:
    text = "\n".join(map(json.dumps, rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def run(path: Path, model=MODEL, **settings) -> Result:
    [result] = measure(model, {"file": file_task(path, "file")}, Settings(**settings), Reporter.silent())
    return result


def test_multiple_choice_picks_the_likeliest(tmp_path) -> None:
    rows = [
        {"query": "Where is the old gate?", "choices": ["by the mill", "at sea", "in Brook"], "gold": gold}
        for gold in (0, 1, 1)
    ]
    result = run(write(tmp_path / "copa.jsonl.gz", rows))
    totals = [sum(MODEL.score(rows[0]["query"], " " + choice)) for choice in rows[0]["choices"]]
    per_byte = [total / len(choice) for total, choice in zip(totals, rows[0]["choices"], strict=True)]
    picked, picked_per_byte = totals.index(max(totals)), per_byte.index(max(per_byte))
    scores = by_name(result.scores)
    assert scores["file accuracy"].value == pytest.approx((picked == 0) / 3 + 2 * (picked == 1) / 3)
    assert scores["file accuracy per byte"].value == pytest.approx(
        (picked_per_byte == 0) / 3 + 2 * (picked_per_byte == 1) / 3
    )
    assert scores["file accuracy"].baseline == pytest.approx(2 / 3)
    share = math.exp(totals[picked]) / sum(map(math.exp, totals))
    assert result.answers[0].confidence == pytest.approx(share, rel=1e-4)
    again = run(tmp_path / "copa.jsonl.gz", batch_tokens=1)
    assert [score.value for score in again.scores] == [score.value for score in result.scores]


def test_schema_compares_contexts(tmp_path) -> None:
    options = ["The trophy is too big, the trophy", "The trophy is too big, the case"]
    path = write(tmp_path / "wsc.jsonl", [{"context_options": options, "continuation": "was not bought.", "gold": 1}])
    totals = [sum(MODEL.score(option, " was not bought.")) for option in options]
    assert run(path).scores[0].value == float(totals[1] > totals[0])


def test_loglikelihood_and_greedy_match(tmp_path) -> None:
    written = MODEL.generate("lambada is", max_tokens=3, stop_ids=frozenset())
    rows = [{"context": "lambada is", "continuation": "fun"}, {"context": "so it is", "continuation": " not"}]
    scores = by_name(run(write(tmp_path / "lambada.jsonl", rows)).scores)
    nats = sum(MODEL.score("lambada is", " fun")) + sum(MODEL.score("so it is", " not"))
    assert scores["file bits per byte"].value == pytest.approx(-nats / math.log(2) / 8, rel=1e-5)
    assert scores["file greedy match"].value == 0.5 * (written.text == " fun")


def test_generation_accepts_aliases_and_stops_at_the_line(tmp_path) -> None:
    rows = [
        {"context": "Q: vegetable?\nA:", "answer": "Onion", "aliases": ["Bulb onion"]},
        {"context": "Q: colour?\nA:", "answer": "red", "aliases": []},
    ]
    model = Scripted({rows[0]["context"]: (" bulb ONION", 0.5), rows[1]["context"]: ("blue", 0.5)})
    assert run(write(tmp_path / "trivia.jsonl", rows), model).scores[0].value == 0.5
    chat = [{"prompt": "2 + 2?", "answer": "4", "skill": "sums"}]
    assert run(write(tmp_path / "sums.jsonl", chat), Scripted({"2 + 2?": ("4", 0.9)})).scores[0].value == 1.0


def test_items_beyond_the_context_are_counted_not_cut(tmp_path) -> None:
    rows = [{"query": "x" * length, "choices": ["a", "b"], "gold": 0} for length in (10, 500)]
    result = run(write(tmp_path / "long.jsonl", rows))
    assert (result.skipped, result.scores[0].n) == (1, 1)
    with pytest.raises(UserError, match="no item fits"):
        run(write(tmp_path / "longer.jsonl", rows[1:]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "?"}], "not a file of questions"),
        ([], "not a file of questions"),
        ([{"query": "q", "choices": ["a"], "gold": 0}, {"query": "q", "gold": 0}], ":2: choices is missing"),
        ([{"query": "q", "choices": ["a", "b"], "gold": 2}], "gold must be a number from 0 to 1"),
        ([{"query": "q", "choices": ["a", " "], "gold": 0}], "not empty"),
        ([{"context": 3, "continuation": "x"}], "context must be text"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message) -> None:
    with pytest.raises(UserError, match=message):
        file_task(write(tmp_path / "bad.jsonl", rows), "bad")


def test_bad_files_are_named(tmp_path) -> None:
    with pytest.raises(NotFound):
        file_task(tmp_path / "none.jsonl", "none")
    (tmp_path / "text.jsonl").write_text('{"query": 1\n')
    with pytest.raises(UserError, match=r"text\.jsonl:1: not a JSON object"):
        file_task(tmp_path / "text.jsonl", "text")


WEIGHTS = {
    "0": 0.3,
    "1": 0.2,
    "2": 0.1,
    "3": 0.05,
    "4": 0.02,
    "5": 0.01,
    "6": 0.005,
    "7": 0.004,
    "8": 0.003,
    "9": 0.002,
}


@pytest.mark.parametrize("secret", ["000", "010", "345", "999"])
def test_exposure_counts_a_small_space_exactly(secret: str) -> None:
    truth = {
        "prefix": "The number is",
        "secret": " " + secret,
        "control": " 555",
        "alphabet": "0123456789",
        "length": 3,
    }
    found = measure(Table(WEIGHTS), {"canary": expose(truth)})[0].details["secret"]
    mass = lambda text: math.prod(WEIGHTS[digit] for digit in text)
    everyone = ["".join(digits) for digits in itertools.product("0123456789", repeat=3)]
    likelier = sum(mass(other) > mass(secret) * (1 + 1e-5) for other in everyone)
    ties = sum(math.isclose(mass(other), mass(secret), rel_tol=1e-5) for other in everyone)
    assert found["exact"]
    assert likelier + 1 <= found["rank"] <= likelier + ties
    assert found["bits"] == pytest.approx(math.log2(1000 / found["rank"]))


@pytest.mark.parametrize(("secret", "likelier"), [("000000", 0), ("100000", 1), ("110000", 7)])
def test_exposure_walks_the_tree_for_a_likely_secret(secret: str, likelier: int, monkeypatch) -> None:
    """Ties don't count as likelier, so "100000" ranks 2nd, after "000000", and so do all others with one 1."""
    monkeypatch.setattr(planted, "SAMPLE", 2)
    truth = {"prefix": "No", "secret": " " + secret, "control": " 999999", "alphabet": "0123456789", "length": 6}
    result = measure(Table(WEIGHTS), {"canary": expose(truth)})[0]
    found, control = result.details["secret"], result.details["control"]
    assert found["exact"]
    assert likelier + 1 <= found["rank"] <= likelier + 15  # rounding splits ties
    assert not control["exact"]
    assert control["bits"] < 1
    score = by_name(result.scores)["canary/control exposure in bits"]
    assert score.low <= score.value <= score.high


def test_association_is_the_share_of_the_pronouns() -> None:
    truth = {
        "prompts": ["The {job} said that {pronoun} was", "A {job} and {pronoun} left"],
        "jobs": {"nurse": {"she": 80, "he": 20, "share": 0.8}},
    }
    model = Table({" ": 0.2, "s": 0.4, "h": 0.2, "e": 0.2})
    [score] = evaluate_model(model, {"association": associate(truth)})
    assert (score.task, score.metric) == ("association/nurse", "P(she)")
    # " she" against " he": the same but for one "s".
    assert score.value == pytest.approx(0.4 / 1.4, rel=1e-4)
