"""The GPT families: GPT-2, GPT-Neo (GPT-3's shape) and GPT-NeoX, with LayerNorm, biases and field names of their own each."""

from dataclasses import replace
from typing import Any

from ownlm.models.decoder import DecoderConfig
from ownlm.models.families.decoders import HEADS, LAYERS, WIDTH, windows
from ownlm.models.families.fields import HF_NAMES, Fields
from ownlm.models.names import Table, To
from ownlm.models.specs import Attention, FeedForward, Layer, Norm


def gpt(
    fields: Fields,
    *,
    width: str,
    layers: str,
    heads: str,
    inner: str,
    context: str,
    activation: str,
    eps: str,
    default: str = "gelu_new",
    **others: Any,
) -> DecoderConfig:
    """LayerNorm, learned positions and biases, under each family's own field names."""
    fields.only(quantization_config=None)
    hidden_size, num_heads = fields.count(width, 768), fields.count(heads, 12, at_most=HEADS)
    if hidden_size % num_heads:
        fields.faults.append(f"{width} {hidden_size} is not a multiple of {heads} {num_heads}")
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=max(1, hidden_size // num_heads),
        **({"bias": True, "output_bias": True} | others),
    )
    norm = Norm(kind="layer", eps=fields.number(eps, 1e-5))
    mlp = FeedForward(
        size=fields.count(inner, 4 * hidden_size, at_most=WIDTH),
        activation=fields.activation(activation, default),
        gated=False,
        bias=True,
    )
    layer = Layer(attention=attention, mlp=mlp, norm=norm)
    return DecoderConfig(
        vocab_size=fields.count("vocab_size", 50_257),
        hidden_size=hidden_size,
        max_tokens=fields.count(context, 1024),
        layers=(layer,) * fields.count(layers, 12, at_most=LAYERS),
        norm=norm,
        learned_positions=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def read_gpt2(fields: Fields) -> DecoderConfig:
    fields.only(add_cross_attention=False, scale_attn_by_inverse_layer_idx=False)
    return gpt(
        fields,
        width="n_embd",
        layers="n_layer",
        heads="n_head",
        inner="n_inner",
        context="n_positions",
        activation="activation_function",
        eps="layer_norm_epsilon",
        scale=None if fields.flag("scale_attn_weights", True) else 1.0,
    )


def write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    layer = config.layers[0]
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_tokens,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": layer.attention.num_heads,
        "n_inner": layer.mlp.size,
        "activation_function": HF_NAMES[layer.mlp.activation],
        "layer_norm_epsilon": config.norm.eps,
        "scale_attn_weights": layer.attention.scale is None,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def gpt2_names(config: DecoderConfig) -> Table:
    """Its linear layers are Conv1D: kept as [in, out], with q, k and v in one."""
    block, attn = "transformer.h.{}.", "layers.{}.self_attn."
    return {
        "embed_tokens": "transformer.wte",
        "embed_positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "layers.{}.input_layernorm": f"{block}ln_1",
        "layers.{}.post_attention_layernorm": f"{block}ln_2",
        (f"{attn}q_proj", f"{attn}k_proj", f"{attn}v_proj"): To(f"{block}attn.c_attn", "transposed"),
        f"{attn}o_proj": To(f"{block}attn.c_proj", "transposed"),
        "layers.{}.mlp.up_proj": To(f"{block}mlp.c_fc", "transposed"),
        "layers.{}.mlp.down_proj": To(f"{block}mlp.c_proj", "transposed"),
    }


def read_gpt_neo(fields: Fields) -> DecoderConfig:
    """GPT-3's shape: dense and locally banded attention in turn (arXiv:2005.14165, 2.1). No scale, and no bias on q, k and v."""
    config = gpt(
        fields,
        width="hidden_size",
        layers="num_layers",
        heads="num_heads",
        inner="intermediate_size",
        context="max_position_embeddings",
        activation="activation_function",
        eps="layer_norm_epsilon",
        scale=1.0,
        bias=False,
    )
    kinds: list[str] = []
    try:
        for names, times in fields.config.get("attention_types") or [[["global", "local"], config.num_layers // 2]]:
            kinds += [{"global": "full_attention", "local": "sliding_attention"}[name] for name in names] * times
    except (TypeError, ValueError, KeyError):
        kinds = []
    if len(kinds) != config.num_layers:
        fields.faults.append(f"attention_types must name {config.num_layers} layers as global or local")
        return config
    return windows(fields, config, fields.window("window_size", 256), kinds)


def gpt_neo_names(config: DecoderConfig) -> Table:
    block = "transformer.h.{}."
    return {
        "embed_tokens": "transformer.wte",
        "embed_positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "layers.{}.input_layernorm": f"{block}ln_1",
        "layers.{}.post_attention_layernorm": f"{block}ln_2",
        "layers.{}.self_attn": f"{block}attn.attention",
        "layers.{}.self_attn.o_proj": f"{block}attn.attention.out_proj",
        "layers.{}.mlp.up_proj": f"{block}mlp.c_fc",
        "layers.{}.mlp.down_proj": f"{block}mlp.c_proj",
    }


def read_gpt_neox(fields: Fields) -> DecoderConfig:
    """Pythia and GPT-NeoX-20B: rotary on a quarter of each head, branches in parallel on a norm each."""
    bias = fields.flag("attention_bias", True)
    config = gpt(
        fields,
        width="hidden_size",
        layers="num_hidden_layers",
        heads="num_attention_heads",
        inner="intermediate_size",
        context="max_position_embeddings",
        activation="hidden_act",
        eps="layer_norm_eps",
        default="gelu",
        bias=bias,
        output_bias=bias,
    )
    theta, fraction = fields.number("rotary_emb_base", 10_000.0), fields.number("rotary_pct", 0.25)
    head_dim = config.layers[0].attention.head_dim
    rotary = fields.rotary(theta, head_dim=head_dim, fraction=fraction, max_tokens=config.max_tokens)
    residual: Any = "parallel" if fields.flag("use_parallel_residual", True) else "sequential"
    layers = tuple(replace(layer, rotary=rotary, residual=residual) for layer in config.layers)
    tied = fields.flag("tie_word_embeddings", False)
    return replace(config, layers=layers, learned_positions=False, tie_embeddings=tied)


def gpt_neox_names(config: DecoderConfig) -> Table:
    block, attn = "gpt_neox.layers.{}.", "layers.{}.self_attn."
    heads = config.layers[0].attention.num_heads
    return {
        "embed_tokens": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        "layers.{}": "gpt_neox.layers.{}",
        (f"{attn}q_proj", f"{attn}k_proj", f"{attn}v_proj"): To(f"{block}attention.query_key_value", "by_head", heads),
        f"{attn}o_proj": f"{block}attention.dense",
        "layers.{}.mlp.up_proj": f"{block}mlp.dense_h_to_4h",
        "layers.{}.mlp.down_proj": f"{block}mlp.dense_4h_to_h",
    }
