"""Our config -> the keys of a GGUF file, and the small tensors that say how positions turn.

Every number is told once, under llama.cpp's key; an architecture reads those that it knows. Source: llama.cpp, src/models/.
"""

import math
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ownlm import gguf
from ownlm.models.decoder import DecoderConfig
from ownlm.models.encoder import EncoderConfig
from ownlm.models.encoder_decoder import EncoderDecoderConfig
from ownlm.models.heads import Pooling, PoolingKind
from ownlm.models.rotary import frequencies, rotated_dims
from ownlm.models.specs import LinearScaling, Llama3Scaling, LongRope, Rotary, YarnScaling

DIVISORS = "rope_freqs.weight"  # of Llama 3's frequencies
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # of LongRope's
Config: TypeAlias = DecoderConfig | EncoderConfig | EncoderDecoderConfig
POOLINGS: dict[PoolingKind, int] = {"mean": 1, "cls": 2, "last": 3}


def divisors_of(rotary: Rotary, head_dim: int) -> list[float]:
    """What each frequency is divided by."""
    plain = Rotary(theta=rotary.theta, fraction=rotary.fraction)
    return [float(n) for n in frequencies(plain, head_dim) / frequencies(rotary, head_dim)]


def write(config: Config, architecture: str) -> dict[str, gguf.Value]:
    """Every key that llama.cpp may ask for."""
    match config:
        case EncoderConfig():
            told = _encoder(config)
        case EncoderDecoderConfig():
            told = _encoder_decoder(config)
        case _:
            told = _decoder(config, architecture)
    layer = config.layers[0]
    told |= {
        "vocab_size": config.vocab_size,
        "context_length": config.max_tokens,
        "embedding_length": config.hidden_size,
        "feed_forward_length": layer.mlp.size,
        "attention.head_count": layer.attention.num_heads,
    }
    return {f"{architecture}.{key}": _typed(value) for key, value in told.items() if value is not None}


def encoder_keys(config: EncoderConfig, pooling: Pooling | None) -> dict[str, gguf.Value]:
    """What else llama.cpp asks of an encoder: rows of its table of token types, and how a text's vector is made, if told."""
    types = max(1, config.token_types)  # llama.cpp wants at least one named, also where there is no table (DistilBERT)
    told: dict[str, gguf.Value] = {"tokenizer.ggml.token_type_count": np.uint32(types)}
    return told if pooling is None else told | {"bert.pooling_type": np.uint32(POOLINGS[pooling.kind])}


def _encoder(config: EncoderConfig) -> dict[str, Any]:
    return {
        "block_count": config.num_layers,
        "attention.layer_norm_epsilon": config.norm.eps,
        "attention.causal": False,
    }


def _encoder_decoder(config: EncoderDecoderConfig) -> dict[str, Any]:
    layer = config.layers[0]
    return {
        "block_count": len(config.encoder),
        "decoder_block_count": config.num_layers,
        "attention.key_length": layer.attention.head_dim,
        "attention.value_length": layer.attention.head_dim,
        "attention.layer_norm_epsilon": config.norm.eps,  # llama.cpp's own files have both
        "attention.layer_norm_rms_epsilon": config.norm.eps,
        "attention.relative_buckets_count": config.buckets,
        "decoder_start_token_id": config.start_token,
    }


def _decoder(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    layer = config.layers[0]
    a, mlp, window = layer.attention, layer.mlp, [layer.attention.window for layer in config.layers]
    local = next((layer.rotary for layer in config.layers if layer.attention.window), layer.rotary)
    rotary = next((layer.rotary for layer in config.layers if not layer.attention.window), layer.rotary)
    told: dict[str, Any] = {
        "block_count": config.num_layers,
        "attention.head_count_kv": a.num_kv_heads,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        f"attention.layer_norm{'_rms' if config.norm.kind == 'rms' else ''}_epsilon": config.norm.eps,
        "attention.sliding_window": max((w for w in window if w), default=None),
        "attention.sliding_window_pattern": [bool(w) for w in window] if any(window) and not all(window) else None,
        "attn_logit_softcapping": a.softcap,
        "final_logit_softcapping": config.logit_softcap,
        "use_parallel_residual": layer.residual == "parallel",
    }
    if mlp.experts is not None:
        told |= {"expert_count": mlp.experts.count, "expert_used_count": mlp.experts.per_token}
        told |= {"expert_feed_forward_length": mlp.size}
    if architecture == "grok":
        told |= {"attention.output_scale": a.scale, "embedding_scale": config.embed_scale}
        told |= {"logit_scale": config.logit_scale}
    if rotary is not None:
        told |= {"rope.dimension_count": rotated_dims(rotary, a.head_dim), "rope.freq_base": rotary.theta}
        told |= {"rope.freq_base_swa": local.theta} if local is not None and local != rotary else {}
        told |= _scaling(rotary)
    return told


def _scaling(rotary: Rotary) -> dict[str, Any]:
    scaling = rotary.scaling
    if isinstance(scaling, LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        own = scaling.attention_factor / (0.1 * math.log(max(scaling.factor, 1.0)) + 1.0)
        told = {"rope.scaling.type": "yarn", "rope.scaling.factor": scaling.factor}
        told |= {"rope.scaling.original_context_length": scaling.original_max_tokens}
        return told | ({} if math.isclose(own, 1.0, rel_tol=1e-6) else {"rope.scaling.attn_factor": own})
    if isinstance(scaling, LongRope):
        told = {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": scaling.attention_factor}
        return told | {"rope.scaling.original_context_length": scaling.original_max_tokens}
    return {}


def _typed(value: int | float | bool | str | list[bool]) -> gguf.Value:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, list):
        return np.array(value)
    return np.uint32(value) if isinstance(value, int) else np.float32(value) if isinstance(value, float) else value


def extra_tensors(config: Config) -> dict[str, Tensor]:
    """The tensors that say how positions turn."""
    rotary, head_dim = config.layers[0].rotary, config.layers[0].attention.head_dim
    scaling = None if rotary is None else rotary.scaling
    if rotary is not None and isinstance(scaling, Llama3Scaling):
        return {DIVISORS: torch.tensor(divisors_of(rotary, head_dim))}
    if isinstance(scaling, LongRope):
        return {LONG: torch.tensor(scaling.long), SHORT: torch.tensor(scaling.short)}
    return {}
