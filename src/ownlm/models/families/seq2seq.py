"""The families that read one text and write another, T5 and mT5; and XLNet, which reads in any order."""

from ownlm.models.encoder_decoder import EncoderDecoderConfig
from ownlm.models.families.decoders import HEADS, LAYERS, WIDTH
from ownlm.models.families.fields import HF_ACTIVATIONS, Fields
from ownlm.models.families.heads import kind_of, task_head
from ownlm.models.names import Table, To
from ownlm.models.specs import Activation, Attention, FeedForward, Layer, Norm
from ownlm.models.two_stream import TwoStreamConfig

# ── T5 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

T5_COPIES = {"encoder.embed_tokens.weight": "embed_tokens.weight", "decoder.embed_tokens.weight": "embed_tokens.weight"}


def read_t5(fields: Fields, *, projection: str = "relu", scaled: bool | None = None) -> EncoderDecoderConfig:
    """T5 1.0 scales its logits, 1.1 doesn't: newer files say so (`scale_decoder_outputs`), older ones by not tying the head.
    Whether it is tied the files alone can tell, for newer ones call it so in any case."""
    fields.only(quantization_config=None, is_encoder_decoder=True, is_decoder=False)
    hidden_size, heads = fields.count("d_model"), fields.count("num_heads", at_most=HEADS)
    width = fields.count("d_kv", 64, at_most=HEADS)
    attention = Attention(num_heads=heads, num_kv_heads=heads, head_dim=width, scale=1.0)
    activation, gated = _projection(fields, projection)
    mlp = FeedForward(size=fields.count("d_ff", at_most=WIDTH), activation=activation, gated=gated)
    norm = Norm(eps=fields.number("layer_norm_epsilon", 1e-6))
    layer = Layer(attention=attention, mlp=mlp, norm=norm)
    count = fields.count("num_layers", at_most=LAYERS)
    vocab_size = fields.count("vocab_size")
    buckets = fields.count("relative_attention_num_buckets", 32)
    max_distance = fields.count("relative_attention_max_distance", 128)
    if buckets < 4 or max_distance <= buckets // 2:
        fields.faults.append(
            f"{buckets} buckets can't tell distances up to {max_distance} apart (4 or more, under twice that)"
        )
    tied = fields.flag("tie_word_embeddings", True)
    scaled = fields.flag("scale_decoder_outputs", tied) if scaled is None else scaled
    return EncoderDecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_tokens=fields.count("n_positions", 512),
        encoder=(layer,) * count,
        layers=(layer,) * fields.count("num_decoder_layers", count, at_most=LAYERS),
        norm=norm,
        buckets=buckets,
        max_distance=max_distance,
        tie_embeddings=not fields.holds("lm_head.weight", not tied),
        logit_scale=hidden_size**-0.5 if scaled else 1.0,
        start_token=_start(fields, vocab_size),
    )


def read_mt5(fields: Fields) -> EncoderDecoderConfig:
    return read_t5(fields, projection="gated-gelu", scaled=False)


def _projection(fields: Fields, default: str) -> tuple[Activation, bool]:
    """feed_forward_proj: an activation, or "gated-" and one; of "gated-gelu", gelu means its tanh form."""
    value = fields.config.get("feed_forward_proj")
    value = default if value is None else value
    name = "gelu_new" if value == "gated-gelu" else str(value).removeprefix("gated-")
    if name not in HF_ACTIVATIONS:
        fields.faults.append(f"feed_forward_proj {value!r} is not supported (an activation, or gated- and one)")
    return HF_ACTIVATIONS.get(name, "relu"), str(value).startswith("gated-")


def _start(fields: Fields, vocab_size: int) -> int:
    """The token that decoding begins with: padding where the file names none."""
    for name in ("decoder_start_token_id", "pad_token_id"):
        value = fields.config.get(name)
        if value is not None:
            if type(value) is not int or not 0 <= value < vocab_size:
                fields.faults.append(f"{name} must be a token from 0 to {vocab_size - 1}, got {value!r}")
                return 0
            return value
    return 0


