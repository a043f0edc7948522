"""A decoder on the native kernels: its weights packed once, every step one call.

    NativeDecoder(model, "int8") ── cache(pages) ──► PagedCache ── step(rows of token, sequence, position) ──► logits

Every `DecoderConfig` runs: what a layer is, is told to the C++ by the same frozen data that builds the PyTorch modules. Weights are
float32, bf16, integers in groups of 32 inputs, or fp8 (quantization/codes.py); activations meet integers as int8 with a scale per
group, fp8 as bf16. Norms, softmax and sums are float32. Keys and values are kept in bf16, in float32 for float32 weights, or as asked:
int8 has a scale for each position and head, half the memory of bf16.

Shapes: R rows, W wanted rows, V vocabulary, D hidden size, S sequences.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ownlm import device
from ownlm.errors import UserError
from ownlm.kernels import library as lib
from ownlm.kernels.sources import (
    CODINGS,
    Kind,
    Weight,
    addresses,
    by_row,
    default_kind,
    last_apart,
    pieces,
    together,
    weight_of,
)
from ownlm.models.blocks import MLP, Block, MoE, RMSNorm
from ownlm.models.decoder import Decoder, DecoderConfig
from ownlm.models.rotary import attention_factor, frequencies, is_long, rotated_dims, rotation
from ownlm.models.specs import LongRope, Rotary
from ownlm.quantization.codes import Quantized

if TYPE_CHECKING:
    from ownlm.kernels.adapters import NativeAdapter

KINDS: dict[Kind, int] = {"f32": 0, "bf16": 1, "int8": 2, "int4": 3, "uint4": 4, "fp8": 5}
KV = Literal["f32", "bf16", "int8"]  # of keys and values
PAGE = 32  # positions
GROUP = 32  # inputs that share a scale
LANES = 16  # heads are padded to a multiple of it
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")
NORMS = ("before", "after", "around")
RESIDUALS = ("sequential", "parallel", "shared")
VECTORS = {
    "input_layernorm": 0,
    "attention_norm": 1,
    "post_attention_layernorm": 2,
    "mlp_norm": 3,
    "q_norm": 4,
    "k_norm": 5,
}
SINKS, FINAL_NORM, POSITIONS = 6, 7, 8
QKV, OUT, ROUTER, UP, DOWN, EMBED, HEAD, VALUE = range(8)


def unsupported(model: nn.Module) -> str | None:
    """Why this model can't run on the kernels here, or None where it can."""
    if lib.library() is None:
        return lib.missing()
    if not isinstance(model, Decoder) or model.head is not None:
        return "only decoders with a head over the vocabulary run on the kernels"
    if model.device.type not in ("cpu", "meta"):  # meta: its weights are still in their file
        return "the model is not on the CPU"
    for module in model.modules():
        if isinstance(module, Quantized):
            if module.scheme not in KINDS:
                return f"layers in {module.scheme} compute for themselves"
        elif type(module) is not nn.Linear and hasattr(module, "in_features"):
            return "adapted layers compute for themselves"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one step, int32 each: `pages_SP` are the page numbers of each sequence, `wanted_R` marks the rows whose logits are
    asked for, `long_R` those whose text is beyond the original context of a LongRope; `embeds_RD` stands in for embeddings.
    The last `partial` rows go through `layers` only: those that begin after the first layer go on from where the step before
    left them. None of them may be wanted before the last layer.
    `adapter_R` says which of `adapters` a row is computed with, -1: none; None: none for all."""

    token_R: NDArray[np.int32]
    sequence_R: NDArray[np.int32]
    position_R: NDArray[np.int32]
    wanted_R: NDArray[np.int32]
    long_R: NDArray[np.int32]
    pages_SP: NDArray[np.int32]
    embeds_RD: NDArray[np.float32] | None = None
    partial: int = 0
    layers: range = range(0)
    adapter_R: NDArray[np.int32] | None = None
    adapters: "Sequence[NativeAdapter]" = ()


class NativeDecoder:
    """The packed weights of a decoder, whose modules are not needed afterwards. For one step at a time."""

    def __init__(
        self,
        model: Decoder,
        kind: Kind | None = None,
        *,
        max_tokens: int | None = None,
        instruction_set: str | None = None,
        lend: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        """`kind`: of the weights; by default bf16 for a model in it, else float32. What is in codes already is packed as it is, what
        is beside codes as bf16. `lend`: gives a part of the model its weights for as long as it is packed (unread.py).
        Raises UserError without memory."""
        found = lib.library()
        assert found is not None, "ask `unsupported` first"
        self.config, self._lib, self.kind = model.config, found, kind or default_kind(model)
        self._numbers: Kind = "bf16" if kind is None and self.kind in CODINGS else self.kind
        self.max_tokens = min(max_tokens or model.config.max_tokens, model.config.max_tokens)
        self.instruction_set = instruction_set or lib.instruction_set()
        _, self.head_dim = model.config.kv_shape
        self.padded_head = -(-self.head_dim // LANES) * LANES
        self.padded_vocab = -(-model.config.vocab_size // LANES) * LANES
        rotaries = list(dict.fromkeys(layer.rotary for layer in model.config.layers if layer.rotary is not None))
        spec = _model_spec(model.config, len(rotaries), self.padded_head, self.kind != "f32")
        threads = device.threads(torch.get_num_threads())
        self._handle = ctypes.c_void_p(found.ownlm_new(ctypes.byref(spec), self.instruction_set.encode(), threads))
        if not self._handle:
            raise no_memory()
        for index, rotary in enumerate(rotaries):
            self._rotary(index, rotary)
        with torch.no_grad():
            with lend("") if lend else nullcontext():
                self._whole(model)
            for index, block in enumerate(model.layers):
                assert isinstance(block, Block)
                with lend(f"layers.{index}") if lend else nullcontext():
                    self._layer(index, block, rotaries)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._lib.ownlm_delete(self._handle)

    @property
    def memory_bytes(self) -> int:
        """What the packed weights take."""
        return int(self._lib.ownlm_bytes(self._handle))

    def cache(self, pages: int, kv: KV | None = None) -> "PagedCache":
        """Room for `pages` pages of PAGE positions; what is never written takes no memory."""
        return PagedCache(self, pages, kv or self.default_kv)

    @property
    def default_kv(self) -> KV:
        return "f32" if self.kind == "f32" else "bf16"

    def page_bytes(self, kv: KV | None = None) -> int:
        """Keys and values of one page, all layers."""
        kv_heads, _ = self.config.kv_shape
        of_a_position = {"f32": 4 * self.padded_head, "bf16": 2 * self.padded_head, "int8": self.padded_head + 2}
        return 2 * self.config.num_layers * kv_heads * PAGE * of_a_position[kv or self.default_kv]

    def step(self, cache: "PagedCache", batch: Batch) -> Tensor:
        """logits_WV of the wanted rows, float32. Keys and values go into the cache."""
        logits_WV = torch.empty(int(batch.wanted_R.sum()), self.padded_vocab)
        arrays = [batch.token_R, batch.sequence_R, batch.position_R, batch.wanted_R, batch.long_R]
        assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in (*arrays, batch.pages_SP))
        adapters = (ctypes.c_void_p * len(batch.adapters))(*(adapter.handle.value for adapter in batch.adapters))
        rows = lib.Rows(
            len(batch.token_R),
            batch.pages_SP.shape[1],
            batch.partial,
            batch.layers.start,
            batch.layers.stop,
            *(array.ctypes.data for array in arrays),
            None if batch.embeds_RD is None else batch.embeds_RD.ctypes.data,
            batch.pages_SP.ctypes.data,
            logits_WV.data_ptr(),
            None if batch.adapter_R is None else batch.adapter_R.ctypes.data,
            ctypes.addressof(adapters),
            len(batch.adapters),
        )
        if self._lib.ownlm_step(self._handle, cache.handle, ctypes.byref(rows)):
            raise no_memory()
        return logits_WV[:, : self.config.vocab_size]

    # ---- packing

    def _whole(self, model: Decoder) -> None:
        table: Kind = "int8" if self._numbers in CODINGS and not model.config.tie_embeddings else self._numbers
        bias = model.lm_head_bias
        self._matrix(0, EMBED, [weight_of(model.embed_tokens)], bias=None if bias is None else [bias], kind=table)
        if model.lm_head is None:
            self._lib.ownlm_tie(self._handle)
        else:
            self._matrix(0, HEAD, [weight_of(model.lm_head)], bias=_biases(model.lm_head))
        if isinstance(model.norm, RMSNorm | nn.LayerNorm):
            self._norm(0, FINAL_NORM, model.norm)
        if model.embed_positions is not None:
            self._vector(0, POSITIONS, model.embed_positions.weight)

    def _layer(self, index: int, block: Block, rotaries: Sequence[Rotary]) -> None:
        layer, attention, mlp = block.layer, block.self_attn, block.mlp
        a, f = layer.attention, layer.mlp
        experts = f.experts
        spec = lib.LayerSpec(
            a.num_heads,
            a.num_kv_heads,
            a.head_dim,
            a.window or 0,
            -1 if layer.rotary is None else rotaries.index(layer.rotary),
            attention.scale,
            a.softcap or 0.0,
            NORMS.index(layer.norms),
            RESIDUALS.index(layer.residual),
            ACTIVATIONS.index(f.activation),
            f.gated,
            0 if experts is None else experts.count,
            0 if experts is None else experts.per_token,
            experts is not None and experts.renormalise,
            layer.norm.kind == "layer",
            f.limit or 0.0,
            f.up_offset,
            layer.norm.eps,
        )
        self._lib.ownlm_layer(self._handle, index, ctypes.byref(spec))
        for name, slot in VECTORS.items():
            norm = getattr(block if slot < 4 else attention, name)
            if norm is not None:
                self._norm(index, slot, norm)
        if attention.sinks is not None:
            self._vector(index, SINKS, attention.sinks)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        heads = [by_row(weight_of(projection), self.by_head) for projection in projections]
        biases = [self.by_head(layer.bias[:, None])[:, 0] for layer in projections] if a.bias else []
        joined = 2 if last_apart(heads) else 3
        self._matrix(index, QKV, heads[:joined], bias=biases[:joined] or None)
        if joined == 2:
            self._matrix(index, VALUE, heads[2:], bias=biases[2:] or None)
        self._out(index, attention.o_proj)
        if isinstance(mlp, MLP):
            up = [layer for layer in (mlp.gate_proj, mlp.up_proj) if layer is not None]
            self._matrix(
                index, UP, [weight_of(layer) for layer in up], bias=[layer.bias for layer in up] if f.bias else None
            )
            self._matrix(index, DOWN, [weight_of(mlp.down_proj)], bias=_biases(mlp.down_proj))
        else:
            assert isinstance(mlp, MoE)
            self._experts(index, mlp)

    def _experts(self, index: int, mlp: MoE) -> None:
        # The choice among experts is not worth a rounding error.
        kind: Kind = "f32" if self.kind == "f32" else "bf16"
        self._matrix(index, ROUTER, [mlp.gate.weight], bias=_biases(mlp.gate), kind=kind)
        stack: Any = mlp.experts
        gate, up, down = (weight_of(getattr(stack, name)) for name in ("gate_proj", "up_proj", "down_proj"))
        for expert in range(mlp.experts_spec.count):
            bias = [stack.gate_proj_bias[expert], stack.up_proj_bias[expert]] if stack.spec.bias else None
            self._matrix(index, UP, [gate[expert], up[expert]], expert=expert, bias=bias)
            bias = [stack.down_proj_bias[expert]] if stack.spec.bias else None
            self._matrix(index, DOWN, [down[expert]], expert=expert, bias=bias)

    def _out(self, index: int, o_proj: nn.Module) -> None:
        weight, kind = weight_of(o_proj), self._numbers
        if self.padded_head != self.head_dim:
            if not isinstance(weight, Tensor):
                # The padding of heads moves inputs into other groups, whose scales no codes fit.
                weight, kind = weight.tensor(), "bf16"
            weight = self.by_head(weight.T).T
        self._matrix(index, OUT, [weight], bias=_biases(o_proj), kind=kind)

    def by_head(self, weight_OI: Tensor) -> Tensor:
        """Each head's outputs, padded with zeros to whole lanes."""
        if self.padded_head == self.head_dim:
            return weight_OI
        by_head = weight_OI.reshape(-1, self.head_dim, weight_OI.shape[1])
        return F.pad(by_head, (0, 0, 0, self.padded_head - self.head_dim)).flatten(0, 1)

    def _matrix(
        self,
        layer: int,
        slot: int,
        parts: Sequence[Weight],
        *,
        expert: int = 0,
        bias: Sequence[Tensor] | None = None,
        kind: Kind | None = None,
    ) -> None:
        rows, columns = sum(len(part) for part in parts), parts[0].shape[1]
        parts, kind = together(parts, kind or self._numbers)
        whole = None if bias is None else torch.cat([part.float() for part in bias]).contiguous()
        address = None if whole is None else whole.data_ptr()
        if self._lib.ownlm_matrix(self._handle, layer, slot, expert, KINDS[kind], rows, columns, address):
            raise no_memory()
        first = 0
        for part in parts:
            for count, source, tensors in pieces(part):
                self._lib.ownlm_pack(self._handle, layer, slot, expert, first, count, source, *addresses(tensors))
                first += count

    def _norm(self, layer: int, slot: int, norm: nn.Module) -> None:
        assert isinstance(norm, RMSNorm | nn.LayerNorm), norm
        weight = norm.weight + norm.offset if isinstance(norm, RMSNorm) else norm.weight
        self._vector(layer, slot, weight, getattr(norm, "bias", None), norm.eps, isinstance(norm, nn.LayerNorm))

    def _vector(
        self, layer: int, slot: int, values: Tensor, bias: Tensor | None = None, eps: float = 0.0, centred: bool = False
    ) -> None:
        values = values.detach().float().contiguous()
        bias = None if bias is None else bias.detach().float().contiguous()
        address = None if bias is None else bias.data_ptr()
        self._lib.ownlm_vector(self._handle, layer, slot, values.numel(), values.data_ptr(), address, eps, centred)

    def _rotary(self, index: int, rotary: Rotary) -> None:
        half = rotated_dims(rotary, self.head_dim) // 2
        positions = torch.arange(self.max_tokens)

        def turns(long: bool) -> list[Tensor]:
            cos, sin = rotation(
                frequencies(rotary, self.head_dim, long=long), positions, torch.float32, attention_factor(rotary)
            )
            return [cos[:, 0, :half].contiguous(), sin[:, 0, half:].contiguous()]

        tables = turns(False) + (turns(True) if isinstance(rotary.scaling, LongRope) else [])
        addresses = [table.data_ptr() for table in tables] + [None] * (4 - len(tables))
        self._lib.ownlm_rotary(self._handle, index, half, self.max_tokens, *addresses)


