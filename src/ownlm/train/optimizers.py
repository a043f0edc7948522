"""AdamW and Muon over flat buffers.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix by the nearest
orthogonal matrix. Here all matrices of one shape go through the iteration in one batched product, in bf16 where that is
fast: a stack of 16 x 192 x 192 takes 4.4 ms on two cores instead of 20 ms in fp32 or 8.8 ms one by one.
Embeddings, the head, norms and biases always get AdamW.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ownlm.train.parameters import Group, Parameters, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """Peak learning rates by role. `lr` is that of the matrices; None: 0.02 for Muon, 0.002 for AdamW. `clip` None: never."""

    kind: Literal["muon", "adamw"] = "muon"
    lr: float | None = None
    embedding_lr: float = 0.01
    head_lr: float = 0.005
    vector_lr: float = 0.01
    weight_decay: float = 0.05
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-10
    clip: float | None = 1.0

    @property
    def matrix_lr(self) -> float:
        return self.lr if self.lr is not None else {"muon": 0.02, "adamw": 0.002}[self.kind]

    def peak(self, role: Role) -> float:
        rates: dict[Role, float] = {
            "matrix": self.matrix_lr,
            "embedding": self.embedding_lr,
            "head": self.head_lr,
            "vector": self.vector_lr,
        }
        return rates[role]


# Polar Express (Amsel et al., arXiv 2505.16932): each iteration has its own best quintic, unlike Newton-Schulz's one for all.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each of a stack (n, rows, columns), its singular values within 15 % of 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Update:
    """The moments and the rule that moves the weights. `moments` are what a saved state needs besides the weights."""

    def __init__(self, settings: Optimizer, parameters: Parameters, dtype: torch.dtype) -> None:
        self.settings, self.parameters, self.dtype = settings, parameters, dtype
        flat = parameters.master
        self.muon = [g for g in parameters.groups if settings.kind == "muon" and g.role == "matrix"]
        self.adamw = [g for g in parameters.groups if g not in self.muon]
        first_adamw = min((g.start for g in self.adamw), default=len(flat))
        self.moments = {"first": torch.zeros_like(flat), "second": torch.zeros_like(flat[first_adamw:])}
        self.offset = first_adamw

    def step(self, number: int, factor: float, norm: float) -> None:
        """Update `number` (counted from 0) with the peak learning rates times `factor`; then the gradient is zero again.

        `norm` is the gradient's; one longer than `clip` is shortened to it first.
        """
        if self.settings.clip is not None and norm > self.settings.clip:
            self.parameters.gradient.mul_(self.settings.clip / norm)
        for group in self.muon:
            self._muon(group, factor)
        for group in self.adamw:
            self._adamw(group, number, factor)
        self.parameters.gradient.zero_()
        self.parameters.publish()

    def _muon(self, group: Group, factor: float) -> None:
        settings = self.settings
        weight, gradient, momentum = (
            group.view(flat) for flat in (self.parameters.master, self.parameters.gradient, self.moments["first"])
        )
        momentum.lerp_(gradient, 1 - settings.momentum)
        update = orthogonalize(gradient.lerp_(momentum, settings.momentum), self.dtype).to(weight.dtype)
        lr = settings.matrix_lr * factor
        # Tall matrices get longer steps, so that the update's effect on the output has the same size for every shape.
        stretch = max(1.0, weight.shape[1] / weight.shape[2]) ** 0.5
        weight.mul_(1 - lr * settings.weight_decay).add_(update, alpha=-lr * stretch)

    def _adamw(self, group: Group, number: int, factor: float) -> None:
        settings = self.settings
        part, second = slice(group.start, group.stop), slice(group.start - self.offset, group.stop - self.offset)
        adamw(
            [self.parameters.master[part]],
            [self.parameters.gradient[part]],
            [self.moments["first"][part]],
            [self.moments["second"][second]],
            [],
            [torch.tensor(float(number), device=self.parameters.master.device)],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=settings.peak(group.role) * factor,
            weight_decay=settings.weight_decay if group.role == "matrix" else 0.0,
            eps=settings.eps,
        )
