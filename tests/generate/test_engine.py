"""Exactness of the engine: cached == uncached, batch == one by one, its log-probabilities == the training forward's."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ownlm.errors import ContextTooLong, UserError
from ownlm.generate.engine import Engine, Event
from ownlm.generate.sampling import Sampling
from tiny import tiny_model

MODEL = tiny_model()
PROMPTS = [MODEL.prompt_ids(text) for text in ("a", "once upon a time", "the village", "x" * 40, "né à Zürich", "")]


def run(engine: Engine, requests: list[tuple[list[int], Sampling]]) -> dict[int, list[Event]]:
    """The events of each request, all of them added at once."""
    ids = [engine.add(prompt, sampling) for prompt, sampling in requests]
    events: dict[int, list[Event]] = {id: [] for id in ids}
    while not engine.idle:
        for event in engine.step():
            events[event.request].append(event)
    return {index: events[id] for index, id in enumerate(ids)}


def tokens(events: list[Event]) -> list[int]:
    return [event.token.id for event in events if event.token]


def test_cached_equals_uncached() -> None:
    prompt = PROMPTS[1]
    answer = tokens(run(MODEL.engine(), [(prompt, Sampling(max_tokens=30, stop_ids=frozenset()))])[0])
    ids = list(prompt)
    for expected in answer:
        assert int(MODEL.logits([ids])[0, -1].argmax()) == expected
        ids.append(expected)


@pytest.mark.parametrize("prefill_tokens", [4096, 7])
def test_logprobs_equal_the_training_forward(prefill_tokens: int) -> None:
    engine = Engine(MODEL.decoder, MODEL.tokenizer, slots=3, prefill_tokens=prefill_tokens)
    sampling = Sampling(max_tokens=12, temperature=1.3, top_k=50, seed=4, echo=True, logprobs=2, stop_ids=frozenset())
    for index, events in run(engine, [(prompt, sampling) for prompt in PROMPTS]).items():
        ids = [*PROMPTS[index], *tokens(events)]
        reference = MODEL.logits([ids])[0].log_softmax(-1)
        seen = [*events[0].prompt, *(event.token for event in events if event.token)]
        assert [token.id for token in seen] == ids
        assert seen[0].logprob is None
        for position, token in enumerate(seen[1:]):
            assert token.logprob == pytest.approx(reference[position, token.id].item(), abs=1e-4)
            assert [value for _, value in token.top] == pytest.approx(
                reference[position].topk(2).values.tolist(), abs=1e-4
            )


def test_batch_equals_one_by_one() -> None:
    requests = [
        (prompt, Sampling(max_tokens=5 + 7 * index, temperature=index % 3 * 0.7, seed=index, top_p=1 - index * 0.1))
        for index, prompt in enumerate(PROMPTS)
    ]
    together = run(Engine(MODEL.decoder, MODEL.tokenizer, slots=4, prefill_tokens=20), requests)
    for index, request in enumerate(requests):
        alone = run(MODEL.engine(1), [request])[0]
        assert [event.token and event.token.id for event in alone] == [e.token and e.token.id for e in together[index]]
        assert [event.text for event in alone] == [event.text for event in together[index]]


def test_answers_of_one_request_differ_and_each_repeats() -> None:
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=9, n=3, stop_ids=frozenset())
    events = run(MODEL.engine(2), [(PROMPTS[0], sampling)])[0]
    answers = [tokens([event for event in events if event.index == index]) for index in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3
    again = run(MODEL.engine(8), [(PROMPTS[0], sampling)])[0]
    assert answers == [tokens([event for event in again if event.index == index]) for index in range(3)]


def test_text_is_the_decoded_answer_and_starts_say_which_tokens_show() -> None:
    [events] = run(
        MODEL.engine(), [(PROMPTS[1], Sampling(max_tokens=40, temperature=1, seed=2, stop_ids=frozenset()))]
    ).values()
    text = "".join(event.text for event in events)
    assert text == MODEL.tokenizer.decode(tokens(events))
    assert [event.start for event in events] == sorted(event.start for event in events)


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it() -> None:
    sampling = Sampling(max_tokens=30, temperature=1, seed=3, stop_ids=frozenset())
    whole = "".join(event.text for event in run(MODEL.engine(), [(PROMPTS[1], sampling)])[0])
    stop = whole[5:8]
    events = run(MODEL.engine(), [(PROMPTS[1], Sampling(max_tokens=30, temperature=1, seed=3, stop=(stop,)))])[0]
    assert "".join(event.text for event in events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"


def test_a_stop_token_ends_the_answer_and_shows_no_text() -> None:
    whole = tokens(run(MODEL.engine(), [(PROMPTS[2], Sampling(max_tokens=9, stop_ids=frozenset()))])[0])
    last = next(index for index in range(2, 9) if whole[index] not in whole[:index])
    stopped = run(MODEL.engine(), [(PROMPTS[2], Sampling(max_tokens=9, stop_ids=frozenset({whole[last]})))])[0]
    assert tokens(stopped) == whole[: last + 1]
    assert stopped[-1].finish_reason == "stop"
    assert "".join(event.text for event in stopped) == MODEL.tokenizer.decode(whole[:last])


def test_the_context_is_a_limit_that_is_told_before_anything_runs() -> None:
    engine = MODEL.engine(1)
    with pytest.raises(ContextTooLong) as caught:
        engine.add([65] * 100, Sampling(max_tokens=29))
    assert (caught.value.prompt_tokens, caught.value.max_tokens, caught.value.context) == (100, 29, 128)
    with pytest.raises(ContextTooLong):
        engine.add([65] * 128, Sampling())
    with pytest.raises(UserError, match="999 is not a token"):
        engine.add([65, 999], Sampling())
    with pytest.raises(UserError, match="no tokens"):
        engine.add([], Sampling())
    assert engine.idle
    events = run(engine, [([65] * 100, Sampling(max_tokens=28, stop_ids=frozenset()))])[0]
    assert len(events) == 28
    assert events[-1].finish_reason == "length"
    assert len(run(engine, [([65] * 120, Sampling(stop_ids=frozenset()))])[0]) == 8
    [only] = run(engine, [([65] * 128, Sampling(max_tokens=0, echo=True))])[0]
    assert only.token is None
    assert len(only.prompt) == 128


def test_a_long_prompt_does_not_stop_those_who_write() -> None:
    engine = Engine(MODEL.decoder, MODEL.tokenizer, slots=2, prefill_tokens=8)
    writer = engine.add([65], Sampling(max_tokens=40, stop_ids=frozenset()))
    engine.step()
    engine.add([66] * 80, Sampling(max_tokens=1))
    for _ in range(9):
        assert [event.request for event in engine.step()] == [writer]
    assert len(engine.step()) == 2


def test_bfloat16_weights_generate() -> None:
    model = tiny_model()
    model.decoder.to(torch.bfloat16)
    assert model.generate("hello", max_tokens=4, stop_ids=frozenset()).finish_reason == "length"


class Slots(RuleBasedStateMachine):
    """Random requests, cancellations and steps: every slot is free or in use by exactly one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(MODEL.decoder, MODEL.tokenizer, slots=3, prefill_tokens=16)
        self.open: dict[int, int] = {}

    @rule(length=st.integers(1, 40), new=st.integers(1, 6), n=st.integers(1, 3))
    def add(self, length: int, new: int, n: int) -> None:
        sampling = Sampling(max_tokens=new, n=n, temperature=1.0, stop_ids=frozenset())
        self.open[self.engine.add([65] * length, sampling)] = n

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.open:
            request = data.draw(st.sampled_from(sorted(self.open)))
            del self.open[request]
            self.engine.cancel(request)
            assert all(sequence.request != request for sequence in self.engine.running)

    @rule()
    def step(self) -> None:
        for event in self.engine.step():
            self.open[event.request] -= event.finish_reason is not None
            if not self.open[event.request]:
                del self.open[event.request]

    @invariant()
    def no_slot_is_lost(self) -> None:
        used = [sequence.slot for sequence in self.engine.running]
        assert sorted([*used, *self.engine.free]) == [0, 1, 2]
        waiting = [*self.engine.running, *self.engine.waiting]
        assert {sequence.request for sequence in waiting} == set(self.open)
        assert 0 <= self.engine.cache_usage <= 1

    def teardown(self) -> None:
        while not self.engine.idle:
            self.step()
        assert not self.open


Slots.TestCase.settings = settings(max_examples=8, stateful_step_count=25, deadline=None)
TestSlots = Slots.TestCase
