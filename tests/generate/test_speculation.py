"""Drafts are used where they pay, by a clock that the tests own: what a step takes, and how often a draft is right, is given."""

import math
from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
from torch import Tensor

from ownlm.generate.drafter import Drafter
from ownlm.generate.drafts import PRICE, SAVED, Costs, Share, Source
from ownlm.generate.engine import Engine
from ownlm.generate.sampling import Sampling
from ownlm.generate.sequence import Row
from ownlm.generate.speculation import Echoes
from tiny import tiny_model

MODEL = tiny_model()
NEW = 120  # tokens of an answer


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """A runner that says what `says` has for a text and a position; a step takes what `seconds` has for its rows."""

    pages, page_tokens, prefill_tokens, exact, layers = 64, 128, 512, True, 1
    adapter_form = type(None)

    def __init__(self, clock: Clock, seconds: Callable[[int], float], says: Callable[[int, int], int]) -> None:
        self.clock, self.seconds, self.says = clock, seconds, says

    def run(self, rows: Sequence[Row]) -> Tensor:
        self.clock.now += self.seconds(sum(len(row.tokens) for row in rows))
        return torch.cat([self.logits(row) for row in rows])

    def logits(self, row: Row) -> Tensor:
        end = row.sequence.cached + len(row.tokens)
        ids = [self.says(row.sequence.request, place) for place in range(end - row.wanted, end)]
        return torch.nn.functional.one_hot(torch.tensor(ids, dtype=torch.long), MODEL.decoder.config.vocab_size).float()

    def copy(self, page: int, onto: int) -> None:
        raise AssertionError("no page is copied here")


class Race:
    """Answers to short prompts, so many at a time, with drafts and by what they would have taken without."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        seconds: Callable[[int], float],
        *,
        streams: int = 1,
        small: float | None = None,
        words: int = 200,
        period: int = 10_000,
    ) -> None:
        """small: seconds of a step of the second model, None: there is none. words: different tokens of a text, which begins
        again after `period`."""
        self.clock, self.row_seconds, self.streams, self.right = Clock(), seconds, streams, 0.0
        self.period, self.words = period, words
        monkeypatch.setattr("time.perf_counter", self.clock)
        drafter = None
        if small is not None:
            runner = Scripted(self.clock, lambda rows: small, self.guess)
            drafter = Drafter(MODEL.decoder, runner, context=128)
        runner = Scripted(self.clock, seconds, self.truth)
        self.engine = Engine(MODEL.decoder, MODEL.tokenizer, slots=streams, runner=runner, drafter=drafter)

    def truth(self, request: int, place: int) -> int:
        return Random(f"{request} {place % self.period}").randrange(self.words)

    def guess(self, request: int, place: int) -> int:
        return self.truth(request, place) if Random(f"guess {request} {place}").random() < self.right else 250

    def speed(self, rounds: int, right: float = 0.0) -> float:
        """How many times the speed without drafts so many rounds of answers reach; `right`: of the second model's guesses."""
        began, self.right, steps = self.clock.now, right, 0
        for _ in range(rounds):
            for _ in range(self.streams):
                self.engine.add([1, 2, 3, 4], Sampling(max_tokens=NEW, stop_ids=frozenset()))
            while not self.engine.idle:
                self.engine.step()
        prompts = rounds * self.row_seconds(4 * self.streams)
        steps = rounds * (NEW - 1)
        return (prompts + steps * self.row_seconds(self.streams)) / (self.clock.now - began)


def dear(rows: int) -> float:
    """Rows that cost: of a model that computes more than it reads."""
    return 1.0 + 0.5 * (rows - 1)


def cheap(rows: int) -> float:
    """Rows that cost next to nothing: of a model that waits for memory."""
    return 1.0 + 0.02 * (rows - 1)


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("right", [0.0, 0.3])
def test_a_second_model_that_does_not_pay_costs_no_more_than_its_price(
    monkeypatch: pytest.MonkeyPatch, streams: int, right: float
) -> None:
    race = Race(monkeypatch, dear, streams=streams, small=0.2)
    first = race.speed(4, right)
    assert first > 1 - (SAVED * dear(streams)) / (4 * NEW * dear(streams)) - PRICE
    before = race.engine.speculation.drafted_tokens
    assert before > 0
    assert race.speed(25, right) > 1 - 1.2 * PRICE
    assert race.engine.speculation.drafted_tokens > before  # it is tried again


