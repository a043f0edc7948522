"""What llama.cpp calls our tensors, and how it lays them out: one table for each of its architectures.

Source: llama.cpp, gguf-py/gguf/constants.py (the names), conversion/ (what is turned around on the way).
"""

from ownlm.models.decoder import DecoderConfig
from ownlm.models.encoder import EncoderConfig
from ownlm.models.names import Table, To

ATTENTION, FEED = "layers.{}.self_attn.", "layers.{}.mlp."
COMMON: Table = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "layers.{}.input_layernorm": "blk.{}.attn_norm",
    "layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    f"{ATTENTION}q_proj": "blk.{}.attn_q",
    f"{ATTENTION}k_proj": "blk.{}.attn_k",
    f"{ATTENTION}v_proj": "blk.{}.attn_v",
    f"{ATTENTION}o_proj": "blk.{}.attn_output",
    f"{ATTENTION}q_norm": "blk.{}.attn_q_norm",
    f"{ATTENTION}k_norm": "blk.{}.attn_k_norm",
    f"{FEED}gate_proj": "blk.{}.ffn_gate",
    f"{FEED}up_proj": "blk.{}.ffn_up",
    f"{FEED}down_proj": "blk.{}.ffn_down",
    f"{FEED}gate": "blk.{}.ffn_gate_inp",
    **{f"{FEED}experts.{part}_proj": f"blk.{{}}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")},
    **{f"{FEED}experts.{part}_proj_bias": f"blk.{{}}.ffn_{part}_exps.bias" for part in ("gate", "up", "down")},
}
FUSED: Table = {(f"{ATTENTION}q_proj", f"{ATTENTION}k_proj", f"{ATTENTION}v_proj"): "blk.{}.attn_qkv"}


def common(config: DecoderConfig) -> Table:
    return COMMON


def fused(config: DecoderConfig) -> Table:
    apart = {f"{ATTENTION}{part}_proj" for part in "qkv"}
    return {**{key: value for key, value in COMMON.items() if key not in apart}, **FUSED}


def llama(config: DecoderConfig) -> Table:
    a = config.layers[0].attention
    q, k = To("blk.{}.attn_q", "pairs", a.num_heads), To("blk.{}.attn_k", "pairs", a.num_kv_heads)
    return {**COMMON, f"{ATTENTION}q_proj": q, f"{ATTENTION}k_proj": k}


def gpt2(config: DecoderConfig) -> Table:
    return {**fused(config), "embed_positions": "position_embd"}


def phi(config: DecoderConfig) -> Table:
    return {**COMMON, "lm_head_bias": "output.bias"}


def phi3(config: DecoderConfig) -> Table:
    pair = (f"{FEED}gate_proj", f"{FEED}up_proj")
    return {**{key: value for key, value in fused(config).items() if key not in pair}, pair: "blk.{}.ffn_up"}


def gemma(config: DecoderConfig) -> Table:
    """Norms as they multiply; ours are kept as weight - 1."""
    names = {
        "norm": "output_norm",
        "layers.{}.input_layernorm": "blk.{}.attn_norm",
        "layers.{}.attention_norm": "blk.{}.post_attention_norm",
        "layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
        "layers.{}.mlp_norm": "blk.{}.post_ffw_norm",
        f"{ATTENTION}q_norm": "blk.{}.attn_q_norm",
        f"{ATTENTION}k_norm": "blk.{}.attn_k_norm",
    }
    table: Table = {ours: To(stored, "plus_one") for ours, stored in names.items()}
    return {**COMMON, **table}


def gpt_oss(config: DecoderConfig) -> Table:
    return {
        **COMMON,
        "layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
        f"{ATTENTION}sinks": "blk.{}.attn_sinks.weight",
    }


def grok(config: DecoderConfig) -> Table:
    return {
        **COMMON,
        "layers.{}.attention_norm": "blk.{}.attn_output_norm",
        "layers.{}.mlp_norm": "blk.{}.layer_output_norm",
    }


def bert(config: EncoderConfig) -> Table:
    """The body of an encoder: llama.cpp has no place for its pooler and heads."""
    same = (f"{ATTENTION}q_proj", f"{ATTENTION}k_proj", f"{ATTENTION}v_proj", f"{ATTENTION}o_proj")
    return {
        **{name: COMMON[name] for name in ("embed_tokens", *same, f"{FEED}up_proj", f"{FEED}down_proj")},
        "embed_positions": "position_embd",
        "embed_types": "token_types",
        "embed_norm": "token_embd_norm",
        "layers.{}.attention_norm": "blk.{}.attn_output_norm",
        "layers.{}.mlp_norm": "blk.{}.layer_output_norm",
    }
