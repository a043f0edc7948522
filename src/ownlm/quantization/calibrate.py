"""A decoder into codes, layer by layer: what is quantised already is what the next layer's inputs are made with.

    int8   every matrix of the layers, the head and the embedding
    int4   the same; an embedding that is no head stays in int8, for its rows are looked up and not summed over
    fp8    as int4

Encoders and encoder-decoders are rounded to the nearest (`quantize_rest`). Norms, biases, routers, learned positions and heads of
labels stay as they are. Of calibration text only the hidden states at one depth are in memory,
and one layer's H for each of its inputs.

Shapes: N rows of text, B rows of a batch, T tokens, D hidden, I inputs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from ownlm.models.blocks import Block, MoE, Stack, Step, gated
from ownlm.models.decoder import Decoder
from ownlm.models.encoder import Encoder
from ownlm.models.encoder_decoder import EncoderDecoder
from ownlm.quantization.codes import Codes, Scheme, linears, quantize, quantized
from ownlm.quantization.gptq import Moments, gptq

BATCH_TOKENS = 8192
# Layers that read the same input, in the order in which a block runs them.
SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
Quantizable: TypeAlias = Decoder | Encoder | EncoderDecoder
Progress = Callable[[int, int], None]  # layers done, layers in all; the head counts as one


def quantizable(model: Any) -> TypeGuard[Quantizable]:
    """Decoders that write, encoders with any head or none, encoder-decoders."""
    return isinstance(model, Encoder | EncoderDecoder) or (isinstance(model, Decoder) and model.task is None)


def matrices(model: Quantizable) -> list[str]:
    """The modules that become codes; routers don't, for the choice among experts is not worth a rounding error, and neither do heads
    with a few labels."""
    if not isinstance(model, Decoder):
        head = isinstance(model, EncoderDecoder) and model.lm_head is not None
        return ["embed_tokens", *linears(model), *(["lm_head"] if head else [])]
    blocks = [(f"layers.{index}", block) for index, block in enumerate(model.layers)]
    inside = [
        f"{name}.{part}"
        for name, block in blocks
        for part, module in block.named_modules()
        if isinstance(block, Block)
        and (
            part == "mlp.experts"
            if isinstance(block.mlp, MoE) and part.startswith("mlp.")
            else hasattr(module, "in_features")
        )
    ]
    return ["embed_tokens", *inside, *(["lm_head"] if model.lm_head is not None else [])]


def quantize_decoder(
    model: Decoder, to: Scheme, rows_NT: Tensor | None = None, progress: Progress = lambda done, all: None
) -> None:
    """Put quantised layers in place of the model's own: by `rows_NT`, token ids of calibration text, or to the nearest without."""
    assert model.task is None, "only decoders with a head over the vocabulary"
    model.requires_grad_(False)
    with torch.no_grad():
        if rows_NT is None:
            _to_the_nearest(model, to, progress)
        else:
            _calibrated(model, to, rows_NT, progress)


def quantize_rest(model: Encoder | EncoderDecoder, to: Scheme, progress: Progress = lambda done, all: None) -> None:
    """`quantize_decoder` for the other kinds, to the nearest values."""
    table_is_head = model.task == "masked_lm" if isinstance(model, Encoder) else model.lm_head is None
    model.requires_grad_(False)
    names = matrices(model)
    for done, name in enumerate(names):
        scheme = "int8" if name == "embed_tokens" and not table_is_head else to
        _replace(model, name, lambda weight, _, scheme=scheme: quantize(weight, scheme))
        progress(done + 1, len(names))


def _to_the_nearest(model: Decoder, to: Scheme, progress: Progress) -> None:
    for done, block in enumerate(model.layers):
        assert isinstance(block, Block)
        for names in SHARED_INPUTS:
            for name in _present(block, names):
                _replace(block, name, lambda weight, _: quantize(weight, to))
        if isinstance(block.mlp, MoE):
            _replace(block, "mlp.experts", lambda weight, _: quantize(weight, to))
        progress(done + 1, model.config.num_layers + 1)
    if model.lm_head is not None:
        _replace(model, "lm_head", lambda weight, _: quantize(weight, to))
    _replace(model, "embed_tokens", lambda weight, _: quantize(weight, to if model.lm_head is None else "int8"))
    progress(model.config.num_layers + 1, model.config.num_layers + 1)


