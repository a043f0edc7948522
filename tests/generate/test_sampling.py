"""The sampler against a ten-line numpy version, and the promises it makes about seeds and batches."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ownlm.errors import UserError
from ownlm.generate.sampling import Sampling, adjust, draw, probabilities, sample


def reference(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float) -> np.ndarray:
    """The distribution after temperature, top-k and top-p, one token at a time."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")[: top_k or len(p)]
    total, mass, kept = p[order].sum(), 0.0, np.zeros_like(p)
    for token in order:
        if mass >= top_p * total:
            break
        kept[token] = p[token]
        mass += p[token]
    return kept / kept.sum()


@given(
    seed=st.integers(0, 2**16),
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.floats(0.01, 1),
)
@settings(max_examples=60, deadline=None)
def test_cuts_equal_the_plain_version(seed: int, temperature: float, top_k: int | None, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=32) * 2
    p = probabilities(torch.tensor(logits)[None], [Sampling(temperature=temperature, top_k=top_k, top_p=top_p)])[0]
    np.testing.assert_allclose((p / p.sum()).numpy(), reference(logits, temperature, top_k, top_p), atol=1e-9)


@given(seed=st.integers(0, 2**16), min_p=st.floats(0, 1), typical_p=st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_min_p_and_typical_equal_the_plain_version(seed: int, min_p: float, typical_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=24) * 2
    p = np.exp(logits) / np.exp(logits).sum()
    p[p < min_p * p.max()] = 0
    if typical_p < 1:
        unit = p / p.sum()
        there = unit > 0
        entropy = -(unit[there] * np.log(unit[there])).sum()
        distance = np.full(24, np.inf)
        distance[there] = np.abs(-np.log(unit[there]) - entropy)
        mass, kept = 0.0, np.zeros(24)
        for token in np.argsort(distance, kind="stable"):
            if mass >= typical_p:
                break
            kept[token], mass = p[token], mass + unit[token]
        p = kept
    ours = probabilities(torch.tensor(logits)[None], [Sampling(temperature=1.0, min_p=min_p, typical_p=typical_p)])[0]
    np.testing.assert_allclose(ours.numpy(), p, atol=1e-12)


def test_penalties_and_bias() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    text = ([0, 1, 1, 2, 1], 2)  # the prompt is 0 1, the answer 1 2 1

    def adjusted(**fields: Any) -> list[float]:
        return adjust(logits, [Sampling(**fields)], [text])[0].tolist()

    assert adjusted(repetition_penalty=2.0) == [1.0, -2.0, 0.25, 0.0]
    assert adjusted(presence_penalty=0.5) == [2.0, -1.5, 0.0, 0.0]
    assert adjusted(frequency_penalty=0.5) == [2.0, -2.0, 0.0, 0.0]
    assert adjusted(logit_bias=((3, 5.0), (0, -1.0))) == [1.0, -1.0, 0.5, 5.0]
    assert logits.tolist() == [[2.0, -1.0, 0.5, 0.0]]
    # The choice follows them, the log-probability that is told stays the model's own.
    [token] = sample(logits, [Sampling(logit_bias=((3, 5.0),))], [torch.Generator()], [text])
    assert (token.id, token.logprob) == (3, pytest.approx(logits.log_softmax(-1)[0, 3].item()))


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, -3.0]])
    request = Sampling(temperature=0.8, seed=1)
    generator = request.generator(0)
    n = 4000
    ids = [
        token.id for _ in range(n // 500) for token in sample(logits.repeat(500, 1), [request] * 500, [generator] * 500)
    ]
    expected = reference(logits[0].double().numpy(), 0.8, None, 1.0) * n
    chi_squared = ((np.bincount(ids, minlength=6) - expected) ** 2 / expected).sum()
    assert chi_squared < 25.7  # the 0.9999 quantile of chi-squared with 5 degrees of freedom


def test_a_draw_never_picks_a_token_without_probability() -> None:
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).repeat(4, 1)
    uniform = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(p, uniform).tolist() == [1, 1, 3, 3]


def test_same_seed_same_tokens_alone_and_among_others() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    requests = [
        Sampling(temperature=0.3 + row / 4, top_k=None if row % 2 else 5, top_p=1.0 if row % 3 else 0.7, seed=row)
        for row in range(8)
    ]
    requests[3] = Sampling()

    def text(rows: list[int]) -> dict[int, list[int]]:
        generators = [requests[row].generator(0) for row in rows]
        steps = [sample(logits[rows], [requests[row] for row in rows], generators) for _ in range(20)]
        return {row: [step[place].id for step in steps] for place, row in enumerate(rows)}

    together = text(list(range(8)))
    for row in range(8):
        assert text([row])[row] == together[row]
    assert text([6, 2, 3]) == {row: together[row] for row in (6, 2, 3)}


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    requests = [
        Sampling(temperature=2.0, top_k=2, seed=1, logprobs=3),
        Sampling(),
        Sampling(temperature=1, logprobs=20),
    ]
    tokens = sample(logits, requests, [request.generator(0) for request in requests])
    reference = torch.log_softmax(logits, -1)
    for row, (token, request) in enumerate(zip(tokens, requests, strict=True)):
        assert token.logprob == pytest.approx(reference[row, token.id].item(), abs=1e-6)
        assert [id for id, _ in token.top] == reference[row].argsort(descending=True)[: request.logprobs].tolist()
        assert [value for _, value in token.top] == sorted((value for _, value in token.top), reverse=True)


def test_greedy_takes_the_likeliest_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    [token] = sample(torch.tensor([[0.0, 3.0, 1.0]]), [Sampling()], [generator])
    assert token.id == 1
    assert torch.equal(before, generator.get_state())


def test_answers_of_one_seed_differ_and_repeat() -> None:
    first, second = (Sampling(seed=5).generator(index).initial_seed() for index in (0, 1))
    assert first != second
    assert first == Sampling(seed=5).generator(0).initial_seed() != Sampling(seed=6).generator(0).initial_seed()
    assert Sampling(seed=-1).generator(0).initial_seed() >= 0
    assert Sampling().generator(0).initial_seed() != Sampling().generator(0).initial_seed()


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Sampling(max_tokens=0, temperature=-1, top_k=0, top_p=0, stop=("",), logprobs=21, n=0)
    for name in ("max_tokens", "temperature", "top_k", "top_p", "stop", "logprobs", "n must"):
        assert name in str(caught.value)
    with pytest.raises(UserError, match="temperature"):
        Sampling(temperature=float("nan"))
