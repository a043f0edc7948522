"""GGUF files whose matrices are blocks of any type, also of those that nobody here writes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import torch
from gguf_cases import CASES
from numpy.typing import NDArray

from ownlm import gguf
from ownlm.checkpoints.gguf.write import QUANTIZATIONS, describe
from ownlm.formats.ggml_encode import ENCODERS, quantize
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.train.fresh import init_weights

# Widths of whole blocks of 256, heads of whole lanes.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NARROW = WIDE | {"hidden_size": 96, "intermediate_size": 160}  # heads of 24, which the kernels pad
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}  # where a block's half-precision numbers stand
PLAIN = ("ffn_gate_inp", "position_embd", "norm")


def model(name: str, **changes: Any) -> Decoder:
    """Weights of usual size, so that little roundings don't grow."""
    hf = {key: value for key, value in CASES[name][1].items() if key != "head_dim"} | changes
    config, family = from_hf(hf)
    made = family.build(config, hf)
    assert isinstance(made, Decoder)
    return init_weights(made, zero_output=False).eval()


def sized(name: str, sizes: dict[str, Any]) -> Decoder:
    """`model` of these sizes, as the family spells them."""
    if name == "gpt2":
        return model(name, n_embd=sizes["hidden_size"], n_head=4, n_layer=2)
    layers = {"layer_types": ["full_attention", "sliding_attention"]} if name in ("gpt-oss", "gemma3") else {}
    heads = {"query_pre_attn_scalar": 256} if name == "gemma3" else {}
    return model(name, **sizes, **layers, **heads)


def blocks(type: str, numbers: torch.Tensor, seed: int = 0) -> NDArray[np.uint8]:
    """The numbers as blocks, or, of types without an encoder, bytes by chance with scales of a usual size."""
    if type in ENCODERS:
        return np.concatenate([piece.numpy().reshape(-1) for piece in quantize(type, numbers)])
    if type not in HALVES:
        rows = numbers.reshape(-1, numbers.shape[-1]).numpy()
        return reference.quantize(rows, reference.GGMLQuantizationType[type]).reshape(-1)
    layout, random = gguf.LAYOUTS[type], np.random.default_rng(seed)
    raw = random.integers(0, 256, (numbers.numel() // layout.block, layout.size), np.uint8)
    for at in HALVES[type]:
        unit = {"Q2_K": 2e-3, "Q3_K": 2e-4, "IQ4_NL": 1e-3, "IQ4_XS": 4e-5}[type]
        raw[:, at : at + 2] = random.uniform(0.5 * unit, unit, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(-1)


def write(path: Path, of: Decoder, type_of: Callable[[str], str], **more: gguf.Value) -> None:
    """`type_of` is asked for each matrix by its name in the file; norms, routers and positions stay float32."""
    described = describe(of, QUANTIZATIONS["F32"])
    sources = []
    for at, source in enumerate(described.tensors):
        type = type_of(source.name)
        if len(source.shape) < 2 or any(part in source.name for part in PLAIN):
            type = "F32"
        numbers = torch.from_numpy(np.concatenate([piece.reshape(-1) for piece in source.pieces()])).view(torch.float32)
        raw = blocks(type, numbers.view(source.shape), at)

        def pieces(raw: NDArray[np.uint8] = raw) -> Iterator[NDArray[np.uint8]]:
            yield raw

        sources.append(gguf.TensorSource(name=source.name, type=type, shape=source.shape, pieces=pieces))
    gguf.write(path, {"general.architecture": described.architecture, **described.metadata, **more}, sources)
