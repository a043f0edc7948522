"""Exactness of the engine: cached == uncached, batch == one by one, its log-probabilities == the training forward's."""

from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ownlm.errors import ContextTooLong, UserError
from ownlm.generate.engine import Engine
from ownlm.generate.pace import Pace
from ownlm.generate.runners import NativeRunner, Runner
from ownlm.generate.sampling import Sampling
from ownlm.generate.sequence import Event, Row
from ownlm.generate.torch_runner import PAGE, TorchRunner
from ownlm.kernels.native import KV, NativeDecoder, unsupported
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


@pytest.mark.skipif(unsupported(MODEL.decoder) is not None, reason="no native kernels here")
def test_a_long_prompt_is_read_in_pieces_that_stop_between_layers() -> None:
    prompt = torch.randint(97, 120, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    sampling = Sampling(max_tokens=9, temperature=1.0, seed=3, stop_ids=frozenset())
    alone = tokens(run(small_engine("native", pages=40), [(prompt, sampling)])[0])
    engine = small_engine("native", pages=40)
    engine.pace.prompt_tokens = lambda: 3.0  # type: ignore[method-assign]
    layers: list[range] = []
    plain, writer = engine.runner.run, engine.add([65], Sampling(max_tokens=120, stop_ids=frozenset()))

    def watched(rows: list[Row]) -> torch.Tensor:
        layers.extend(row.layers for row in rows if row.layers is not None)
        return plain(rows)

    engine.runner.run = watched  # type: ignore[method-assign, assignment]
    engine.step()
    reader = engine.add(prompt, sampling)
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    assert tokens([event for event in events if event.request == reader]) == alone
    assert sum(event.request == writer for event in events) == 119
    # The first layers of every piece, and later the others.
    assert {each.start for each in layers} == set(range(engine.runner.layers))


def test_a_pace_lets_in_what_slows_writing_by_so_much_and_looks_again_what_writing_takes() -> None:
    pace = Pace()
    assert pace.prompt_tokens() == Pace.UNKNOWN
    pace.saw(4, 0, 0.010)
    pace.saw(4, 8, 0.018)
    assert pace.prompt_tokens() == pytest.approx(Pace.SLOWER * 10)
    for _ in range(Pace.LOOK - 1):
        pace.saw(4, 2, 0.020)
    assert pace.prompt_tokens() == 0
    pace.saw(4, 0, 0.030)
    assert pace.step_seconds == pytest.approx(0.020)
    assert pace.prompt_tokens() > 0


def test_bfloat16_weights_generate() -> None:
    model = tiny_model()
    model.decoder.to(torch.bfloat16)
    assert model.generate("hello", max_tokens=4, stop_ids=frozenset()).finish_reason == "length"


RUNNERS = ["modules", "pages", *(["native int8", "native"] if unsupported(MODEL.decoder) is None else [])]


def small_engine(runner: str, pages: int = 6) -> Engine:
    """Three answers at a time; over so few pages that not all of them can be long, but for the modules as they run on a CPU."""
    made: Runner | None = None
    if runner == "pages":
        made = TorchRunner(MODEL.decoder, pages=pages, page=PAGE, static=True)
    elif runner != "modules":
        kv: KV | None = "int8" if runner == "native int8" else None
        made = NativeRunner(NativeDecoder(MODEL.decoder), MODEL.decoder, pages=pages, kv=kv)
    return Engine(MODEL.decoder, MODEL.tokenizer, slots=3, prefill_tokens=16, runner=made)


def no_page_is_lost(engine: Engine) -> None:
    """Every page is free, idle, or used by as many sequences as it counts."""
    pool = engine.pool
    users = Counter(page for sequence in engine.running for page in sequence.pages)
    assert [users[page] for page in range(pool.count)] == pool.users
    assert sorted([*pool.free, *pool.idle, *users]) == list(range(pool.count))
    assert all(not sequence.pages and not sequence.cached for sequence in engine.waiting)


class Pages(RuleBasedStateMachine):
    """Random requests, cancellations and steps, each of which takes a second."""

    runner = "modules"

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.made()
        self.open: dict[int, int] = {}
        self.now = 0.0
        self.engine.clock = lambda: self.now

    def made(self) -> Engine:
        return small_engine(self.runner)

    @rule(
        length=st.integers(1, 70),
        new=st.integers(1, 50),
        n=st.integers(1, 3),
        tenant=st.sampled_from("ab"),
        deadline=st.sampled_from((None, None, 0.0, 2.0, 20.0)),
    )
    def add(self, length: int, new: int, n: int, tenant: str, deadline: float | None) -> None:
        sampling = Sampling(max_tokens=new, n=n, temperature=1.0, stop_ids=frozenset())
        self.open[self.engine.add([65] * length, sampling, tenant=tenant, deadline=deadline)] = n

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.open:
            request = data.draw(st.sampled_from(sorted(self.open)))
            del self.open[request]
            self.engine.cancel(request)
            assert all(sequence.request != request for sequence in self.engine.running)

    @rule(count=st.integers(1, 9))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.now += 1
            for event in self.engine.step():
                self.open[event.request] -= event.finish_reason is not None
                if not self.open[event.request]:
                    del self.open[event.request]

    @invariant()
    def all_is_accounted_for(self) -> None:
        no_page_is_lost(self.engine)
        assert {sequence.request for sequence in (*self.engine.running, *self.engine.waiting)} == set(self.open)
        assert 0 <= self.engine.cache_usage <= 1

    def teardown(self) -> None:
        while not self.engine.idle:
            self.steps(1)
        assert not self.open
        assert not any(self.engine.pool.users)


class TorchPages(Pages):
    runner = "pages"


class NativePages(Pages):
    runner = RUNNERS[-1]


Pages.TestCase.settings = TorchPages.TestCase.settings = NativePages.TestCase.settings = settings(
    max_examples=8, stateful_step_count=25, deadline=None
)
TestPages, TestTorchPages, TestNativePages = Pages.TestCase, TorchPages.TestCase, NativePages.TestCase


def test_ten_thousand_requests_with_cancellations_leak_no_page() -> None:
    engine, random = small_engine(RUNNERS[-1]), Random(0)
    open_requests: set[int] = set()
    for _ in range(10_000):
        prompt = [random.choice((65, 66))] * random.randrange(1, 80)
        sampling = Sampling(max_tokens=random.randrange(1, 4), stop_ids=frozenset())
        open_requests.add(engine.add(prompt, sampling, tenant=random.choice("ab"), priority=random.randrange(2)))
        if random.random() < 0.7:
            request = random.choice(sorted(open_requests))
            open_requests.discard(request)
            engine.cancel(request)
        if random.random() < 0.5:
            open_requests -= {event.request for event in engine.step() if event.finish_reason}
    no_page_is_lost(engine)
    while not engine.idle:
        engine.step()
    assert not any(engine.pool.users)


@pytest.mark.parametrize("runner", RUNNERS)
def test_answers_that_lost_their_pages_go_on_where_they_were(runner: str) -> None:
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=5, stop_ids=frozenset())
    requests = [([65 + index] * 40, sampling) for index in range(3)]
    crowded, roomy = small_engine(runner, pages=6), small_engine(runner, pages=40)
    one, other = run(crowded, requests), run(roomy, requests)
    assert [tokens(one[index]) for index in range(3)] == [tokens(other[index]) for index in range(3)]
    assert roomy.preemptions == 0
    assert crowded.preemptions > 0 or runner == "modules"


