"""Search over beams on decoders: transformers' own answers, token for token; shared pages; every page comes back."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from references import CONFIGS, save
from test_engine import RUNNERS

from ownlm.checkpoints.weights import load_model
from ownlm.errors import ContextTooLong, UserError
from ownlm.generate import beams
from ownlm.generate.engine import Engine
from ownlm.generate.runners import NativeRunner, Runner
from ownlm.generate.sampling import Sampling
from ownlm.generate.sequence import Row
from ownlm.generate.torch_runner import PAGE, TorchRunner, torch_runner
from ownlm.kernels.native import NativeDecoder
from ownlm.models.decoder import Decoder
from tiny import tiny_model, tiny_tokenizer

VOCABULARY, LIMIT = 24, 26
TOKENIZER = tiny_tokenizer()
FAMILIES = ("llama3", "gpt2", "qwen3")
Pair = tuple[Any, Decoder]
Settings = tuple[int, int, float, bool | str]  # beams, n, length_penalty, early_stopping


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """By family: transformers' model and ours of the same weights, unsure enough that beams change places."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            reference = save({**CONFIGS[name], "vocab_size": VOCABULARY, "tie_word_embeddings": False}, path)
            with torch.no_grad():
                reference.lm_head.weight.mul_(0.15)
            reference.save_pretrained(path)
            made[name] = reference, load_model(path)
        return made[name]

    return get


def engine(model: Decoder, runner: str, *, pages: int = 60, slots: int = 20) -> Engine:
    made: Runner
    if runner == "native":
        made = NativeRunner(NativeDecoder(model, max_tokens=128), model, pages=pages)
    elif runner == "pages":
        made = TorchRunner(model, pages=pages, page=PAGE, static=True)
    else:
        made = torch_runner(model, slots=slots, context=128)
    return Engine(model, TOKENIZER, context=128, runner=made, prefill_tokens=16)


def prompts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in (9, 1, 64, 31)]


def theirs(reference: Any, prompt: list[int], stops: Sequence[int], **settings: Any) -> list[tuple[int, ...]]:
    """What transformers finds for a prompt, without the padding after a stop token."""
    out = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
        max_new_tokens=LIMIT,
        **settings,
    )
    rows = []
    for row in out[:, len(prompt) :].tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
        rows.append(tuple(row[:end]))
    return rows


