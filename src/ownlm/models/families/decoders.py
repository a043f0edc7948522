"""The decoder families of Llama's line: Llama, Mistral, Mixtral, Qwen, Phi, Gemma, GPT-OSS, Grok (gpt.py has the GPTs).

Each is a function from config.json to `DecoderConfig` and a table of names; what they share is written once.
"""

from dataclasses import replace
from typing import Any

from ownlm.models.decoder import DecoderConfig
from ownlm.models.families.fields import HF_NAMES, Fields
from ownlm.models.families.heads import kind_of, task_head
from ownlm.models.names import Table, To
from ownlm.models.specs import Attention, Experts, FeedForward, Layer, LinearScaling, Llama3Scaling, Norm, Rotary

HEADS, LAYERS, WIDTH = 2**14, 4096, 2**26  # no checkpoint comes near these


def llama(
    fields: Fields,
    *,
    head_dim: int | None = None,
    theta: float = 10_000.0,
    activation: str = "hidden_act",
    default_activation: str = "silu",
    eps: float = 1e-6,
    **attention: Any,
) -> DecoderConfig:
    """The shape of Llama, from the field names that most decoders share; `attention` are further fields of its spec."""
    fields.only(quantization_config=None)
    hidden_size, heads = fields.count("hidden_size"), fields.count("num_attention_heads", at_most=HEADS)
    head_dim = fields.count("head_dim", head_dim or max(1, hidden_size // heads), at_most=HEADS)
    max_tokens = fields.count("max_position_embeddings", 2048)
    norm = Norm(eps=fields.number("rms_norm_eps", eps))
    bias = fields.flag("attention_bias", False)
    spec = Attention(
        num_heads=heads,
        num_kv_heads=fields.count("num_key_value_heads", heads, at_most=HEADS),
        head_dim=head_dim,
        **({"bias": bias, "output_bias": bias} | attention),
    )
    mlp = FeedForward(
        size=fields.count("intermediate_size", at_most=WIDTH),
        activation=fields.activation(activation, default_activation),
        bias=fields.flag("mlp_bias", False),
    )
    rotary = fields.rotary(theta, head_dim=head_dim, max_tokens=max_tokens)
    layer = Layer(attention=spec, mlp=mlp, norm=norm, rotary=rotary)
    return DecoderConfig(
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        max_tokens=max_tokens,
        layers=(layer,) * fields.count("num_hidden_layers", at_most=LAYERS),
        norm=norm,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def each(config: DecoderConfig, **mlp: Any) -> DecoderConfig:
    """The same with changes to the feed-forward spec of every layer."""
    return replace(config, layers=tuple(replace(layer, mlp=replace(layer.mlp, **mlp)) for layer in config.layers))


def with_task(fields: Fields, config: DecoderConfig) -> DecoderConfig:
    """The same, with the head that the class of the file names if it is one for whole texts or for each token."""
    kind = kind_of(fields.config)
    if kind == "SequenceClassification":
        return replace(config, head=task_head(fields, "sequence", reads="last", bias=False))
    return replace(config, head=task_head(fields, "token")) if kind == "TokenClassification" else config


def windows(fields: Fields, config: DecoderConfig, window: int | None, kinds: list[str]) -> DecoderConfig:
    """The same with a window in the layers of kind "sliding_attention"."""
    layers = (
        replace(layer, attention=replace(layer.attention, window=window)) if kind == "sliding_attention" else layer
        for layer, kind in zip(config.layers, kinds, strict=True)
    )
    return replace(config, layers=tuple(layers))


def llama_names(config: DecoderConfig) -> Table:
    """Our own names, under "model."."""
    return {"embed_tokens": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "lm_head": "lm_head"}


# ── Llama, Mistral, Mixtral, Qwen ────────────────────────────────────────────────────────────────────────────────────


def read_llama(fields: Fields) -> DecoderConfig:
    return llama(fields)


def read_mistral(fields: Fields) -> DecoderConfig:
    config = llama(fields)
    return windows(fields, config, fields.window(default=4096), ["sliding_attention"] * config.num_layers)


def read_mixtral(fields: Fields) -> DecoderConfig:
    config = llama(fields, theta=1e6, eps=1e-5)
    config = windows(fields, config, fields.window(), ["sliding_attention"] * config.num_layers)
    return each(config, experts=experts(fields, "num_local_experts", 8, 2))


def experts(fields: Fields, count: str, default: int, per_token: int, **others: Any) -> Experts:
    number = fields.count(count, default, at_most=HEADS)
    chosen = fields.count("num_experts_per_tok", per_token, at_most=HEADS)
    if chosen > number:
        fields.faults.append(f"num_experts_per_tok {chosen} of {number} experts can't be chosen")
    return Experts(count=number, per_token=min(chosen, number), **others)


def read_qwen2(fields: Fields) -> DecoderConfig:
    return _qwen_windows(fields, llama(fields, bias=True, output_bias=False))


def read_qwen3(fields: Fields) -> DecoderConfig:
    return _qwen_windows(fields, llama(fields, head_dim=128, qk_norm=True))


def read_qwen3_moe(fields: Fields) -> DecoderConfig:
    fields.only(decoder_sparse_step=1, mlp_only_layers=[])
    config = _qwen_windows(fields, llama(fields, head_dim=128, qk_norm=True))
    name = "num_local_experts" if "num_local_experts" in fields.config else "num_experts"  # transformers 5 renames it
    chosen = experts(fields, name, 128, 8, renormalise=fields.flag("norm_topk_prob", False))
    return each(config, experts=chosen, size=fields.count("moe_intermediate_size", 768, at_most=WIDTH))


def _qwen_windows(fields: Fields, config: DecoderConfig) -> DecoderConfig:
    if not fields.flag("use_sliding_window", False):
        return config
    first = fields.config.get("max_window_layers", 28)  # windows from this layer on
    default = dict.fromkeys(range(first, config.num_layers), "sliding_attention") if type(first) is int else {}
    return windows(fields, config, fields.window(default=4096), fields.kinds(config.num_layers, default))


def mixtral_names(config: DecoderConfig) -> Table:
    moe = "model.layers.{}.block_sparse_moe"
    return {
        **llama_names(config),
        "layers.{}.mlp.gate": f"{moe}.gate",
        "layers.{}.mlp.experts.gate_proj": f"{moe}.experts.{{expert}}.w1.weight",
        "layers.{}.mlp.experts.down_proj": f"{moe}.experts.{{expert}}.w2.weight",
        "layers.{}.mlp.experts.up_proj": f"{moe}.experts.{{expert}}.w3.weight",
    }


def qwen3_moe_names(config: DecoderConfig) -> Table:
    names = ("gate_proj", "up_proj", "down_proj")
    moe: Table = {f"layers.{{}}.mlp.experts.{n}": f"model.layers.{{}}.mlp.experts.{{expert}}.{n}.weight" for n in names}
    return {**llama_names(config), **moe}


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a shape of our own: Llama's fields, or Qwen3's where there are norms over q and k."""
    layer = config.layers[0]
    a, position = layer.attention, layer.rotary
    assert position is not None
    rope: dict[str, Any] = {"rope_theta": position.theta, "rope_type": "default"}
    if isinstance(position.scaling, LinearScaling):
        rope |= {"rope_type": "linear", "factor": position.scaling.factor}
    if isinstance(position.scaling, Llama3Scaling):
        rope |= {
            "rope_type": "llama3",
            "factor": position.scaling.factor,
            "low_freq_factor": position.scaling.low_freq_factor,
            "high_freq_factor": position.scaling.high_freq_factor,
            "original_max_position_embeddings": position.scaling.original_max_tokens,
        }
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": layer.mlp.size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": HF_NAMES[layer.mlp.activation],
        "max_position_embeddings": config.max_tokens,
        "rms_norm_eps": config.norm.eps,
        "attention_bias": a.bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope,
        # The older schema beside it: llama.cpp, vLLM and transformers 4 read these.
        "rope_theta": position.theta,
        "rope_scaling": None if position.scaling is None else old,
    } | ({} if a.qk_norm else {"mlp_bias": layer.mlp.bias})


# ── Phi ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_phi(fields: Fields) -> DecoderConfig:
    """Phi-1, 1.5 and 2: attention and feed-forward in parallel on one LayerNorm, biases everywhere."""
    fields.only(qk_layernorm=False)
    config = llama(fields, default_activation="gelu_new", bias=True, output_bias=True)
    norm = Norm(kind="layer", eps=fields.number("layer_norm_eps", 1e-5))
    a = config.layers[0].attention
    rotary = fields.rotary(head_dim=a.head_dim, fraction=0.5, max_tokens=config.max_tokens)
    layers = tuple(replace(layer, norm=norm, rotary=rotary, residual="shared") for layer in config.layers)
    config = replace(config, layers=layers, norm=norm, head_bias=True)
    return each(config, gated=False, bias=True)


def phi_names(config: DecoderConfig) -> Table:
    return {
        **llama_names(config),
        "norm": "model.final_layernorm",
        "lm_head_bias": "lm_head.bias",
        "layers.{}.self_attn.o_proj": "model.layers.{}.self_attn.dense",
        "layers.{}.mlp.up_proj": "model.layers.{}.mlp.fc1",
        "layers.{}.mlp.down_proj": "model.layers.{}.mlp.fc2",
    }


def read_phi3(fields: Fields) -> DecoderConfig:
    """Phi-3 and Phi-4: Llama with q, k and v in one tensor, gate and up in one, and LongRope."""
    config = llama(fields, eps=1e-5)
    return windows(fields, config, fields.window(), ["sliding_attention"] * config.num_layers)


def phi3_names(config: DecoderConfig) -> Table:
    attn, mlp = "layers.{}.self_attn.", "layers.{}.mlp."
    return {
        **llama_names(config),
        (f"{attn}q_proj", f"{attn}k_proj", f"{attn}v_proj"): "model.layers.{}.self_attn.qkv_proj",
        (f"{mlp}gate_proj", f"{mlp}up_proj"): "model.layers.{}.mlp.gate_up_proj",
    }


# ── Gemma ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_gemma(fields: Fields) -> DecoderConfig:
    # Old files say hidden_act "gelu" and mean the tanh form, which later ones write into hidden_activation.
    return _gemma(
        fields, llama(fields, head_dim=256, activation="hidden_activation", default_activation="gelu_pytorch_tanh")
    )


def read_gemma2(fields: Fields) -> DecoderConfig:
    config = llama(
        fields,
        head_dim=256,
        activation="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        softcap=fields.optional("attn_logit_softcapping", 50.0),
        scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
    )
    alternating = dict.fromkeys(range(0, config.num_layers, 2), "sliding_attention")
    config = windows(fields, config, fields.window(default=4096), fields.kinds(config.num_layers, alternating))
    config = replace(config, logit_softcap=fields.optional("final_logit_softcapping", 30.0))
    return _gemma(fields, config, norms="around")


def read_gemma3(fields: Fields) -> DecoderConfig:
    """The text model: five layers with a window and a short rotary base to each one without."""
    config = llama(
        fields,
        head_dim=256,
        theta=1e6,
        activation="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        softcap=fields.optional("attn_logit_softcapping"),
        scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        qk_norm=True,
    )
    every = fields.count("sliding_window_pattern", 6)
    local = {n: "sliding_attention" for n in range(config.num_layers) if (n + 1) % every}
    kinds = fields.kinds(config.num_layers, local)
    config = windows(fields, config, fields.window(default=4096), kinds)
    base, by_kind = (
        fields.number("rope_local_base_freq", 10_000.0),
        "full_attention" in (fields.config.get("rope_parameters") or {}),
    )
    rotaries = {
        "full_attention": fields.rotary(1e6, kind="full_attention"),
        "sliding_attention": fields.rotary(base, kind="sliding_attention") if by_kind else Rotary(theta=base),
    }
    layers = tuple(replace(layer, rotary=rotaries[kind]) for layer, kind in zip(config.layers, kinds, strict=True))
    config = replace(config, layers=layers, logit_softcap=fields.optional("final_logit_softcapping"))
    return _gemma(fields, config, norms="around")


def _gemma(fields: Fields, config: DecoderConfig, norms: Any = "before") -> DecoderConfig:
    """What all Gemmas have: norms kept as weight - 1, embeddings times the root of their width, a tied head."""
    fields.only(use_bidirectional_attention=False)
    norm = replace(config.norm, offset=1.0)
    layers = tuple(replace(layer, norm=norm, norms=norms) for layer in config.layers)
    tied = fields.flag("tie_word_embeddings", True)
    return replace(config, layers=layers, norm=norm, tie_embeddings=tied, embed_scale=config.hidden_size**0.5)


def gemma2_names(config: DecoderConfig) -> Table:
    return {
        **llama_names(config),
        "layers.{}.attention_norm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.post_attention_layernorm": "model.layers.{}.pre_feedforward_layernorm",
        "layers.{}.mlp_norm": "model.layers.{}.post_feedforward_layernorm",
    }


# ── GPT-OSS, Grok-1 ──────────────────────────────────────────────────────────────────────────────────────────────────


def read_gpt_oss(fields: Fields) -> DecoderConfig:
    """Attention sinks, YaRN, windows in every second layer, experts with clamped gates, biases everywhere
    (arXiv:2508.10925)."""
    fields.only(hidden_act="silu", swiglu_alpha=1.702)
    config = llama(fields, head_dim=64, theta=150_000.0, eps=1e-5, sinks=True, bias=True, output_bias=True)
    alternating = dict.fromkeys(range(0, config.num_layers, 2), "sliding_attention")
    config = windows(fields, config, fields.window(default=128), fields.kinds(config.num_layers, alternating))
    mlp = replace(
        config.layers[0].mlp,
        activation="quick_gelu",  # x sigmoid(1.702 x)
        limit=fields.number("swiglu_limit", 7.0),
        up_offset=1.0,
        bias=True,
        experts=experts(fields, "num_local_experts", 128, 4, router_bias=True),
    )
    return replace(config, layers=tuple(replace(layer, mlp=mlp) for layer in config.layers))


def gpt_oss_names(config: DecoderConfig) -> Table:
    ours, stored = "layers.{}.mlp.experts.", "model.layers.{}.mlp.experts."
    return {
        **llama_names(config),
        "layers.{}.mlp.gate": "model.layers.{}.mlp.router",
        (f"{ours}gate_proj", f"{ours}up_proj"): To(f"{stored}gate_up_proj", "gate_up_pairs"),
        (f"{ours}gate_proj_bias", f"{ours}up_proj_bias"): To(f"{stored}gate_up_proj_bias", "gate_up_pairs"),
        f"{ours}down_proj": To(f"{stored}down_proj", "experts_transposed"),
        f"{ours}down_proj_bias": f"{stored}down_proj_bias",
        "layers.{}.self_attn.sinks": "model.layers.{}.self_attn.sinks",
    }


def read_grok(fields: Fields) -> DecoderConfig:
    """Grok-1, as in xai-org/grok-1 (model.py): norms around the branches, scores capped, a softmax over all experts of which
    the chosen keep their share."""
    config = llama(
        fields,
        default_activation="gelu_pytorch_tanh",
        eps=1e-5,
        softcap=fields.number("max_attn_value", 30.0),
        scale=fields.number("attn_output_multiplier", 0.08838834764831845),
    )
    chosen = experts(fields, "num_experts", 8, 2, renormalise=False)
    config = each(config, activation="gelu_tanh", experts=chosen)
    return replace(
        config,
        layers=tuple(replace(layer, norms="around") for layer in config.layers),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        embed_scale=fields.number("embedding_multiplier_scale", 78.38367176906169),
        logit_scale=fields.number("output_multiplier_scale", 0.5773502691896257),
    )


def grok_names(config: DecoderConfig) -> Table:
    block, ours = "model.layers.{}.", "layers.{}.mlp.experts."
    return {
        "embed_tokens": "model.embed_tokens",
        "norm.weight": "model.norm.scale",
        "lm_head": "lm_head",
        "layers.{}.self_attn": f"{block}attn",
        "layers.{}.input_layernorm.weight": f"{block}pre_attn_norm.scale",
        "layers.{}.attention_norm.weight": f"{block}post_attn_norm.scale",
        "layers.{}.post_attention_layernorm.weight": f"{block}pre_moe_norm.scale",
        "layers.{}.mlp_norm.weight": f"{block}post_moe_norm.scale",
        "layers.{}.mlp.gate": f"{block}moe_block.gate",
        f"{ours}gate_proj": f"{block}moe_block.experts.{{expert}}.linear.weight",
        f"{ours}up_proj": f"{block}moe_block.experts.{{expert}}.linear_v.weight",
        f"{ours}down_proj": f"{block}moe_block.experts.{{expert}}.linear_1.weight",
    }
