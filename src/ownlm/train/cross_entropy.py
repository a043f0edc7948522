"""Cross-entropy straight from hidden states, without ever holding all logits.

For each chunk of rows: logits -> log-probabilities -> loss, and at once the gradients with respect to the hidden states and
the head's weight, since everything needed for them is still in the cache. The backward pass then only scales them. Memory
is one chunk of logits instead of N x V in three copies.

Shapes: N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ownlm.tokens.batches import UNTRAINED

CHUNK_BYTES = 16 << 20  # of fp32 logits at once: larger ones feed the matrix product, smaller ones stay in the cache


def linear_cross_entropy(
    hidden: Tensor, weight_VD: Tensor, targets: Tensor, *, bias_V: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Sum over the trained tokens of -log softmax(hidden @ weight.T + bias)[target], in nats, as an fp32 scalar.

    `hidden` is (..., D), `targets` (...) of int64; a target of -100 trains nothing and costs nothing. With `softcap` the
    logits are softcap * tanh(logits / softcap). The sum, not the mean: the loop divides by the tokens of the whole step,
    so that accumulation does not change the loss.
    """
    hidden_ND, targets_N = hidden.flatten(0, -2), targets.flatten()
    trained = targets_N != UNTRAINED
    if not bool(trained.all()):
        hidden_ND, targets_N = hidden_ND[trained], targets_N[trained]
    if not torch.is_grad_enabled():
        return _forward(hidden_ND, weight_VD, bias_V, targets_N, softcap, None)
    loss: Tensor = LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N, softcap)  # type: ignore[no-untyped-call]
    return loss


class LinearCrossEntropy(torch.autograd.Function):
    """All gradients are made in the forward pass; those of weight and bias are summed over the chunks in fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, softcap: float | None
    ) -> Tensor:
        bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        # A frozen head (LoRA) needs none of its own, which is a third of the work here.
        weight = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        ctx.gradients = torch.empty_like(hidden_ND), weight, bias
        ctx.dtype = weight_VD.dtype
        return _forward(hidden_ND, weight_VD, bias_V, targets_N, softcap, ctx.gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        hidden_ND, weight_VD, bias_V = ctx.gradients
        bias = None if bias_V is None else bias_V.mul_(scale).to(ctx.dtype)
        weight = None if weight_VD is None else weight_VD.mul_(scale).to(ctx.dtype)
        return hidden_ND.mul_(scale), weight, bias, None, None


def _forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    softcap: float | None,
    gradients: tuple[Tensor, Tensor | None, Tensor | None] | None,
) -> Tensor:
    """The loss; where `gradients` of (hidden, weight, bias) are given, they are written too."""
    loss = hidden_ND.new_zeros((), dtype=torch.float32)
    rows = max(64, CHUNK_BYTES // (4 * len(weight_VD)))
    for start in range(0, len(targets_N), rows):
        part, target = hidden_ND[start : start + rows], targets_N[start : start + rows]
        logits = F.linear(part, weight_VD, bias_V)
        bent = None
        if softcap is not None:
            bent = torch.tanh(logits.float() / softcap)
            logits = bent * softcap
        logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
        loss += F.nll_loss(logprobs, target, reduction="sum")
        if gradients is None:
            continue
        # Softmax, minus one at the target, is the derivative; in fp32, where 0.999 - 1 is not lost.
        slope = logprobs.exp_().scatter_add_(1, target[:, None], logprobs.new_full((len(target), 1), -1.0))
        if bent is not None:
            slope *= 1 - bent * bent
        slope = slope.to(part.dtype)
        torch.mm(slope, weight_VD, out=gradients[0][start : start + rows])
        if gradients[1] is not None:
            gradients[1].add_(slope.mT @ part)
        if gradients[2] is not None:
            gradients[2].add_(slope.sum(0, dtype=torch.float32))
    return loss