@pytest.mark.parametrize("runner", RUNNERS[1:])
def test_a_shared_beginning_is_read_once_and_never_across_tenants(runner: str) -> None:
    engine = small_engine(runner, pages=40)
    engine.prefill_tokens = 512  # the whole prompt in the step that also ends the answer
    prefix, sampling = (
        [65] * 64,
        Sampling(max_tokens=1, stop_ids=frozenset()),
    )  # over with the step that reads the prompt
    alone = [tokens(run(small_engine(runner), [([*prefix, 66 + i], sampling)])[0]) for i in range(2)]
    first = run(engine, [([*prefix, 66], sampling)])[0]
    assert engine.reused_tokens == 0
    assert [tokens(first), tokens(run(engine, [([*prefix, 67], sampling)])[0])] == alone
    assert engine.reused_tokens == 64
    engine.add([*prefix, 68], sampling, tenant="other")
    while not engine.idle:
        engine.step()
    assert engine.reused_tokens == 64
    events = run(engine, [(prefix, Sampling(max_tokens=3, n=3, temperature=1.0, seed=1, stop_ids=frozenset()))])[0]
    assert len(events) == 9
    assert engine.reused_tokens > 64  # the second and third answer share what the first one read


def test_the_tenant_with_the_fewest_answers_and_the_smallest_priority_go_first() -> None:
    engine = small_engine("modules")
    sampling = Sampling(max_tokens=3, stop_ids=frozenset())
    for tenant, priority in (("a", 1), ("a", 1), ("a", 1), ("b", 1), ("a", 0)):
        engine.add([65], sampling, tenant=tenant, priority=priority)
    engine.step()
    assert [sequence.request for sequence in engine.running] == [4, 3, 0]


@pytest.mark.skipif(RUNNERS[-1] != "native", reason="no native kernels here")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_speculation_gives_the_same_text_in_fewer_steps(temperature: float) -> None:
    """Stronger than an equal distribution: the very same tokens, log-probabilities and ends."""

    def engine(speculate: bool) -> Engine:
        runner = NativeRunner(NativeDecoder(MODEL.decoder), MODEL.decoder, pages=40)
        made = Engine(MODEL.decoder, MODEL.tokenizer, slots=4, runner=runner, speculate=speculate)
        costs = made.speculation.costs
        costs.saw = lambda rows, seconds, drafted=False: 1.0  # type: ignore[method-assign]
        costs.pace, costs.alone = 1.0, dict.fromkeys(range(40), 1.0)  # rows for nothing: drafts always pay
        return made

    requests = [
        # A strong bias makes answers repeat themselves, which is what drafts live from.
        (
            PROMPTS[2] * 2,
            Sampling(
                max_tokens=60 + index,
                temperature=temperature,
                seed=index,
                logit_bias=((70, 6.0), (71, 6.0)),
                stop_ids=frozenset(),
                top_k=3 if index == 1 else None,
            ),
        )
        for index in range(3)
    ]
    plain, drafting = engine(False), engine(True)
    one, other = run(plain, requests), run(drafting, requests)
    assert {key: [event.token for event in events] for key, events in one.items()} == {
        key: [event.token for event in events] for key, events in other.items()
    }
    assert plain.speculation.drafted_tokens == 0
    assert 0 < drafting.speculation.accepted_tokens <= drafting.speculation.drafted_tokens
    assert drafting.pool.usage == 0
