"""Speculation with a second model: the same tokens, more of them a step; the same distribution; every page comes back."""

import itertools
from collections import Counter

import pytest
import torch
from test_engine import Pages, run, tokens

from ownlm.errors import UserError
from ownlm.generate.drafter import Drafter
from ownlm.generate.drafts import Costs
from ownlm.generate.engine import Engine
from ownlm.generate.grammar import Form
from ownlm.generate.model import Model
from ownlm.generate.runners import NativeRunner, Runner
from ownlm.generate.sampling import Sampling
from ownlm.generate.sequence import Event
from ownlm.generate.torch_runner import torch_runner
from ownlm.kernels.native import NativeDecoder, unsupported
from tiny import tiny_model

BIG = tiny_model()
NATIVE = unsupported(BIG.decoder) is None
native = pytest.mark.skipif(not NATIVE, reason="no native kernels here")


def near(seed: int, noise: float) -> Model:
    """The big model with noise on its weights: it agrees more often than a stranger, and not always."""
    model, generator = tiny_model(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise * parameter.std().nan_to_num())
    return model


SMALL = near(1, 0.03)


def runner(model: Model, pages: int) -> Runner:
    if NATIVE:
        return NativeRunner(NativeDecoder(model.decoder), model.decoder, pages=pages)
    return torch_runner(model.decoder, slots=pages, context=128)


def free(costs: Costs) -> None:
    """As if rows cost nothing: drafts always pay."""
    costs.saw = lambda rows, seconds, drafted=False: 1.0  # type: ignore[method-assign]
    costs.pace = 1.0
    costs.alone, costs.beside = dict.fromkeys(range(1, 200), 1.0), dict.fromkeys(range(1, 200), 1.0)


def engine(small: Model | None, *, pages: int = 40, small_pages: int = 40, slots: int = 4) -> Engine:
    drafter = None if small is None else Drafter(small.decoder, runner(small, small_pages), context=128)
    made = Engine(
        BIG.decoder, BIG.tokenizer, slots=slots, runner=runner(BIG, pages), speculate=small is not None, drafter=drafter
    )
    free(made.speculation.costs)
    for source in made.speculation.sources:
        source.passed = lambda seconds, worth: None  # type: ignore[method-assign]
    if drafter is not None:
        drafter.costs.saw = lambda rows, seconds, drafted=False: 1e-6  # type: ignore[method-assign]
        drafter.costs.pace, drafter.costs.alone = 1.0, {1: 1e-6}
    return made


def no_page_is_lost(drafter: Drafter) -> None:
    pool = drafter.pool
    users = Counter(page for shadow in drafter.shadows.values() for page in shadow.text.pages)
    assert [users[page] for page in range(pool.count)] == pool.users
    assert sorted([*pool.free, *pool.idle, *users]) == list(range(pool.count))


REQUESTS = [
    (BIG.prompt_ids("once upon a time"), Sampling(max_tokens=60, stop_ids=frozenset())),
    (BIG.prompt_ids("x"), Sampling(max_tokens=50, temperature=1.0, seed=3, stop_ids=frozenset())),
    (BIG.prompt_ids("y" * 60), Sampling(max_tokens=40, temperature=0.7, top_k=9, top_p=0.9, seed=4, logprobs=2)),
    (
        BIG.prompt_ids("z"),
        Sampling(max_tokens=50, temperature=1.3, seed=5, presence_penalty=1.0, repetition_penalty=1.2, n=2),
    ),
    (BIG.prompt_ids("a"), Sampling(max_tokens=30, temperature=1.0, seed=6, form=Form("regex", "([a-f]{3}-)+[0-9]{2}"))),
]


@native
@pytest.mark.parametrize("pages", [40, 6], ids=["roomy", "crowded"])
def test_the_same_tokens_in_fewer_steps(pages: int) -> None:
    """Tokens, log-probabilities and ends, also where answers lose their pages and go on later."""
    plain, drafting = engine(None), engine(SMALL, pages=pages)
    one, other = run(plain, REQUESTS), run(drafting, REQUESTS)
    assert {key: [(event.index, event.token) for event in events] for key, events in sorted_by_answer(one).items()} == {
        key: [(event.index, event.token) for event in events] for key, events in sorted_by_answer(other).items()
    }
    assert (
        0.2 * drafting.speculation.drafted_tokens
        < drafting.speculation.accepted_tokens
        < drafting.speculation.drafted_tokens
    )
    assert drafting.speculation.drafter is not None
    assert (drafting.preemptions > 0) == (pages == 6)
    assert not drafting.speculation.drafter.shadows
    assert drafting.speculation.drafter.pool.usage == 0


def sorted_by_answer(events: dict[int, list[Event]]) -> dict[int, list[Event]]:
    return {key: sorted(of, key=lambda event: event.index) for key, of in events.items()}


@native
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_is_the_same_is_always_right(temperature: float) -> None:
    """At any temperature, for it draws with the answer's own random numbers: a step gives the draft and one token more."""
    drafting = engine(tiny_model())
    sampling = Sampling(max_tokens=64, temperature=temperature, seed=1, stop_ids=frozenset())
    drafting.add(BIG.prompt_ids("a word"), sampling)
    steps = 0
    while not drafting.idle:
        drafting.step()
        steps += 1
    assert drafting.speculation.accepted_tokens == drafting.speculation.drafted_tokens > 40
    assert steps < 20


