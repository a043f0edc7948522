"""The native choice of a token against the plain one, and against the distribution itself."""

import numpy as np
import pytest
import torch

from ownlm.generate.sampling import Sampling, draw, probabilities
from ownlm.kernels import library
from ownlm.kernels.choose import choose

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")


@pytest.fixture(params=library.instruction_sets())
def _each_instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "instruction_set", lambda: request.param)


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("vocab_size", [1, 7, 16, 97, 512, 513, 5000, 33_001])
def test_the_same_token_as_the_plain_way(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    rows = 40
    wide = torch.randn(rows, vocab_size + 9, generator=generator) * 4
    logits = wide[:, :vocab_size]  # rows that don't stand close together
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    temperatures = [0.0, 0.3, 1.0, 2.5] * (rows // 4)
    ids, logprobs = choose(logits, range(rows), temperatures, uniform.tolist())
    requests = [Sampling(temperature=temperature or 1.0) for temperature in temperatures]
    drawn = draw(probabilities(logits, requests), uniform)
    expected = torch.where(torch.tensor(temperatures) > 0, drawn, logits.argmax(-1))
    # float32 weights against float64 ones: a draw right at the edge of two tokens may fall on either side.
    assert (torch.tensor(ids) != expected).sum() <= 1
    reference = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    np.testing.assert_allclose(logprobs, reference.numpy(), atol=2e-5)


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 20,000 draws, 19 degrees of freedom: above 43.8 once in a thousand."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, _ = choose(logits[None], [0] * count, [0.7] * count, uniform.tolist())
    expected = count * (logits.double() / 0.7).softmax(-1)
    seen = torch.bincount(torch.tensor(ids), minlength=20)
    assert float(((seen - expected) ** 2 / expected).sum()) < 43.8


def test_the_first_of_equal_logits_is_taken() -> None:
    ids, logprobs = choose(torch.tensor([[0.0, 3.0, 3.0], [-1.0, -1.0, -1.0]]), [0, 1], [0.0, 0.0], [0.0, 0.0])
    assert ids == [1, 0]
    assert logprobs[1] == pytest.approx(-np.log(3), abs=1e-6)


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_what_is_impossible_is_not_chosen(temperature: float) -> None:
    """Whole parts of a vocabulary may have no chance at all."""
    logits = torch.full((1, 40_000), -torch.inf)
    logits[0, 20_000], logits[0, 39_999] = 1.0, 2.0
    ids, logprobs = choose(logits, [0, 0], [temperature] * 2, [0.0, 0.999])
    assert ids == ([20_000, 39_999] if temperature else [39_999] * 2)
    np.testing.assert_allclose(logprobs, logits.log_softmax(-1)[0, ids], atol=1e-6)


@pytest.mark.usefixtures("_each_instruction_set")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_numbers_still_give_a_token(temperature: float) -> None:
    ids, _ = choose(torch.full((1, 3000), torch.nan), [0], [temperature], [0.5])
    assert 0 <= ids[0] < 3000
