"""The families that read one text and write another, T5 and mT5; and XLNet, which reads in any order."""

from dataclasses import replace

from ownlm.models.encoder_decoder import EncoderDecoderConfig
from ownlm.models.families.fields import HF_ACTIVATIONS, Fields
from ownlm.models.families.heads import kind_of, task_head
from ownlm.models.families.layers import gpt_layer, llama_layer, repeated
from ownlm.models.names import Table, To, block
from ownlm.models.two_stream import TwoStreamConfig

# ── T5 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

T5_FIELDS = {
    "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_key_value_heads": "num_heads", "head_dim": "d_kv",
    "intermediate_size": "d_ff", "num_hidden_layers": "num_layers", "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
}  # fmt: skip
PROJECTIONS = HF_ACTIVATIONS | {f"gated-{name}": known for name, known in HF_ACTIVATIONS.items()}
PROJECTIONS["gated-gelu"] = "gelu_tanh"  # as T5 1.1 means it


def read_t5(fields: Fields) -> EncoderDecoderConfig:
    """T5 1.0 scales its logits, 1.1 doesn't: newer files say so (`scale_decoder_outputs`), older ones by not tying the head.
    Whether it is tied the files alone can tell, for newer ones call it so in any case."""
    fields.only(quantization_config=None, is_encoder_decoder=True, is_decoder=False)
    gated = str(fields.get("feed_forward_proj", "relu")).startswith("gated-")
    mlp = {"activation": fields.choice("feed_forward_proj", PROJECTIONS, "relu"), "gated": gated}
    layer = llama_layer(fields, attention={"scale": 1.0}, mlp=mlp)
    vocab_size, width = fields.count("vocab_size"), fields.count("hidden_size")
    buckets = fields.count("relative_attention_num_buckets", 32)
    max_distance = fields.count("relative_attention_max_distance", 128)
    if buckets < 4 or max_distance <= buckets // 2:
        told = f"{buckets} buckets can't tell distances up to {max_distance} apart"
        fields.faults.append(f"{told} (4 or more, under twice that)")
    tied, layers = fields.flag("tie_word_embeddings", True), repeated(fields, layer)
    return EncoderDecoderConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        max_tokens=fields.count("max_position_embeddings", 512),
        encoder=layers,
        layers=repeated(fields, layer, "num_decoder_layers", len(layers)),
        norm=layer.norm,
        buckets=buckets,
        max_distance=max_distance,
        tie_embeddings=not fields.holds("lm_head.weight", not tied),
        logit_scale=width**-0.5 if fields.flag("scale_decoder_outputs", tied) else 1.0,
        start_token=_start(fields, vocab_size),
    )


def read_mt5(fields: Fields) -> EncoderDecoderConfig:
    """T5 1.1, which never scales."""
    return replace(read_t5(fields), logit_scale=1.0)


def _start(fields: Fields, vocab_size: int) -> int:
    """The token that decoding begins with: padding where the file names none."""
    named = (name for name in ("decoder_start_token_id", "pad_token_id") if fields.get(name) is not None)
    return fields.count(next(named, "pad_token_id"), 0, at_least=0, at_most=vocab_size - 1)


def t5_names(config: EncoderDecoderConfig) -> Table:
    table: Table = {"embed_tokens": "shared", "lm_head": "lm_head"}
    for stack, norm, last in (("encoder", "encoder_norm", 1), ("decoder", "norm", 2)):
        ours, stored = f"{stack}.{{}}", f"{stack}.block.{{}}.layer"
        table[norm] = f"{stack}.final_layer_norm"
        table[f"{stack}_bias"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        table[f"{ours}.cross_layernorm"] = f"{stored}.1.layer_norm"
        table |= block(f"{stored}", ours, norms=f"0.layer_norm {last}.layer_norm")
        table |= block(f"{stored}.0.SelfAttention", ours, attention="q k v o")
        table |= {f"{ours}.cross_attn.{part}_proj": f"{stored}.1.EncDecAttention.{part}" for part in "qkvo"}
        inner = f"{stored}.{last}.DenseReluDense"
        gated = config.layers[0].mlp.gated
        table |= block(inner, ours, gated="wi_0 wi_1 wo") if gated else block(inner, ours, mlp="wi wo")
    return table


# ── XLNet ────────────────────────────────────────────────────────────────────────────────────────────────────────────

XLNET_FIELDS = {
    "hidden_size": "d_model", "num_attention_heads": "n_head", "intermediate_size": "d_inner", "num_hidden_layers": "n_layer",
    "hidden_act": "ff_activation",
}  # fmt: skip


def read_xlnet(fields: Fields) -> TwoStreamConfig:
    fields.only(quantization_config=None, bi_data=False, same_length=False)
    layer = gpt_layer(fields, attention={"bias": False, "output_bias": False}, norms="after")
    fields.only(d_head=layer.attention.head_dim)
    width = fields.count("hidden_size")
    if width % 2:
        fields.faults.append(f"{fields.name('hidden_size')} {width} must be even")
    head = None
    if fields.holds("logits_proj.weight", kind_of(fields.config) == "SequenceClassification"):
        # transformers reads the last place, which is the last token for texts padded on the left, as XLNet's are.
        fields.only(summary_type="last", summary_use_proj=True, summary_activation="tanh")
        head = task_head(fields, "sequence", activation="tanh", reads="last")
    return TwoStreamConfig(
        vocab_size=fields.count("vocab_size"),
        hidden_size=width,
        layers=repeated(fields, layer),
        causal=fields.choice("attn_type", {"bi": False, "uni": True}, "bi"),
        clamp=_positive(fields, "clamp_len"),
        max_mems=_positive(fields, "mem_len"),
        reuse=_positive(fields, "reuse_len"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        lm_head=fields.holds("lm_loss.bias", head is None),
        head=head,
    )


def _positive(fields: Fields, name: str) -> int | None:
    """A count; null, zero and below are how XLNet's files say that there is none."""
    value = fields.get(name)
    return None if type(value) is int and value <= 0 else fields.window(name)


def xlnet_names(config: TwoStreamConfig) -> Table:
    heads, ours, stored = config.layers[0].attention.num_heads, "layers.{}.self_attn", "transformer.layer.{}.rel_attn"
    return {
        "embed_tokens": "transformer.word_embedding",
        "embed_mask": "transformer.mask_emb",
        **block("transformer.layer.{}", after="rel_attn.layer_norm ff.layer_norm", mlp="ff.layer_1 ff.layer_2"),
        f"{ours}.o_proj.weight": To(f"{stored}.o", "heads_in", heads),
        **{f"{ours}.{part}_proj.weight": To(f"{stored}.{part}", "heads_out", heads) for part in "qkvr"},
        **{f"{ours}.r_{part}_bias": f"{stored}.r_{part}_bias" for part in "wrs"},
        f"{ours}.segments": f"{stored}.seg_embed",
        "lm_head": "lm_loss",
        "lm_head_bias": "lm_loss.bias",
        "head.dense": "sequence_summary.summary",
        "head.out": "logits_proj",
    }
