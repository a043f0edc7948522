"""Shapes of our own: the config.json under which a decoder that came without one is saved.

One that a family of transformers has is told in that family's fields, so that other libraries load it; any other is written down
whole, as the model_type "ownlm".
"""

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ownlm.models.decoder import DecoderConfig, uniform
from ownlm.models.families.decoders import GPT2_FIELDS, LLAMA
from ownlm.models.families.fields import HF_NAMES, Fields
from ownlm.models.specs import Attention, FeedForward, LinearScaling, Llama3Scaling, Rotary

OWN = LLAMA | {"lm_head_bias": "lm_head_bias", "embed_positions": "model.embed_positions"}
WRITTEN = ("qwen3", "llama", "gpt2")  # the families under whose names we save


def read_own(fields: Fields) -> DecoderConfig:
    """A shape that no other library knows: the fields of `DecoderConfig` themselves, under "decoder"."""
    raw = fields.config.get("decoder")
    try:
        config: DecoderConfig = TypeAdapter(DecoderConfig).validate_python(raw)
    except ValidationError as error:
        fields.faults += [f"decoder.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        attention, mlp = Attention(num_heads=1, num_kv_heads=1, head_dim=1), FeedForward(size=1)
        return uniform(num_layers=1, attention=attention, mlp=mlp, vocab_size=1, hidden_size=1, max_tokens=1)
    if TypeAdapter(DecoderConfig).dump_python(config, mode="json") != raw:
        fields.faults.append("decoder has fields that this version of ownlm doesn't write")
    return config


def write(config: DecoderConfig, kind: str) -> dict[str, Any]:
    """Its fields as the family `kind` tells them. Read back they give another config if that family has no such shape."""
    if kind == "ownlm":
        return {"decoder": TypeAdapter(DecoderConfig).dump_python(config, mode="json")}
    layer = config.layers[0]
    a = layer.attention
    told: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": layer.mlp.size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": a.num_heads,
        "hidden_act": HF_NAMES[layer.mlp.activation],
        "max_position_embeddings": config.max_tokens,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if kind == "gpt2":
        told |= {"layer_norm_eps": config.norm.eps, "scale_attn_weights": a.scale is None}
        told |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        return {GPT2_FIELDS.get(name, name): value for name, value in told.items()}
    told |= {"num_key_value_heads": a.num_kv_heads, "head_dim": a.head_dim, "rms_norm_eps": config.norm.eps}
    told |= {"attention_bias": a.bias, "attention_dropout": 0.0}
    told |= {} if kind == "qwen3" else {"mlp_bias": layer.mlp.bias}
    return told | _rope(layer.rotary or Rotary())


def _rope(rotary: Rotary) -> dict[str, Any]:
    """Both schemas: llama.cpp, vLLM and transformers 4 read the older one."""
    scaling, told = rotary.scaling, dict[str, Any](rope_type="default")
    if isinstance(scaling, LinearScaling | Llama3Scaling):
        theirs = {"kind": "rope_type", "original_max_tokens": "original_max_position_embeddings"}
        told = {theirs.get(name, name): value for name, value in asdict(scaling).items()}
    new = {"rope_theta": rotary.theta} | told
    return {"rope_parameters": new, "rope_theta": rotary.theta, "rope_scaling": None if scaling is None else told}
