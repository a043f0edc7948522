"""The decoder families: Llama's line (Mistral, Mixtral, Qwen, Phi, Gemma, GPT-OSS, Grok) and the GPTs.

Each is a function from config.json to `DecoderConfig` and a table of names; what they share is in layers.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ownlm.models.decoder import DecoderConfig
from ownlm.models.families.fields import FULL, LOCAL, Fields
from ownlm.models.families.heads import TASKS, kind_of, task_head
from ownlm.models.families.layers import HEADS, LAYERS, NOTHING, WIDTH, Spec, decoder, gpt_layer, llama_layer
from ownlm.models.names import Table, To, block
from ownlm.models.specs import Experts, Layer, Norm, Rotary


def with_task(fields: Fields, config: DecoderConfig, *, span: bool) -> DecoderConfig:
    """The same, with the head that the class of the file names if it is one for whole texts, for each token or, where the family
    has it, for a span."""
    kind = kind_of(fields.config)
    if kind == "SequenceClassification":
        return replace(config, head=task_head(fields, "sequence", reads="last", bias=False))
    known = kind == "TokenClassification" or (span and kind == "QuestionAnswering")
    return replace(config, head=task_head(fields, TASKS[kind])) if known else config


def windows(config: DecoderConfig, window: int | None, local: Sequence[bool] | None = None) -> DecoderConfig:
    """The same with a window in the layers that are `local`, or in all."""

    def banded(layer: Layer) -> Layer:
        return replace(layer, attention=replace(layer.attention, window=window))

    local = [True] * config.num_layers if local is None else local
    layers = (banded(layer) if here else layer for layer, here in zip(config.layers, local, strict=True))
    return replace(config, layers=tuple(layers))


# ── Llama, Mistral, Mixtral, Qwen ────────────────────────────────────────────────────────────────────────────────────

LLAMA: Table = {
    "embed_tokens": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "lm_head": "lm_head",
}  # fmt: skip


def llama(
    fields: Fields, *, attention: Spec = NOTHING, mlp: Spec = NOTHING, layer: Spec = NOTHING, **config: Any
) -> DecoderConfig:
    """The shape of Llama, with what differs in its specs and its config."""
    fields.only(quantization_config=None)
    one = llama_layer(fields, attention=attention, mlp=mlp, **layer)
    max_tokens = fields.count("max_position_embeddings", 2048)
    rotary = fields.rotary(head_dim=one.attention.head_dim, max_tokens=max_tokens)
    return decoder(fields, replace(one, rotary=rotary), **config)


def read_mistral(fields: Fields) -> DecoderConfig:
    """Mistral; Phi-3 and Phi-4."""
    return windows(llama(fields), fields.window())


def read_mixtral(fields: Fields) -> DecoderConfig:
    return windows(llama(fields, mlp={"experts": experts(fields)}), fields.window())


def experts(fields: Fields, **others: Any) -> Experts:
    number = fields.count("num_local_experts", at_most=HEADS)
    chosen = fields.count("num_experts_per_tok", at_most=HEADS)
    if chosen > number:
        fields.faults.append(f"num_experts_per_tok {chosen} of {number} experts can't be chosen")
    return Experts(count=number, per_token=min(chosen, number), **others)


def qwen(fields: Fields, **spec: Any) -> DecoderConfig:
    """Qwen 2 and 3: windows from some layer on, where there are any."""
    config = llama(fields, **spec)
    if not fields.flag("use_sliding_window", False):
        return config
    first = fields.count("max_window_layers", 28, at_least=0)
    local = fields.local([number >= first for number in range(config.num_layers)])
    return windows(config, fields.window(), local)


def read_qwen2(fields: Fields) -> DecoderConfig:
    return qwen(fields, attention={"bias": True, "output_bias": False})


def read_qwen3(fields: Fields) -> DecoderConfig:
    return qwen(fields, attention={"qk_norm": True})


def read_qwen3_moe(fields: Fields) -> DecoderConfig:
    fields.only(decoder_sparse_step=1, mlp_only_layers=[])
    if "num_local_experts" not in fields.config:  # transformers 5 renames it
        fields.spelled = {"num_local_experts": "num_experts"}
    chosen = experts(fields, renormalise=fields.flag("norm_topk_prob", False))
    size = fields.count("moe_intermediate_size", 768, at_most=WIDTH)
    return qwen(fields, attention={"qk_norm": True}, mlp={"experts": chosen, "size": size})


MIXTRAL = LLAMA | block(
    "model.layers.{}.block_sparse_moe", router="gate",
    experts="experts.{expert}.w1.weight experts.{expert}.w3.weight experts.{expert}.w2.weight",
)  # fmt: skip
QWEN3_MOE = LLAMA | block(
    "model.layers.{}.mlp.experts.{expert}", experts="gate_proj.weight up_proj.weight down_proj.weight"
)


# ── Phi ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_phi(fields: Fields) -> DecoderConfig:
    """Phi-1, 1.5 and 2: attention and feed-forward in parallel on one LayerNorm, biases everywhere."""
    fields.only(qk_layernorm=False)
    return llama(
        fields,
        attention={"bias": True, "output_bias": True},
        mlp={"gated": False, "bias": True},
        layer={"norm": Norm(kind="layer", eps=fields.number("layer_norm_eps", 1e-5)), "residual": "shared"},
        head_bias=True,
    )


PHI = LLAMA | {
    "norm": "model.final_layernorm",
    "lm_head_bias": "lm_head.bias",
    **block("model.layers.{}", o="self_attn.dense", mlp="mlp.fc1 mlp.fc2"),
}
PHI3 = LLAMA | block("model.layers.{}", qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj")


# ── Gemma ────────────────────────────────────────────────────────────────────────────────────────────────────────────


# Old files say hidden_act "gelu" and mean the tanh form, which later ones write into hidden_activation.
GEMMA_FIELDS = {"hidden_act": "hidden_activation"}


def gemma(fields: Fields, *, norms: str = "before", **others: Any) -> DecoderConfig:
    """What all Gemmas have: norms kept as weight - 1, embeddings times the root of their width, a tied head."""
    fields.only(use_bidirectional_attention=False)
    norm = Norm(eps=fields.number("rms_norm_eps", 1e-6), offset=1.0)
    scale = fields.count("hidden_size") ** 0.5
    return llama(fields, layer={"norm": norm, "norms": norms}, embed_scale=scale, **others)


def read_gemma2(fields: Fields) -> DecoderConfig:
    """Norms around the branches, scores and logits capped, windows in every second layer."""
    config = _capped(fields)
    local = fields.local([number % 2 == 0 for number in range(config.num_layers)])
    return windows(config, fields.window(), local)


def read_gemma3(fields: Fields) -> DecoderConfig:
    """The text model: five layers with a window and a short rotary base to each one without."""
    config = _capped(fields, qk_norm=True)
    every = fields.count("sliding_window_pattern", 6)
    local = fields.local([(number + 1) % every != 0 for number in range(config.num_layers)])
    base, rope = fields.number("rope_local_base_freq", 10_000.0), fields.get("rope_parameters")
    by_kind = isinstance(rope, Mapping) and FULL in rope
    short = fields.rotary(base, kind=LOCAL) if by_kind else Rotary(theta=base)
    kinds = {False: fields.rotary(kind=FULL), True: short}
    layers = (replace(layer, rotary=kinds[here]) for layer, here in zip(config.layers, local, strict=True))
    return windows(replace(config, layers=tuple(layers)), fields.window(), local)


def _capped(fields: Fields, **attention: Any) -> DecoderConfig:
    cap, scale = fields.optional("attn_logit_softcapping"), fields.number("query_pre_attn_scalar", 256) ** -0.5
    logits = fields.optional("final_logit_softcapping")
    spec = {"softcap": cap, "scale": scale} | attention
    return gemma(fields, norms="around", attention=spec, logit_softcap=logits)


GEMMA2 = LLAMA | block(
    "model.layers.{}",
    norms="input_layernorm pre_feedforward_layernorm",
    after="post_attention_layernorm post_feedforward_layernorm",
)


# ── GPT-OSS, Grok-1 ──────────────────────────────────────────────────────────────────────────────────────────────────


def read_gpt_oss(fields: Fields) -> DecoderConfig:
    """Attention sinks, YaRN, windows in every second layer, experts with clamped gates, biases everywhere
    (arXiv:2508.10925)."""
    fields.only(hidden_act="silu", swiglu_alpha=1.702)
    mlp = {
        "activation": "quick_gelu",  # x sigmoid(1.702 x)
        "limit": fields.number("swiglu_limit", 7.0),
        "up_offset": 1.0,
        "bias": True,
        "experts": experts(fields, router_bias=True),
    }
    config = llama(fields, attention={"sinks": True, "bias": True, "output_bias": True}, mlp=mlp)
    local = fields.local([number % 2 == 0 for number in range(config.num_layers)])
    return windows(config, fields.window(), local)


_OURS, _STORED = "layers.{}.mlp.experts.", "model.layers.{}.mlp.experts."
GPT_OSS = LLAMA | {
    "layers.{}.mlp.gate": "model.layers.{}.mlp.router",
    (f"{_OURS}gate_proj", f"{_OURS}up_proj"): To(f"{_STORED}gate_up_proj", "gate_up_pairs"),
    (f"{_OURS}gate_proj_bias", f"{_OURS}up_proj_bias"): To(f"{_STORED}gate_up_proj_bias", "gate_up_pairs"),
    f"{_OURS}down_proj": To(f"{_STORED}down_proj", "experts_transposed"),
    f"{_OURS}down_proj_bias": f"{_STORED}down_proj_bias",
    "layers.{}.self_attn.sinks": "model.layers.{}.self_attn.sinks",
}


def read_grok(fields: Fields) -> DecoderConfig:
    """Grok-1, as in xai-org/grok-1 (model.py): norms around the branches, scores capped, a softmax over all experts of which
    the chosen keep their share."""
    attention = {"softcap": fields.number("max_attn_value", 30.0)}
    attention["scale"] = fields.number("attn_output_multiplier", 0.08838834764831845)
    return llama(
        fields,
        attention=attention,
        mlp={"activation": "gelu_tanh", "experts": experts(fields, renormalise=False)},
        layer={"norms": "around"},
        embed_scale=fields.number("embedding_multiplier_scale", 78.38367176906169),
        logit_scale=fields.number("output_multiplier_scale", 0.5773502691896257),
    )


GROK: Table = {
    "embed_tokens": "model.embed_tokens",
    "norm.weight": "model.norm.scale",
    "lm_head": "lm_head",
    "layers.{}.self_attn": "model.layers.{}.attn",
    "layers.{}.input_layernorm.weight": "model.layers.{}.pre_attn_norm.scale",
    "layers.{}.attention_norm.weight": "model.layers.{}.post_attn_norm.scale",
    "layers.{}.post_attention_layernorm.weight": "model.layers.{}.pre_moe_norm.scale",
    "layers.{}.mlp_norm.weight": "model.layers.{}.post_moe_norm.scale",
    **block("model.layers.{}.moe_block", router="gate"),
    **block("model.layers.{}.moe_block.experts.{expert}", experts="linear.weight linear_v.weight linear_1.weight"),
}


# ── GPT-2, GPT-Neo, GPT-NeoX ─────────────────────────────────────────────────────────────────────────────────────────


def gpt(fields: Fields, *, attention: Spec = NOTHING, layer: Spec = NOTHING, **config: Any) -> DecoderConfig:
    """The shape of GPT, with learned positions."""
    fields.only(quantization_config=None)
    one = gpt_layer(fields, attention=attention, widen=4, **layer)
    return decoder(fields, one, **({"learned_positions": True} | config))


def read_gpt2(fields: Fields) -> DecoderConfig:
    fields.only(add_cross_attention=False, scale_attn_by_inverse_layer_idx=False)
    return gpt(fields, attention={"scale": None if fields.flag("scale_attn_weights", True) else 1.0})


def read_gpt_neo(fields: Fields) -> DecoderConfig:
    """GPT-3's shape: dense and locally banded attention in turn (arXiv:2005.14165, 2.1). No scale, and no bias on q, k and v."""
    config = gpt(fields, attention={"scale": 1.0, "bias": False})
    local: list[bool] = []
    try:
        for kinds, times in fields.get("attention_types") or [[["global", "local"], config.num_layers // 2]]:
            local += [{"global": False, "local": True}[kind] for kind in kinds] * min(times, LAYERS)
    except (TypeError, ValueError, KeyError):
        local = []
    if len(local) != config.num_layers:
        fields.faults.append(f"attention_types must name {config.num_layers} layers as global or local")
        return config
    return windows(config, fields.window("window_size"), local)


def read_gpt_neox(fields: Fields) -> DecoderConfig:
    """Pythia and GPT-NeoX-20B: rotary on a quarter of each head, branches in parallel on a norm each."""
    bias = fields.flag("attention_bias", True)
    parallel = fields.flag("use_parallel_residual", True)
    config = gpt(
        fields,
        attention={"bias": bias, "output_bias": bias},
        layer={"residual": "parallel" if parallel else "sequential"},
        learned_positions=False,
    )
    head_dim = config.layers[0].attention.head_dim
    rotary = fields.rotary(head_dim=head_dim, max_tokens=config.max_tokens)
    return replace(config, layers=tuple(replace(layer, rotary=rotary) for layer in config.layers))


GPT2_FIELDS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions", "hidden_act": "activation_function", "layer_norm_eps": "layer_norm_epsilon",
}  # fmt: skip
GPT_NEO_FIELDS = {
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "hidden_act": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon",
}  # fmt: skip
GPT_NEOX_FIELDS = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_GPT2: Table = {
    "embed_tokens": "transformer.wte", "embed_positions": "transformer.wpe", "norm": "transformer.ln_f", "lm_head": "lm_head",
    **block("transformer.h.{}", norms="ln_1 ln_2"),
}  # fmt: skip
# Its linear layers are Conv1D: kept as [in, out], with q, k and v in one.
GPT2 = _GPT2 | block(
    "transformer.h.{}", layout="transposed", qkv="attn.c_attn", o="attn.c_proj", mlp="mlp.c_fc mlp.c_proj"
)
GPT_NEO = _GPT2 | {
    "layers.{}.self_attn": "transformer.h.{}.attn.attention",
    **block("transformer.h.{}", o="attn.attention.out_proj", mlp="mlp.c_fc mlp.c_proj"),
}


def gpt_neox_names(config: DecoderConfig) -> Table:
    stored, heads = "gpt_neox.layers.{}", config.layers[0].attention.num_heads
    return {
        "embed_tokens": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        "layers.{}": stored,
        **block(stored, o="attention.dense", mlp="mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        **block(stored, layout="by_head", count=heads, qkv="attention.query_key_value"),
    }
