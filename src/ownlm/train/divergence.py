"""Kullback-Leibler divergence of a student from a teacher straight from hidden states, without ever holding all logits of either.

For each chunk of rows: both models' logits, the divergence, and at once the gradients with respect to the student's hidden
states and head, as in cross_entropy.py. Memory is three chunks of logits instead of 2 N x V and their gradients.

Shapes: N tokens, D hidden (each model its own), V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ownlm.train.cross_entropy import CHUNK_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """The last layer of a model: logits = cap(hidden @ weight.T + bias)."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None

    def logits(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """fp32 logits of some rows, and the tanh that bent them, if any."""
        raw = F.linear(self.hidden_ND[rows], self.weight_VD, self.bias_V).float()
        if self.softcap is None:
            return raw, None
        bent = torch.tanh(raw / self.softcap)
        return bent * self.softcap, bent


def linear_divergence(student: Output, teacher: Output, *, temperature: float = 1.0) -> Tensor:
    """Sum over rows of T² KL(softmax(teacher / T) ‖ softmax(student / T)), in nats, as an fp32 scalar.

    The factor T² keeps the size of the gradient when the temperature changes (arXiv:1503.02531, 2). The teacher gets no gradient.
    """
    assert len(student.weight_VD) == len(teacher.weight_VD), "student and teacher must share a vocabulary"
    if not torch.is_grad_enabled():
        return _forward(student, teacher, temperature, None)
    loss: Tensor = LinearDivergence.apply(  # type: ignore[no-untyped-call]
        student.hidden_ND, student.weight_VD, student.bias_V, student.softcap, teacher, temperature
    )
    return loss


class LinearDivergence(torch.autograd.Function):
    """All gradients are made in the forward pass; those of weight and bias are summed over the chunks in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        teacher: Output,
        temperature: float,
    ) -> Tensor:
        bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        ctx.gradients = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD, dtype=torch.float32), bias
        ctx.dtype = weight_VD.dtype
        return _forward(Output(hidden_ND, weight_VD, bias_V, softcap), teacher, temperature, ctx.gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        hidden_ND, weight_VD, bias_V = ctx.gradients
        bias = None if bias_V is None else bias_V.mul_(scale).to(ctx.dtype)
        return hidden_ND.mul_(scale), weight_VD.mul_(scale).to(ctx.dtype), bias, None, None, None


def _forward(
    student: Output, teacher: Output, temperature: float, gradients: tuple[Tensor, Tensor, Tensor | None] | None
) -> Tensor:
    """The divergence; where `gradients` of the student's (hidden, weight, bias) are given, they are written too."""
    loss = student.hidden_ND.new_zeros((), dtype=torch.float32)
    size = max(64, CHUNK_BYTES // (4 * len(student.weight_VD)))
    for start in range(0, len(student.hidden_ND), size):
        rows = slice(start, start + size)
        logits, bent = student.logits(rows)
        logprobs = torch.log_softmax(logits / temperature, -1)
        truth = torch.log_softmax(teacher.logits(rows)[0] / temperature, -1)
        loss += F.kl_div(logprobs, truth, reduction="sum", log_target=True) * temperature**2
        if gradients is None:
            continue
        slope = logprobs.exp_().sub_(truth.exp_()).mul_(temperature)  # T² / T: the student's logits are divided by T
        if bent is not None:
            slope *= 1 - bent * bent
        slope = slope.to(student.hidden_ND.dtype)
        torch.mm(slope, student.weight_VD, out=gradients[0][rows])
        gradients[1].add_(slope.mT @ student.hidden_ND[rows])
        if gradients[2] is not None:
            gradients[2].add_(slope.sum(0, dtype=torch.float32))
    return loss