@native
def test_the_distribution_is_that_of_plain_sampling() -> None:
    """Chi-squared over 4,000 drawn pairs of tokens, against the model's own softmax: the second stands behind a draft."""
    count, prompt = 4_000, BIG.prompt_ids("a")
    drafting = engine(SMALL, pages=600, small_pages=600, slots=64)
    # Few tokens are likely, so that each cell of the table is expected often enough.
    sampling = {"max_tokens": 3, "temperature": 0.5, "top_k": 4, "stop_ids": frozenset[int]()}
    found: Counter[tuple[int, ...]] = Counter()
    for first in range(0, count, 500):
        for events in run(
            drafting, [(prompt, Sampling(seed=first + seed, **sampling)) for seed in range(500)]
        ).values():  # type: ignore[arg-type]
            found[tuple(tokens(events)[:2])] += 1
    assert drafting.speculation.accepted_tokens > 0.2 * drafting.speculation.drafted_tokens > 500

    def chosen(ids: list[int]) -> dict[int, float]:
        best = (BIG.logits([ids])[0, -1].double() / 0.5).topk(4)
        return dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))

    expected = {(a, b): count * p * q for a, p in chosen(prompt).items() for b, q in chosen([*prompt, a]).items()}
    assert set(found) <= set(expected)
    rare = sum(value for value in expected.values() if value < 5)
    cells = [(found[key], value) for key, value in expected.items() if value >= 5]
    if rare >= 5:
        cells.append((sum(found[key] for key, value in expected.items() if value < 5), rare))
    assert len(cells) >= 8
    statistic = sum((seen - value) ** 2 / value for seen, value in cells)
    half = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    tail = float(torch.special.gammaincc(half, torch.tensor(statistic / 2, dtype=torch.float64)))
    assert tail > 0.001


@native
def test_a_long_prompt_is_caught_up_with_in_pieces_and_not_for_a_word() -> None:
    prompt = [65 + place % 7 for place in range(100)]

    def made() -> Engine:
        drafting = engine(SMALL)
        assert drafting.speculation.drafter is not None
        drafting.speculation.drafter.token_seconds = 0.05  # twenty tokens take as long as a step
        return drafting

    short, long = made(), made()
    run(short, [(prompt, Sampling(max_tokens=5, temperature=1.0, seed=1, stop_ids=frozenset()))])
    assert short.speculation.drafter is not None
    assert short.speculation.drafter.pool.free == list(range(40))  # it has read nothing
    long.add(prompt, Sampling(max_tokens=28, temperature=1.0, seed=1, stop_ids=frozenset()))
    read: list[int] = []
    while not long.idle:
        long.step()
        assert long.speculation.drafter is not None
        long.speculation.drafter.token_seconds = 0.05
        read += [shadow.text.cached for shadow in long.speculation.drafter.shadows.values()]
    assert read[0] == 0
    assert long.speculation.accepted_tokens > 0
    assert max(after - before for before, after in itertools.pairwise(read)) <= 14


@native
def test_a_second_text_with_the_same_beginning_is_not_read_again() -> None:
    drafting = engine(SMALL)
    assert drafting.speculation.drafter is not None
    rows: list[int] = []
    inner = drafting.speculation.drafter.runner.run

    def counted(chosen):  # type: ignore[no-untyped-def]
        rows.extend(len(row.tokens) for row in chosen)
        return inner(chosen)

    drafting.speculation.drafter.runner.run = counted  # type: ignore[method-assign]
    prompt, sampling = [65 + place % 7 for place in range(70)], Sampling(max_tokens=20, stop_ids=frozenset())
    run(drafting, [(prompt, sampling)])
    first = sum(rows)
    rows.clear()
    run(drafting, [(prompt, sampling)])
    assert sum(rows) < first - 50


def test_another_vocabulary_is_one_error() -> None:
    other = tiny_model()
    vocabulary = other.tokenizer.backend.to_str().replace("<|im_end|>", "<|im_over|>")
    other.tokenizer = type(other.tokenizer)(type(other.tokenizer.backend).from_str(vocabulary), other.tokenizer.config)
    with pytest.raises(UserError, match="very vocabulary"):
        tiny_model().draft_with(other)


def test_the_public_model_says_the_same() -> None:
    plain, drafting = tiny_model(), tiny_model()
    settings = {"max_tokens": 40, "temperature": 1.0, "seed": 2, "stop_ids": frozenset[int]()}
    texts = ["a", "once upon a time"]
    expected = [one.text for one in plain.generate(texts, **settings)]
    drafting.draft_with(near(2, 0.1))
    assert [one.text for one in drafting.generate(texts, **settings)] == expected
    assert "".join(drafting.stream(texts[0], **settings)) == expected[0]
    assert drafting._engine is not None
    assert drafting._engine.speculation.drafter is not None
    drafting.draft_with(None)
    assert drafting.engine().speculation.drafter is None


class DraftedPages(Pages):
    """Random requests, cancellations and steps, with pages of the small model that don't reach for all."""

    def made(self) -> Engine:
        return engine(SMALL, pages=6 if NATIVE else 3, small_pages=4 if NATIVE else 2, slots=3)

    def drafter(self) -> Drafter:
        assert self.engine.speculation.drafter is not None
        return self.engine.speculation.drafter

    def all_is_accounted_for(self) -> None:
        super().all_is_accounted_for()
        no_page_is_lost(self.drafter())
        assert set(self.drafter().shadows) <= set(self.engine.running)

    def teardown(self) -> None:
        super().teardown()
        assert not any(self.drafter().pool.users)


DraftedPages.TestCase.settings = Pages.TestCase.settings
TestDraftedPages = DraftedPages.TestCase
