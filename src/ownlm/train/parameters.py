"""The parameters of a model as one flat vector each of fp32 weights, gradients and moments.

    flat:   | q_proj 0 | q_proj 1 | ... | up_proj 0 | up_proj 1 | ... | embed_tokens | lm_head | norms and biases |
    group:  |      (L, rows, cols)      |      (L, rows, cols)        |    adamw     |  adamw  |      adamw       |

Matrices of equal shape lie side by side, so the stack that batched Muon wants is a view and costs no copy; the norm of
the gradient, the cast to bf16 and AdamW are a few calls over long vectors instead of a few per tensor; and a saved state
is a handful of tensors. When the model computes in bf16, its tensors are views of a bf16 copy, written once a step.
"""

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

Role = Literal["matrix", "embedding", "head", "vector"]
ORDER: tuple[Role, ...] = ("matrix", "embedding", "head", "vector")
VECTORS = (
    "bias",
    "_bias.weight",
    ".segments",
)  # one vector for each head or bucket: added to something, never multiplied


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors that are updated together: flat[start:stop], which is `shape` = (count, rows, columns) for matrices."""

    role: Role
    start: int
    stop: int
    shape: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.stop].view(self.shape)


def role(name: str, parameter: Tensor) -> Role:
    """What a parameter is, from its name and shape: the optimizer treats each role in its own way."""
    if parameter.ndim < 2 or name.endswith(VECTORS):
        return "vector"
    if "embed" in name or name.endswith("positions.weight"):
        return "embedding"
    return "head" if "lm_head" in name else "matrix"


class Parameters:
    """A model's parameters, moved into flat buffers. Changes with every step.

    master (fp32): the weights. gradient (fp32): their summed gradients. The model's own tensors are views of `compute`, which is
    `master` itself in fp32 and a bf16 copy of it otherwise; their .grad are views of `compute_gradient`. What needs no
    gradient is none of them: it is only cast to the dtype of the computation.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def key(name: str) -> tuple[int, tuple[int, ...]]:
            kind = role(name, named[name])
            return ORDER.index(kind), tuple(named[name].shape) if kind == "matrix" else ()

        for frozen in model.parameters():
            if not frozen.requires_grad:
                frozen.data = frozen.data.to(dtype)
        device = next(iter(named.values())).device
        total = sum(p.numel() for p in named.values())
        self.master = torch.empty(total, dtype=torch.float32, device=device)
        self.gradient = torch.zeros_like(self.master)
        same = dtype == torch.float32
        self.compute = self.master if same else torch.empty_like(self.master, dtype=dtype)
        self.compute_gradient = self.gradient if same else torch.zeros_like(self.compute)
        self.places: dict[str, tuple[int, int]] = {}
        groups: list[Group] = []
        start = 0
        # Sorting is stable: within a group the layers stay in order.
        for (kind, shape), members in groupby(sorted(named, key=key), key):
            names = list(members)
            sizes = [named[name].numel() for name in names]
            # The experts of a layer are a stack already.
            full = (len(names) * math.prod(shape[:-2]), *shape[-2:]) if shape else (sum(sizes),)
            groups.append(Group(role=ORDER[kind], start=start, stop=start + sum(sizes), shape=full))
            for name, size in zip(names, sizes, strict=True):
                parameter, end = named[name], start + size
                self.places[name] = start, end
                self.master[start:end].copy_(parameter.detach().flatten())
                parameter.data = self.compute[start:end].view(parameter.shape)
                parameter.grad = self.compute_gradient[start:end].view(parameter.shape)
                start = end
        self.groups = tuple(groups)
        self.publish()

    def publish(self) -> None:
        """Write the master weights into the model: the one cast of a step."""
        if self.compute is not self.master:
            self.compute.copy_(self.master)

    def collect(self) -> None:
        """Add the micro-batch's gradients to the fp32 sum, so that accumulation loses nothing to bf16."""
        if self.compute_gradient is not self.gradient:
            self.gradient.add_(self.compute_gradient)
            self.compute_gradient.zero_()

    def norm(self) -> float:
        """The Euclidean norm of the whole gradient."""
        return float(torch.linalg.vector_norm(self.gradient))

    def release(self, model: nn.Module) -> None:
        """Give the model its fp32 weights, without gradients: training is over. Frozen ones stay as rounded as they were."""
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if name in self.places:
                start, stop = self.places[name]
                parameter.data = self.master[start:stop].view(parameter.shape)
            else:
                parameter.data = parameter.data.float()