SEARCHES: list[tuple[list[int], Settings]] = [
    ([], (2, 1, 1.0, False)),
    ([5], (4, 3, 0.0, False)),
    ([1, 5, 9], (3, 3, 2.0, True)),
    ([1, 5], (5, 2, 0.6, "never")),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_equal_transformers(name: str, pairs: Callable[[str], Pair]) -> None:
    reference, model = pairs(name)
    found = set()
    for seed, (stops, (count, n, penalty, early)) in enumerate(SEARCHES):
        search: dict[str, Any] = {"length_penalty": penalty, "early_stopping": early}
        expected = [
            theirs(reference, prompt, stops, num_beams=count, num_return_sequences=n, **search)
            for prompt in prompts(seed)
        ]
        for runner in RUNNERS:
            made = engine(model, runner)
            asked = Sampling(beams=count, n=n, max_tokens=LIMIT, stop_ids=frozenset(stops), **search)
            answers = beams.search(made, prompts(seed), asked)
            assert [[one.tokens for one in row] for row in answers] == expected
            assert not any(made.pool.users)
            assert len(made.pool.free) + len(made.pool.idle) == made.pool.count
        found.update(answer for row in expected for answer in row)
    assert len(found) > 25  # no search that always finds the same


@pytest.mark.skipif(RUNNERS[-1] != "native", reason="no native kernels here")
def test_beams_share_the_pages_of_what_they_have_in_common(pairs: Callable[[str], Pair]) -> None:
    """Of a prompt of 64 tokens two full pages, once for all beams; no token is read twice."""
    _, model = pairs("qwen3")
    made, read, most = engine(model, "native"), 0, 0
    inner = made.runner.run

    def counted(rows: Sequence[Row]) -> torch.Tensor:
        nonlocal read, most
        read += sum(len(row.tokens) for row in rows)
        most = max(most, sum(users > 0 for users in made.pool.users))
        return inner(rows)

    made.runner.run = counted  # type: ignore[method-assign]
    search = Sampling(beams=8, max_tokens=20, stop_ids=frozenset())
    [[best]] = beams.search(made, [prompts(0)[2]], search)
    assert len(best.tokens) == 20
    assert read <= 64 + 8 * 19
    assert most <= 2 + 8


@pytest.mark.parametrize("runner", RUNNERS)
def test_what_could_never_fit_is_told_with_numbers(runner: str, pairs: Callable[[str], Pair]) -> None:
    _, model = pairs("qwen3")
    made = engine(model, runner, pages=8, slots=3)
    search = Sampling(beams=4, max_tokens=100, stop_ids=frozenset())
    with pytest.raises(UserError, match=r"4 beams of 109 tokens need \d+ pages of the cache, and it has \d"):
        beams.search(made, [prompts(0)[0]], search)
    with pytest.raises(ContextTooLong):
        beams.search(made, [prompts(0)[2]], search)
    # One after the other, where not all fit side by side.
    narrow, asked = engine(model, runner, pages=12, slots=5), Sampling(beams=4, max_tokens=40, stop_ids=frozenset())
    found = beams.search(narrow, prompts(1), asked)
    alone = [beams.search(narrow, [prompt], asked)[0] for prompt in prompts(1)]
    assert [[one.tokens for one in row] for row in found] == [[one.tokens for one in row] for row in alone]


def used(made: Engine) -> int:
    return sum(users > 0 for users in made.pool.users)


@pytest.mark.parametrize("runner", RUNNERS)
def test_searches_run_beside_answers_and_change_neither(runner: str, pairs: Callable[[str], Pair]) -> None:
    _, model = pairs("llama3")
    search, write = Sampling(beams=4, n=2, max_tokens=20), Sampling(max_tokens=60, stop_ids=frozenset())
    asked = prompts(2)
    alone = [beams.search(engine(model, runner), [prompt], search)[0] for prompt in asked]
    plain = engine(model, runner)
    plain.add(asked[0], write)
    said = [event.token for _ in range(200) if not plain.idle for event in plain.step()]
    # Room for the writer and one search or two, so that others wait.
    made = engine(model, runner, pages=24, slots=14)
    made.add(asked[0], write)
    events = [event.token for _ in range(5) for event in made.step()]
    searches, found = beams.Searches(made), dict[int, list[beams.Hypothesis]]()
    requests = [searches.add(prompt, search) for prompt in asked]
    gone = searches.add(asked[0], search)
    while not searches.idle:
        events += [event.token for event in made.step()]
        found.update(searches.step())
        assert made.pool.promised == sum(group.owed for group in searches.groups) >= 0
        searches.cancel(gone)
    assert [[one.tokens for one in found[request]] for request in requests] == [
        [one.tokens for one in row] for row in alone
    ]
    assert len(events) > 5  # it went on writing meanwhile
    events += [event.token for _ in range(200) if not made.idle for event in made.step()]
    assert [token and token.id for token in events] == [token and token.id for token in said]
    assert (used(made), made.pool.promised, made.admits) == (0, 0, True)


def test_while_a_search_waits_for_pages_nobody_else_begins(pairs: Callable[[str], Pair]) -> None:
    _, model = pairs("llama3")
    made = engine(model, "modules", slots=5)
    made.add(prompts(0)[0], Sampling(max_tokens=6, stop_ids=frozenset()))
    made.step()
    searches = beams.Searches(made)
    first = searches.add(prompts(0)[0], Sampling(beams=5, max_tokens=8))
    assert searches.step() == []
    later = made.add(prompts(0)[0], Sampling(max_tokens=6, stop_ids=frozenset()))
    order: list[int] = []
    while not (made.idle and searches.idle):
        order += [event.request for event in made.step() if event.finish_reason]
        order += [request for request, _ in searches.step()]
    assert order == [0, first, later]
    # One that is cancelled gives back what it has, in the middle too.
    first = searches.add(prompts(0)[0], Sampling(beams=5, max_tokens=8))
    for _ in range(3):
        searches.step()
    assert used(made) > 0
    searches.cancel(first)
    assert searches.idle
    assert (used(made), made.pool.promised) == (0, 0)


def test_what_a_search_found_is_told_as_events() -> None:
    model, sampling = tiny_model(gain=0.5), Sampling(beams=4, n=3, max_tokens=12)
    prompt = model.prompt_ids("once")
    found = beams.search(model.engine(4), [prompt], sampling)[0]
    told = beams.events(model.tokenizer, prompt, sampling, 7, found)
    for index, one in enumerate(found):
        mine, whole = [event for event in told if event.index == index], one.completion(model.tokenizer, prompt)
        assert "".join(event.text for event in mine) == whole.text
        assert [event.finish_reason for event in mine] == [*[None] * (len(one.tokens) - 1), whole.finish_reason]
        assert [event.token.logprob for event in mine if event.token] == list(one.logprobs)


def test_the_public_model_searches() -> None:
    model = tiny_model(gain=0.5)
    settings: dict[str, Any] = {"beams": 4, "max_tokens": 12}
    texts = ["once", "a longer beginning of a text"]
    together = model.generate(texts, **settings)
    assert [model.generate(text, **settings).tokens for text in texts] == [one.tokens for one in together]
    assert "".join(model.stream(texts[0], **settings)) == together[0].text
    for text, one in zip(texts, together, strict=True):
        scored = model.logits([[*model.prompt_ids(text), *one.tokens]])[0].log_softmax(-1)
        first = len(model.prompt_ids(text)) - 1
        assert one.logprobs == pytest.approx(
            [float(scored[first + k, id]) for k, id in enumerate(one.tokens)], abs=1e-3
        )
    [several] = model.answers([model.prompt_ids("once")], Sampling(n=3, **settings))
    assert several[0].tokens == together[0].tokens
    assert len({one.tokens for one in several}) == 3
    for wrong in ({"temperature": 1.0}, {"stop": ("x",)}, {"presence_penalty": 1.0}, {"n": 5}, {"best_of": 4}):
        with pytest.raises(UserError, match="beams"):
            Sampling(beams=4, **wrong)
    with pytest.raises(UserError, match="no events"):
        next(model.events(model.prompt_ids("once"), Sampling(beams=4)))