def _calibrated(model: Decoder, to: Scheme, rows_NT: Tensor, progress: Progress) -> None:
    batches = torch.split(rows_NT, max(1, BATCH_TOKENS // rows_NT.shape[1]))
    if model.lm_head is not None:  # else its codes are the head's, which come last
        _replace(model, "embed_tokens", lambda weight, _: quantize(weight, "int8"))
    begun = [model.begin(tokens_BT) for tokens_BT in batches]
    hidden, step = [x_BTD for x_BTD, _ in begun], begun[0][1]
    for done, block in enumerate(model.layers):
        assert isinstance(block, Block)
        _layer(block, hidden, step, to)
        for index, x_BTD in enumerate(hidden):
            hidden[index] = block(x_BTD, step)
        progress(done + 1, model.config.num_layers + 1)
    moments = Moments(model.config.hidden_size)
    for x_BTD in hidden:
        moments.add(model.head_input(model.norm(x_BTD)))
    head = "embed_tokens" if model.lm_head is None else "lm_head"
    _replace(model, head, lambda weight, _: gptq(weight, moments.inverse_factor(), to))
    progress(model.config.num_layers + 1, model.config.num_layers + 1)


def _present(block: Block, names: Sequence[str]) -> list[str]:
    held = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return [name for name in names if name in held]


def _replace(model: nn.Module, name: str, make: Any) -> None:
    model.set_submodule(name, quantized(model.get_submodule(name), make))


def _layer(block: Block, hidden: Sequence[Tensor], step: Step, to: Scheme) -> None:
    """Quantise a block by what its layers are given as long as it is whole: one pass over the text for all of them."""
    shared = [present for names in SHARED_INPUTS if (present := _present(block, names))]
    seen: list[Moments] = []
    hooks = []
    for names in shared:
        layer = block.get_submodule(names[0])
        assert isinstance(layer, nn.Linear), names
        seen.append(Moments(layer.in_features))
        hooks.append(layer.register_forward_pre_hook(lambda _, inputs, into=seen[-1]: into.add(inputs[0])))
    watched = None
    if isinstance(block.mlp, MoE):
        assert isinstance(block.mlp.experts, Stack)
        watched = _Watched(block.mlp.experts, block.mlp.experts_spec.count)
        block.mlp.experts = watched  # type: ignore[assignment]
    for x_BTD in hidden:
        block(x_BTD, step)
    for hook in hooks:
        hook.remove()
    for names, moments in zip(shared, seen, strict=True):
        factor_II = moments.inverse_factor()
        for name in names:
            _replace(block, name, lambda weight, _, u=factor_II: gptq(weight, u, to))
    if watched is not None:
        block.set_submodule("mlp.experts", watched.stack)
        _replace(block, "mlp.experts", partial(watched.codes, to))


class _Watched(nn.Module):
    """Experts that note what their two inputs are: (E,) of the first, (E,) of the one between."""

    def __init__(self, stack: Stack, count: int) -> None:
        super().__init__()
        self.stack = stack
        shapes = {name: tensor.shape for name, tensor in stack.named_parameters()}
        self.outer = [Moments(shapes["gate_proj"][-1]) for _ in range(count)]
        self.inner = [Moments(shapes["down_proj"][-1]) for _ in range(count)]

    def forward(self, x_ND: Tensor, expert: int) -> Tensor:
        stack = self.stack
        self.outer[expert].add(x_ND)
        inner = gated(stack.linear(x_ND, "gate_proj", expert), stack.linear(x_ND, "up_proj", expert), stack.spec)
        self.inner[expert].add(inner)
        return stack.linear(inner, "down_proj", expert)

    def codes(self, to: Scheme, weight_EOI: Tensor, name: str) -> Codes:
        """Each expert's, for the tokens that came to it."""
        moments = self.inner if name == "down_proj" else self.outer
        each = [gptq(weight, seen.inverse_factor(), to) for weight, seen in zip(weight_EOI, moments, strict=True)]
        codes, scales = (torch.stack(parts) for parts in zip(*((one.codes, one.scales) for one in each), strict=True))
        return Codes(to, codes, scales, weight_EOI.shape[-1])