@pytest.mark.parametrize("streams", [1, 4])
def test_a_second_model_that_pays_is_used(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    race = Race(monkeypatch, cheap, streams=streams, small=0.05)
    race.speed(2, 0.9)
    # 7 drafted tokens give 5.7 in the mean; reading the prompt, and looking what steps take without, are the rest.
    ideal = (1 - 0.9**8) / 0.1 * cheap(streams) / (cheap(8 * streams) + 7 * 0.05)
    assert race.speed(6, 0.9) > 0.8 * ideal > 2


def test_a_second_model_is_found_out_again_when_texts_change(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(monkeypatch, cheap, small=0.05)
    race.speed(10, 0.0)
    race.speed(10, 0.9)
    assert race.speed(5, 0.9) > 2
    steps = 20 * NEW
    assert race.speed(20, 0.0) > 1 - PRICE - 2 * SAVED / steps


def test_of_a_small_model_that_is_slow_nothing_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(monkeypatch, cheap, small=5.0)
    race.speed(4, 1.0)
    assert race.speed(25, 1.0) > 1 - 1.2 * PRICE


@pytest.mark.parametrize("streams", [1, 4])
def test_what_a_random_text_repeats_costs_no_more_than_its_price(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    """Of three words every run of three has been seen, and says nothing."""
    race = Race(monkeypatch, dear, streams=streams, words=3)
    race.speed(4)
    assert race.speed(25) > 1 - 1.2 * PRICE
    assert race.engine.speculation.drafted_tokens > 0


@pytest.mark.parametrize("streams", [1, 4])
def test_what_a_text_repeats_is_read_at_once(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    race = Race(monkeypatch, cheap, streams=streams, period=20)
    race.speed(1)
    assert race.speed(4) > 2


def test_the_source_that_is_right_more_often_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    race = Race(monkeypatch, cheap, small=0.05, period=20)
    race.speed(10, 0.2)
    lookup, drafter = race.engine.speculation.sources
    before = lookup.drafted, drafter.drafted
    assert race.speed(10, 0.2) > 2
    # Until a text begins again there is the model alone.
    assert lookup.drafted - before[0] > 2 * (drafter.drafted - before[1])


def test_echoes_are_what_followed_before_and_over_again() -> None:
    said = Echoes(Source())
    assert said.find([1, 2, 3], 4) == []
    assert said.find([1, 2, 3, 9, 8, 7, 1, 2, 3], 2) == [9, 8]
    assert said.find([1, 2, 3, 9, 8, 7, 1, 2, 3, 5, 1, 2, 3], 4) == [5, 1, 2, 3]  # where it stood last
    assert Echoes(Source()).find([4, 5, 6, 4, 5, 6], 7) == [4, 5, 6, 4, 5, 6, 4]
    assert Echoes(Source()).find([7, 7, 7, 7], 3) == [7, 7, 7]


def test_a_new_answer_begins_with_what_was_usual_and_learns_its_own() -> None:
    source = Source()
    one, other = Share(source), Share(source)
    for _ in range(40):
        one.learn(4, 0)
    assert other.value == pytest.approx(source.usual)
    assert source.usual < 0.1
    for _ in range(5):
        other.learn(4, 4)
    assert other.value > 0.7
    assert one.value < 0.2
    assert other.gain(4) == pytest.approx(sum(other.value**place for place in range(5)))


def test_a_plan_takes_those_whose_drafts_pay() -> None:
    source = Source()
    good, bad = Share(source), Share(source)
    good.learn(20, 20)
    for _ in range(20):
        bad.learn(7, 0)
    chosen, length = source.plan({"bad": bad, "good": good}, 2, 2.0, lambda rows: 1 + 0.1 * rows)
    assert (chosen, length) == (["good"], 7)
    assert source.plan({"bad": bad, "good": good}, 2, 2.0, lambda rows: 1.0 * rows)[0] == []
    assert source.plan({"good": good}, 2, 2.0, lambda rows: 1.0, lambda count, length: 9.0)[0] == []


def test_steps_are_compared_by_the_pace_of_the_moment() -> None:
    costs = Costs()
    assert costs.without(1) is None
    for _ in range(50):
        costs.saw(1, 1.0)
        costs.saw(5, 1.5, drafted=True)
    assert costs.without(5) is None
    for _ in range(30):  # the machine is three times as slow
        costs.saw(1, 3.0)
    alone = costs.without(1)
    assert alone == pytest.approx(3.0, rel=0.05)
    assert costs.curve(costs.beside, alone)(5) == pytest.approx(4.5, rel=0.15)
    # Something held one step up.
    assert costs.saw(1, 600.0) == pytest.approx(2 * alone)
    curve = costs.curve({1: 1.0, 3: 9.0, 5: 1.2}, 0.0)
    assert [curve(rows) / costs.pace for rows in (3, 4, 99)] == pytest.approx(
        [1.2, 1.2, 1.2]
    )  # one of more rows was faster
    assert math.isclose(costs.curve({3: 1.0}, 7.0)(1), 7.0)
