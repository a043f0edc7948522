"""Who goes first, until when, and what never begins: priorities, fair turns, deadlines, requests that can't fit."""

from collections.abc import Callable, Sequence

import pytest
import torch
from test_engine import RUNNERS, no_page_is_lost, small_engine, tokens

from ownlm.errors import UserError
from ownlm.generate.engine import Engine
from ownlm.generate.sampling import Sampling
from ownlm.generate.sequence import Event, Row
from tiny import tiny_model

MODEL = tiny_model()
LONG = Sampling(max_tokens=100, stop_ids=frozenset())


class Clock:
    """Each step of an engine takes a second."""

    def __init__(self, engine: Engine) -> None:
        self.now, self.engine = 0.0, engine
        engine.clock, engine.speculate = lambda: self.now, False

    def step(self) -> list[Event]:
        events = self.engine.step()
        self.now += 1
        return events


class Timed:
    """A runner that is not exact and says nothing new; each call of it takes what `seconds` has for so many prompt tokens."""

    pages, page_tokens, prefill_tokens, exact, layers = 5, 4096, 4096, False, 1
    adapter_form = type(None)

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now, self.took, self.seconds = 0.0, list[float](), seconds

    def run(self, rows: Sequence[Row]) -> torch.Tensor:
        self.took.append(self.seconds(sum(len(row.tokens) for row in rows if not row.sequence.writing)))
        self.now += self.took[-1]
        return torch.zeros(sum(row.wanted for row in rows), MODEL.decoder.config.vocab_size)

    def copy(self, page: int, onto: int) -> None:
        raise AssertionError("no page is copied here")


@pytest.mark.parametrize(("call", "most", "whole"), [(0.0, 0.7, 31), (1.0, 2.3, 60)])
def test_a_long_prompt_is_read_in_portions_beside_writers_by_what_they_take(
    monkeypatch: pytest.MonkeyPatch, call: float, most: float, whole: float
) -> None:
    """A step of writing takes 1; a prompt token 0.01, and a call with any `call`: 3,000 tokens at once would take 30."""
    runner = Timed(lambda tokens: 1.0 + (call + 0.01 * tokens if tokens else 0.0))
    monkeypatch.setattr("time.perf_counter", lambda: runner.now)
    long = tiny_model(context=4096)
    engine = Engine(long.decoder, long.tokenizer, slots=5, runner=runner)
    for _ in range(4):
        engine.add([65], Sampling(max_tokens=1000, stop_ids=frozenset()))
    for _ in range(5):
        engine.step()
    first = len(runner.took)
    reader = engine.add([65] * 3000, Sampling(max_tokens=1))
    while not any(event.request == reader for event in engine.step()):
        pass
    beside = [seconds - 1 for seconds in runner.took[first:]]
    assert sorted(beside)[-2] <= most  # one was too large, to find that out
    assert sum(beside) <= whole
    assert len(beside) <= 60


def one_slot() -> Engine:
    return Engine(MODEL.decoder, MODEL.tokenizer, slots=1, runner=MODEL.engine(1).runner)


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_answer_ends_at_its_deadline_with_what_it_has(runner: str) -> None:
    engine = small_engine(runner, pages=40)
    clock = Clock(engine)
    late, free = engine.add([65], LONG, deadline=5.0), engine.add([66], LONG)
    events = [event for _ in range(20) for event in clock.step()]
    of_late = [event for event in events if event.request == late]
    assert len(tokens(of_late)) == 5
    assert [event.finish_reason for event in of_late] == [None] * 5 + ["length"]
    assert of_late[-1].token is None
    assert "".join(event.text for event in of_late) == MODEL.tokenizer.decode(tokens(of_late))
    assert len(tokens([event for event in events if event.request == free])) == 20
    no_page_is_lost(engine)
    engine.cancel(free)
    assert engine.idle
    assert engine.pool.usage == 0


