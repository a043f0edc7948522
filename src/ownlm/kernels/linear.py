"""Linear layers on the kernels, one at a time: for models whose steps are PyTorch's, encoders and encoder-decoders.

    accelerate(model) ─► each QuantizedLinear, and a table that is also the head, has a `product`: y = x W' + b

A decoder's whole step is native (native.py). Here PyTorch does all but the products with weights in int8 or int4, which meet
activations in int8 with a scale for every 32 of them, by the same code as in decoders. Weights in floats are left to PyTorch.

PyTorch's threads go on spinning for some milliseconds after each of its operations, on the cores that ours need. So the cores are
divided: within a block PyTorch has half of them, and the kernels the rest.

Shapes: O outputs, I inputs.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from ownlm import device
from ownlm.errors import UserError
from ownlm.kernels import library as lib
from ownlm.kernels.native import KINDS, LANES
from ownlm.models.blocks import Block
from ownlm.models.quantize import Codes, QuantizedEmbedding, QuantizedLinear

CODES = 2  # a source of `ownlm_linear_new`


class Product:
    """x W' + b for (…, I) of any floating dtype, which is also the answer's. The codes are packed and not needed afterwards."""

    def __init__(self, kept: Codes, bias: Tensor | None = None, *, instruction_set: str | None = None) -> None:
        """Raises UserError without memory."""
        found = lib.library()
        assert found is not None, lib.missing()
        assert kept.scheme in KINDS, kept.scheme
        self._lib, self.outputs = found, kept.codes.shape[-2]
        self.padded = -(-self.outputs // LANES) * LANES
        codes, scales = kept.codes.contiguous(), kept.scales.contiguous()
        added = None if bias is None else bias.detach().float().contiguous()
        self._handle = ctypes.c_void_p(
            found.ownlm_linear_new(
                (instruction_set or lib.instruction_set()).encode(),
                teams()[1],
                KINDS[kept.scheme],
                self.outputs,
                kept.columns,
                CODES,
                codes.data_ptr(),
                scales.data_ptr(),
                None if added is None else added.data_ptr(),
            )
        )
        if not self._handle:
            raise _no_memory()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._lib.ownlm_linear_delete(self._handle)

    def __deepcopy__(self, memo: Any) -> "Product":
        return self  # it never changes

    @property
    def memory_bytes(self) -> int:
        return int(self._lib.ownlm_linear_bytes(self._handle))

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.float().reshape(-1, x.shape[-1]).contiguous()
        y = torch.empty(len(rows), self.padded)
        if len(rows) and self._lib.ownlm_linear(self._handle, len(rows), rows.data_ptr(), y.data_ptr()):
            raise _no_memory()
        return y[:, : self.outputs].reshape(*x.shape[:-1], self.outputs).to(x.dtype)


def accelerate(model: nn.Module) -> bool:
    """Let the kernels multiply for the model's layers in int8 and int4, in inference on the CPU. False where there are no kernels."""
    if lib.library() is None:
        return False
    all_threads, (theirs, _) = torch.get_num_threads(), teams()
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.scheme in KINDS:
            module.product = Product(module.kept, module.bias)
        elif isinstance(module, Block):
            module.register_forward_pre_hook(lambda *_: torch.set_num_threads(theirs))
            module.register_forward_hook(lambda *_: torch.set_num_threads(all_threads), always_call=True)
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
