import pytest
import torch
import torch.nn.functional as F

from ownlm.train import cross_entropy
from ownlm.train.cross_entropy import linear_cross_entropy


def leaves(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 70, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(50, (3, 70), generator=generator)
    targets[0, :5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 24])
def test_loss_and_gradients_equal_those_of_torch(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    hidden, weight, targets = leaves(torch.float64)
    wanted = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")
    gradients = torch.autograd.grad(wanted * 0.25, (hidden, weight))
    ours = linear_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(ours * 0.25, (hidden, weight))
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=0)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_bias_and_softcap() -> None:
    hidden, weight, targets = leaves(torch.float64)
    bias = torch.randn(50, dtype=torch.float64, requires_grad=True)
    logits = 3.0 * torch.tanh((hidden @ weight.T + bias) / 3.0)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    ours = linear_cross_entropy(hidden, weight, targets, bias_V=bias, softcap=3.0)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=0)
    everything = (hidden, weight, bias)
    pairs = zip(torch.autograd.grad(ours, everything), torch.autograd.grad(wanted, everything), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, weight, targets = leaves(torch.float32)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), linear_cross_entropy(hidden, weight, targets))
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), targets).requires_grad


def test_bf16_stays_near_fp32() -> None:
    hidden, weight, targets = leaves(torch.bfloat16)
    wanted = F.cross_entropy((hidden.float() @ weight.float().T).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), wanted, rtol=5e-3, atol=0)


def test_nothing_trained_is_no_loss_and_no_gradient() -> None:
    hidden, weight, targets = leaves(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