class PagedCache:
    """Keys and values of a NativeDecoder, in pages."""

    def __init__(self, decoder: NativeDecoder, pages: int, kv: KV) -> None:
        self.decoder, self.pages, self.kv = decoder, pages, kv
        self.handle = ctypes.c_void_p(decoder._lib.ownlm_cache_new(decoder._handle, KINDS[kv], pages))
        if not self.handle:
            raise no_memory()

    def copy(self, page: int, onto: int) -> None:
        """Make one page hold what another does."""
        assert 0 <= page < self.pages > onto >= 0, f"{page}, {onto} of {self.pages} pages"
        self.decoder._lib.ownlm_cache_copy(self.handle, page, onto)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.decoder._lib.ownlm_cache_delete(self.handle)


def packed_bytes(model: Decoder) -> int:
    """About what the packed weights of a model take: as much as they take now, embeddings that are also the head once."""
    held = (*model.parameters(), *model.buffers())  # codes are buffers
    return sum(tensor.nbytes for tensor in held)


def _model_spec(config: DecoderConfig, rotaries: int, padded_head: int, bf16: bool) -> lib.ModelSpec:
    kv_heads, _ = config.kv_shape
    scale = float(torch.tensor(config.embed_scale, dtype=torch.bfloat16)) if bf16 else config.embed_scale
    return lib.ModelSpec(
        config.hidden_size,
        config.num_layers,
        padded_head,
        rotaries,
        kv_heads,
        scale,
        config.logit_scale,
        config.logit_softcap or 0.0,
    )


def _biases(linear: Any) -> list[Tensor] | None:
    return None if linear.bias is None else [linear.bias]


def no_memory() -> UserError:
    return UserError(
        "there is not enough memory for the model's packed weights or its cache.",
        cure="Use a smaller context or fewer slots.",
    )


def text_logits(native: NativeDecoder, tokens_T: Tensor, kv: KV | None = None) -> Tensor:
    """(T, V) of a whole text, from its beginning."""
    count = len(tokens_T)
    pages = -(-count // PAGE)
    zeros, ones = np.zeros(count, np.int32), np.ones(count, np.int32)
    long = any(is_long(layer.rotary, count) for layer in native.config.layers if layer.rotary is not None)
    batch = Batch(
        token_R=tokens_T.numpy().astype(np.int32),
        sequence_R=zeros,
        position_R=np.arange(count, dtype=np.int32),
        wanted_R=ones,
        long_R=ones * long,
        pages_SP=np.arange(pages, dtype=np.int32)[None],
    )
    return native.step(native.cache(pages, kv), batch)
