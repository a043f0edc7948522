"""Linear layers on the kernels, one at a time: for models whose steps are PyTorch's, encoders and encoder-decoders.

    accelerate(model) ─► each QuantizedLinear, and a table that is also the head, has a `product`: y = x W' + b
                         each MLP of such layers has one too: y = down(act(gate(x)) * up(x)), what stands between never leaving the cores

A decoder's whole step is native (native.py). Here PyTorch does all but the products with weights in integers, which meet
activations in int8 with a scale for every 32 of them, or in fp8, which meet bf16, by the same code as in decoders. Others are left to
PyTorch.

PyTorch's threads go on spinning for some milliseconds after each of its operations, on the cores that ours need. So the cores are
divided: within a block PyTorch has half of them, and the kernels the rest.

Shapes: O outputs, I inputs.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ownlm import device
from ownlm.errors import UserError
from ownlm.kernels import library as lib
from ownlm.kernels.native import ACTIVATIONS, KINDS, LANES
from ownlm.kernels.sources import CODES, addresses
from ownlm.models.blocks import MLP, Block
from ownlm.quantization.codes import Codes, QuantizedEmbedding, QuantizedLinear


class Product:
    """x W' + b for (…, I) of any floating dtype, which is also the answer's. The codes are packed and not needed afterwards."""

    def __init__(self, kept: Codes, bias: Tensor | None = None, *, instruction_set: str | None = None) -> None:
        """Raises UserError without memory."""
        found = lib.library()
        assert found is not None, lib.missing()
        assert kept.scheme in KINDS, kept.scheme
        self._lib, self.outputs = found, kept.codes.shape[-2]
        self.padded = -(-self.outputs // LANES) * LANES
        tensors = [tensor.contiguous() for tensor in kept.tensors().values()]
        added = None if bias is None else bias.detach().float().contiguous()
        self.handle = ctypes.c_void_p(
            found.ownlm_linear_new(
                (instruction_set or lib.instruction_set()).encode(),
                teams()[1],
                KINDS[kept.scheme],
                self.outputs,
                kept.columns,
                CODES,
                *addresses(tensors),
                None if added is None else added.data_ptr(),
            )
        )
        if not self.handle:
            raise _no_memory()

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._lib.ownlm_linear_delete(self.handle)

    def __deepcopy__(self, memo: Any) -> "Product":
        return self  # it never changes

    @property
    def memory_bytes(self) -> int:
        return int(self._lib.ownlm_linear_bytes(self.handle))

    def __call__(self, x: Tensor) -> Tensor:
        return self.fill(x, lambda count, source, target: self._lib.ownlm_linear(self.handle, count, source, target))

    def fill(self, x: Tensor, compute: Callable[[int, int, int], int]) -> Tensor:
        """(…, O) that `compute` makes of the rows of x: it is given their number and both addresses, and fails with 1."""
        rows = x.float().reshape(-1, x.shape[-1]).contiguous()
        y = torch.empty(len(rows), self.padded)
        if len(rows) and compute(len(rows), rows.data_ptr(), y.data_ptr()):
            raise _no_memory()
        return y[:, : self.outputs].reshape(*x.shape[:-1], self.outputs).to(x.dtype)


class FeedForward:
    """An MLP's whole product, for `MLP.product`. None where the MLP has other layers by now, adapted ones for instance."""

    def __init__(self, gate: Product | None, up: Product, down: Product, mlp: MLP) -> None:
        self.gate, self.up, self.down, self.layers = gate, up, down, _layers(mlp)
        self.spec = (ACTIVATIONS.index(mlp.spec.activation), mlp.spec.limit or 0.0, mlp.spec.up_offset)

    def __deepcopy__(self, memo: Any) -> "FeedForward":
        return self

    def __call__(self, mlp: MLP, x: Tensor) -> Tensor | None:
        if any(now is not then for now, then in zip(_layers(mlp), self.layers, strict=True)):
            return None
        found, gate = lib.library(), None if self.gate is None else self.gate.handle
        assert found is not None
        return self.down.fill(
            x, lambda *rows: found.ownlm_feed_forward(gate, self.up.handle, self.down.handle, *self.spec, *rows)
        )


def _layers(mlp: MLP) -> tuple[nn.Module | None, ...]:
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def accelerate(model: nn.Module) -> bool:
    """Let the kernels multiply for the model's layers in codes, in inference on the CPU. False where there are no kernels."""
    if lib.library() is None:
        return False
    all_threads, (theirs, _) = torch.get_num_threads(), teams()
    products: dict[nn.Module | None, Product] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.scheme in KINDS:
            products[module] = module.product = Product(module.kept, module.bias)
        elif isinstance(module, Block):
            module.register_forward_pre_hook(lambda *_: torch.set_num_threads(theirs))
            module.register_forward_hook(lambda *_: torch.set_num_threads(all_threads), always_call=True)
    for module in model.modules():
        if isinstance(module, MLP) and all(layer is None or layer in products for layer in _layers(module)):
            gate, up, down = _layers(module)
            module.product = FeedForward(products.get(gate), products[up], products[down], module)
    # A table is multiplied only where it is also the head, whose bias the model adds.
    table, head = getattr(model, "embed_tokens", None), getattr(model, "lm_head", None)
    if isinstance(table, QuantizedEmbedding) and head is None and hasattr(model, "head_input"):
        table.product = Product(table.kept)
    return True


def teams() -> tuple[int, int]:
    """The threads of PyTorch within a block, and of the kernels; the calling one is in both."""
    threads = device.threads(torch.get_num_threads())
    theirs = max(1, threads // 2)
    return theirs, threads - theirs + 1


def _no_memory() -> UserError:
    return UserError("there is not enough memory for the packed weights of a layer, or for what it gives.")
