"""A model -> what `ownlm.gguf.write` takes: keys, and tensors that are laid out and quantised one at a time while it writes.

What llama.cpp would compute otherwise is never exported in silence: the keys are read back, and a config that came back different
is refused, with what differs.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ownlm import gguf
from ownlm.checkpoints.gguf.architectures import ARCHITECTURES, Keys, meaning
from ownlm.checkpoints.gguf.keys import Config, encoder_keys, extra_tensors, write
from ownlm.errors import UserError
from ownlm.formats.ggml_encode import quantize
from ownlm.models.decoder import Decoder, DecoderConfig
from ownlm.models.encoder import Encoder, EncoderConfig
from ownlm.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from ownlm.models.families import FAMILIES
from ownlm.models.names import Stored, nameless, stored_tensors
from ownlm.models.rotary import attention_factor, frequencies
from ownlm.models.specs import Layer, LongRope, Rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Which types a file is made of, as llama.cpp mixes them: `code` tells its users, `matrices` is the type of most, `finer` of
    those that bear rounding worst (values and the way down, in half of the layers), `head` of the matrix before the logits."""

    code: int
    matrices: str
    finer: str
    head: str


QUANTIZATIONS: dict[str, Quantization] = {
    "F32": Quantization(code=0, matrices="F32", finer="F32", head="F32"),
    "F16": Quantization(code=1, matrices="F16", finer="F16", head="F16"),
    "BF16": Quantization(code=32, matrices="BF16", finer="BF16", head="BF16"),
    "Q8_0": Quantization(code=7, matrices="Q8_0", finer="Q8_0", head="Q8_0"),
    "Q6_K": Quantization(code=18, matrices="Q6_K", finer="Q6_K", head="Q6_K"),
    "Q5_K": Quantization(code=17, matrices="Q5_K", finer="Q6_K", head="Q6_K"),
    "Q4_K": Quantization(code=15, matrices="Q4_K", finer="Q6_K", head="Q6_K"),
    "Q4_0": Quantization(code=2, matrices="Q4_0", finer="Q4_0", head="Q6_K"),
}
# Where rows aren't whole blocks of the first, the second.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q8_0", "Q6_K": "Q8_0", "Q4_0": "F16", "Q5_0": "F16", "Q8_0": "F16"}
# Small, and llama.cpp adds or looks them up in F32.
WHOLE = re.compile(
    r".*(\.bias|ffn_gate_inp\.weight|position_embd\.weight|token_types\.weight|_norm\.weight|attn_sinks\.weight|attn_rel_b\.weight)"
)
SENSITIVE = re.compile(r"(?:enc\.|dec\.)?blk\.(\d+)\.(attn_v|attn_qkv|ffn_down|ffn_down_exps)\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A model in llama.cpp's words. `notes` are sentences about what will differ there."""

    architecture: str
    metadata: dict[str, gguf.Value]
    tensors: list[gguf.TensorSource]
    notes: tuple[str, ...]


def describe(model: Decoder | Encoder | EncoderDecoder, quantization: Quantization) -> Described:
    """The model as `gguf.write` takes it. Raises UserError when llama.cpp has no architecture that computes it."""
    body, ours, left = _body(model)
    name, config, notes = choose(body, ours, model.hf)
    architecture = ARCHITECTURES[name]
    sources = []
    for stored in stored_tensors(architecture.names(config), ours):
        shape = stored.shape(ours)
        type = type_of(stored.name, shape, quantization, config)
        pieces = partial(_pieces, stored, type, ours)
        sources.append(gguf.TensorSource(name=stored.name, type=type, shape=shape, pieces=pieces))
    if architecture.head and _tied(config):
        embedding = next(source for source in sources if source.name == "token_embd.weight")
        sources.insert(1, replace(embedding, name="output.weight"))
    for extra, tensor in extra_tensors(config).items():
        stored = Stored(extra, ((extra, None),))
        pieces = partial(_pieces, stored, "F32", {extra: tensor})
        sources.append(gguf.TensorSource(name=extra, type="F32", shape=tuple(tensor.shape), pieces=pieces))
    metadata = write(config, name)
    if isinstance(model, Encoder):
        metadata |= encoder_keys(model.config, model.pooling)
    return Described(architecture=name, metadata=metadata, tensors=sources, notes=(*left, *notes))


def _body(model: Decoder | Encoder | EncoderDecoder) -> tuple[Config, dict[str, Tensor], tuple[str, ...]]:
    """What llama.cpp has a place for: of an encoder not its heads, which it has no use for, and of RoBERTa's positions those that real
    tokens have. Its first rows are for padding, and texts have none there. What T5 scales before its head goes into the norm there."""
    ours: dict[str, Tensor] = dict(model.named_parameters())
    config = model.config
    if isinstance(config, EncoderDecoderConfig):
        scaled = ours | {"norm.weight": ours["norm.weight"].float() * config.logit_scale}
        return replace(config, logit_scale=1.0), scaled, ()
    if not isinstance(config, EncoderConfig):
        return config, ours, ()
    kept = {
        name: tensor for name, tensor in ours.items() if not name.startswith(("head.", "pooler.", "next_sentence."))
    }
    left = ("llama.cpp uses encoders to embed texts: the heads are left out.",) if len(kept) < len(ours) else ()
    kept["embed_positions.weight"] = kept["embed_positions.weight"][config.first_position :]
    return replace(config, head=None, pooler=False, next_sentence=False, first_position=0), kept, left


def _tied(config: Config) -> bool:
    return not isinstance(config, EncoderConfig) and config.tie_embeddings


def _pieces(stored: Stored, type: str, ours: Mapping[str, Tensor]) -> Iterator[NDArray[np.uint8]]:
    for piece in quantize(type, stored.pack(ours), where=stored.name):
        yield piece.numpy()


def type_of(name: str, shape: tuple[int, ...], quantization: Quantization, config: Config) -> str:
    """The type a tensor is stored in."""
    if len(shape) == 1 or WHOLE.fullmatch(name):
        return "F32"
    head = name == "output.weight" or (name == "token_embd.weight" and _tied(config))
    sensitive = SENSITIVE.fullmatch(name)
    type = quantization.head if head else quantization.matrices
    if sensitive:
        layers = config.layers
        if isinstance(config, EncoderDecoderConfig) and name.startswith("enc."):
            layers = config.encoder
        layer, eighth = int(sensitive[1]), len(layers) // 8
        outer = layer < eighth or layer >= 7 * len(layers) // 8
        type = quantization.finer if outer or (layer - eighth) % 3 == 2 else type
    while shape[-1] % gguf.LAYOUTS[type].block:
        type = FALLBACK[type]
    return type


def choose(
    config: Config, ours: Mapping[str, Tensor], hf: Mapping[str, Any] | None
) -> tuple[str, Config, tuple[str, ...]]:
    """(architecture, the config that it holds, sentences about what differs): the first that computes the same, that of the
    model's family before others. UserError when there is none."""
    kind = "" if hf is None else hf["model_type"]
    native = NATIVE.get(kind, kind)
    order = sorted(ARCHITECTURES, key=lambda name: name != native)
    short = _without_windows(config)
    attempts = {name: _differences(name, config, ours) for name in order}
    for name in order:
        architecture = ARCHITECTURES[name]
        notes = (f"llama.cpp computes {architecture.differs} in {name} models.",) if architecture.differs else ()
        if not attempts[name] and (architecture.windows or short == config):
            return name, config, notes
        if short != config and not architecture.windows and not _differences(name, short, ours):
            told = f"llama.cpp has no windows in {name} models: the file's context ends where they begin, at {short.max_tokens}."
            return name, short, (*notes, told)
    nearest = native if native in ARCHITECTURES else min(order, key=lambda name: len(attempts[name]))
    told = "; ".join(attempts[nearest][:5]) + (
        f" (and {len(attempts[nearest]) - 5} more)" if len(attempts[nearest]) > 5 else ""
    )
    raise UserError(
        f"llama.cpp has no architecture that computes this model. The nearest is {nearest}, but {told}.",
        where="GGUF",
        cure="Export it as a Hugging Face directory.",
    )


def _without_windows(config: Config) -> Config:
    """The same model for texts no longer than its shortest window, which then changes nothing."""
    windows = [layer.attention.window for layer in config.layers if layer.attention.window]
    layers = tuple(replace(layer, attention=replace(layer.attention, window=None)) for layer in config.layers)
    return replace(config, layers=layers, max_tokens=min([config.max_tokens, *windows]))


def _differences(name: str, config: Config, ours: Mapping[str, Tensor]) -> list[str]:
    """What an architecture would compute otherwise: nothing if the config survives being written and read."""
    architecture = ARCHITECTURES[name]
    table = architecture.names(config)
    if lost := nameless(table, ours):
        return [f"{len(lost)} tensors such as {lost[0]} have no place"]
    a = config.layers[0].attention
    if architecture.square and a.num_heads * a.head_dim != config.hidden_size:
        return [f"the heads are {a.num_heads * a.head_dim} wide together, there {config.hidden_size}"]
    infos = {stored.name: gguf.TensorInfo("F32", stored.shape(ours), 0, 0) for stored in stored_tensors(table, ours)}
    if architecture.head:
        infos.setdefault("output.weight", infos["token_embd.weight"])
    small = extra_tensors(config)
    infos |= {extra: gguf.TensorInfo("F32", tuple(tensor.shape), 0, 0) for extra, tensor in small.items()}
    metadata: dict[str, gguf.Value] = {"general.architecture": name, **write(config, name)}
    try:
        keys = Keys(gguf.File(Path("GGUF"), metadata, infos), small)
        _, read, _ = meaning(keys)
    except UserError as fault:
        return [fault.what.rstrip(".")]
    if architecture.head and isinstance(config, DecoderConfig):
        read = replace(read, tie_embeddings=config.tie_embeddings)
    return list(dict.fromkeys(_compare(config, read, "")))


def _compare(ours: Any, theirs: Any, where: str) -> Iterator[str]:
    """Sentences about fields that differ; numbers as far as a float32 tells them, rotations by their frequencies."""
    if isinstance(ours, Layer) and isinstance(theirs, Layer):
        if not _same_turns(ours, theirs):
            yield f"positions turn by {ours.rotary}, there by {theirs.rotary}"
        ours, theirs = replace(ours, rotary=None), replace(theirs, rotary=None)
    if is_dataclass(ours) and type(ours) is type(theirs):
        for field in fields(ours):
            yield from _compare(getattr(ours, field.name), getattr(theirs, field.name), f"{where} {field.name}")
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for one, other in zip(ours, theirs, strict=True):
            yield from _compare(one, other, where)
    elif isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-6):
        return
    elif ours != theirs:
        yield f"{where.strip()} is {ours}, there {theirs}"


def _same_turns(one: Layer, other: Layer) -> bool:
    a, b = _turns(one), _turns(other)
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(a, b, strict=True))


def _turns(layer: Layer) -> list[float]:
    rotary: Rotary | None = layer.rotary
    if rotary is None:
        return []
    head_dim, scaling = layer.attention.head_dim, rotary.scaling
    short, long = (frequencies(rotary, head_dim, long=flag).tolist() for flag in (False, True))
    border = scaling.original_max_tokens if isinstance(scaling, LongRope) and short != long else 0
    return [*short, *long, attention_factor(rotary), float(border)]


# The architecture made for a family, where they don't share a name.
NATIVE = {
    "mistral": "llama", "mixtral": "llama", "gpt_neo": "gpt2", "gpt_neox": "gptneox", "phi": "phi2", "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss", "grok-1": "grok", "qwen3_moe": "qwen3moe", "roberta": "bert", "xlm-roberta": "bert",
    "camembert": "bert", "distilbert": "bert", "mt5": "t5",
}  # fmt: skip

assert set(NATIVE) <= set(FAMILIES)
assert set(NATIVE.values()) <= set(ARCHITECTURES)