def t5_names(config: EncoderDecoderConfig) -> Table:
    table: dict[str | tuple[str, ...], str | To] = {"embed_tokens": "shared", "lm_head": "lm_head"}
    gated = config.layers[0].mlp.gated
    for stack, norm, last in (("encoder", "encoder_norm", 1), ("decoder", "norm", 2)):
        block = f"{stack}.block.{{}}.layer"
        table[norm] = f"{stack}.final_layer_norm"
        table[f"{stack}_bias"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        table[f"{stack}.{{}}.input_layernorm"] = f"{block}.0.layer_norm"
        table[f"{stack}.{{}}.cross_layernorm"] = f"{block}.1.layer_norm"
        table[f"{stack}.{{}}.post_attention_layernorm"] = f"{block}.{last}.layer_norm"
        for part in "qkvo":
            table[f"{stack}.{{}}.self_attn.{part}_proj"] = f"{block}.0.SelfAttention.{part}"
            table[f"{stack}.{{}}.cross_attn.{part}_proj"] = f"{block}.1.EncDecAttention.{part}"
        inner = f"{block}.{last}.DenseReluDense"
        table[f"{stack}.{{}}.mlp.gate_proj"] = f"{inner}.wi_0"
        table[f"{stack}.{{}}.mlp.up_proj"] = f"{inner}.wi_1" if gated else f"{inner}.wi"
        table[f"{stack}.{{}}.mlp.down_proj"] = f"{inner}.wo"
    return table


# ── XLNet ────────────────────────────────────────────────────────────────────────────────────────────────────────────

XLNET_COPIES = {"lm_loss.weight": "embed_tokens.weight"}


def read_xlnet(fields: Fields) -> TwoStreamConfig:
    fields.only(quantization_config=None, bi_data=False, same_length=False)
    hidden_size, heads = fields.count("d_model"), fields.count("n_head", at_most=HEADS)
    if hidden_size % heads or hidden_size % 2:
        fields.faults.append(f"d_model {hidden_size} must be even and a multiple of n_head {heads}")
    width = max(1, hidden_size // heads)
    fields.only(d_head=width)
    kind = fields.config.get("attn_type", "bi")
    if kind not in ("bi", "uni"):
        fields.faults.append(f"attn_type {kind!r} is not supported (bi or uni)")
    layer = Layer(
        attention=Attention(num_heads=heads, num_kv_heads=heads, head_dim=width),
        mlp=FeedForward(
            size=fields.count("d_inner", at_most=WIDTH),
            activation=fields.activation("ff_activation", "gelu"),
            gated=False,
            bias=True,
        ),
        norm=Norm(kind="layer", eps=fields.number("layer_norm_eps", 1e-12)),
        norms="after",
    )
    head = None
    if fields.holds("logits_proj.weight", kind_of(fields.config) == "SequenceClassification"):
        # transformers reads the last place, which is the last token for texts padded on the left, as XLNet's are.
        fields.only(summary_type="last", summary_use_proj=True, summary_activation="tanh")
        head = task_head(fields, "sequence", activation="tanh", reads="last")
    tied = fields.flag("tie_word_embeddings", True)
    return TwoStreamConfig(
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * fields.count("n_layer", at_most=LAYERS),
        causal=kind == "uni",
        clamp=_positive(fields, "clamp_len"),
        max_mems=_positive(fields, "mem_len"),
        reuse=_positive(fields, "reuse_len"),
        tie_embeddings=tied,
        lm_head=fields.holds("lm_loss.bias", head is None),
        head=head,
    )


def _positive(fields: Fields, name: str) -> int | None:
    """A count; null, zero and below are how XLNet's files say that there is none."""
    value = fields.config.get(name)
    return None if type(value) is int and value <= 0 else fields.window(name)


def xlnet_names(config: TwoStreamConfig) -> Table:
    heads = config.layers[0].attention.num_heads
    attention = "transformer.layer.{}.rel_attn"
    table: dict[str | tuple[str, ...], str | To] = {
        "embed_tokens": "transformer.word_embedding",
        "embed_mask": "transformer.mask_emb",
        "layers.{}.attention_norm": f"{attention}.layer_norm",
        "layers.{}.mlp.up_proj": "transformer.layer.{}.ff.layer_1",
        "layers.{}.mlp.down_proj": "transformer.layer.{}.ff.layer_2",
        "layers.{}.mlp_norm": "transformer.layer.{}.ff.layer_norm",
        "layers.{}.self_attn.o_proj.weight": To(f"{attention}.o", "heads_in", heads),
        "layers.{}.self_attn.segments": f"{attention}.seg_embed",
        "lm_head": "lm_loss",
        "lm_head_bias": "lm_loss.bias",
        "head.dense": "sequence_summary.summary",
        "head.out": "logits_proj",
    }
    for part in "qkvr":
        table[f"layers.{{}}.self_attn.{part}_proj.weight"] = To(f"{attention}.{part}", "heads_out", heads)
    for bias in ("r_w_bias", "r_r_bias", "r_s_bias"):
        table[f"layers.{{}}.self_attn.{bias}"] = f"{attention}.{bias}"
    return table