def test_who_waits_too_long_ends_without_a_step() -> None:
    engine = one_slot()
    clock, read = Clock(engine), []
    inner = engine.runner.run

    def counted(rows):  # type: ignore[no-untyped-def]
        read.extend(row.sequence.request for row in rows)
        return inner(rows)

    engine.runner.run = counted  # type: ignore[method-assign]
    first = engine.add([65], LONG)
    clock.step()
    waiting, gone = engine.add([66], LONG, deadline=3.0), engine.add([67] * 9, LONG, deadline=0.0)
    events = [event for _ in range(6) for event in clock.step()]
    ends = {event.request: event for event in events if event.finish_reason}
    assert set(ends) == {waiting, gone}
    assert all((end.token, end.text, end.finish_reason) == (None, "", "length") for end in ends.values())
    assert set(read) == {first}


def order(engine: Engine) -> list[int]:
    """The requests in the order in which they began."""
    begun: list[int] = []
    while not engine.idle:
        engine.step()
        begun += [each.request for each in engine.running if each.request not in begun]
    return begun


def test_the_earlier_deadline_goes_first_among_a_tenant_s_own() -> None:
    engine, short = one_slot(), Sampling(max_tokens=2, stop_ids=frozenset())
    engine.add([65], short)
    engine.step()
    plain, later, sooner = (engine.add([65], short, deadline=deadline) for deadline in (None, 900.0, 300.0))
    urgent = engine.add([65], short, priority=-1)
    assert order(engine) == [urgent, sooner, later, plain]


def test_tenants_take_turns_whatever_deadlines_they_give() -> None:
    engine, short = one_slot(), Sampling(max_tokens=1, stop_ids=frozenset())
    many = [engine.add([65], short, tenant="a", deadline=100.0) for _ in range(5)]
    few = [engine.add([65], short, tenant="b") for _ in range(2)]
    begun: list[int] = []
    while not engine.idle:
        begun += [event.request for event in engine.step()]
    assert begun == [many[0], few[0], many[1], few[1], *many[2:]]


@pytest.mark.parametrize("runner", RUNNERS)
def test_sixty_four_answers_run_where_there_is_room_for_a_few(runner: str) -> None:
    engine = small_engine(runner, pages=4)
    sampling = Sampling(n=64, max_tokens=9, temperature=1.0, seed=1, stop_ids=frozenset())
    request = engine.add([65] * 50, sampling)
    ends = 0
    while not engine.idle:
        events = engine.step()
        assert all(event.request == request for event in events)
        ends += sum(event.finish_reason is not None for event in events)
        no_page_is_lost(engine)
    assert ends == 64
    with pytest.raises(UserError, match="between 1 and 4,096, not 1000000000"):
        Sampling(n=10**9)


def test_an_echo_of_a_large_vocabulary_is_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    few = 10 * MODEL.decoder.config.vocab_size
    widest, sampling = 0, Sampling(max_tokens=0, echo=True)
    pieces, whole = MODEL.engine(1), MODEL.engine(1)
    inner = pieces.runner.run

    def counted(rows):  # type: ignore[no-untyped-def]
        nonlocal widest
        widest = max(widest, sum(row.wanted for row in rows))
        return inner(rows)

    pieces.runner.run = counted  # type: ignore[method-assign]
    found = []
    for engine, logits in ((pieces, few), (whole, 2**26)):
        monkeypatch.setattr("ownlm.generate.engine.ECHO_LOGITS", logits)
        engine.add(list(range(65, 125)), sampling)
        events: list[Event] = []
        while not engine.idle:
            events += engine.step()
        found.append(events[0].prompt)
    assert widest == 10
    assert [token.id for token in found[0]] == [token.id for token in found[1]] == list(range(65, 125))
    assert [token.logprob for token in found[0][1:]] == pytest.approx(
        [token.logprob for token in found[1][1:]], abs=1e-4
    )
