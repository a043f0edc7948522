"""What the families share: a layer as nearly every config.json tells it, in Llama's way or in GPT's."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ownlm.models.decoder import DecoderConfig
from ownlm.models.families.fields import Fields
from ownlm.models.specs import Attention, FeedForward, Layer, Norm

HEADS, LAYERS, WIDTH = 2**14, 4096, 2**26  # no checkpoint comes near these
Spec = Mapping[str, Any]  # fields of a spec that differ from what its reader makes of the config
NOTHING: Spec = {}


def llama_layer(
    fields: Fields, *, attention: Spec = NOTHING, mlp: Spec = NOTHING, norm: Norm | None = None, **others: Any
) -> Layer:
    """RMSNorm, gates, key/value heads and a head width of their own; biases where the file says so."""
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads", at_most=HEADS)
    bias = fields.flag("attention_bias", False)
    attend = Attention(
        num_heads=heads,
        num_kv_heads=fields.count("num_key_value_heads", heads, at_most=HEADS),
        head_dim=fields.count("head_dim", max(1, width // heads), at_most=HEADS),
        bias=bias,
        output_bias=bias,
    )
    size = fields.count("intermediate_size", at_most=WIDTH)
    activation = mlp.get("activation") or fields.activation()  # not asked for where it is told otherwise
    feed = FeedForward(size=size, activation=activation, bias=fields.flag("mlp_bias", False))
    norm = norm or Norm(eps=fields.number("rms_norm_eps", 1e-6))
    return Layer(attention=replace(attend, **attention), mlp=replace(feed, **mlp), norm=norm, **others)


def multi_head(fields: Fields) -> Attention:
    """Heads that share the width among them."""
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads", at_most=HEADS)
    if width % heads:
        names = fields.name("hidden_size"), fields.name("num_attention_heads")
        fields.faults.append(f"{names[0]} {width} is not divisible by {names[1]} {heads}")
    return Attention(num_heads=heads, num_kv_heads=heads, head_dim=max(1, width // heads))


def gpt_layer(fields: Fields, *, attention: Spec = NOTHING, widen: int | None = None, **others: Any) -> Layer:
    """LayerNorm, heads that share the width, no gates, biases everywhere: GPT, BERT, ViT. `widen`: how many times as wide the
    feed-forward is where the file doesn't say."""
    heads = replace(multi_head(fields), bias=True, output_bias=True)
    size = fields.count("intermediate_size", widen and widen * fields.count("hidden_size"), at_most=WIDTH)
    return Layer(
        attention=replace(heads, **attention),
        mlp=FeedForward(size=size, activation=fields.activation(default="gelu"), gated=False, bias=True),
        norm=Norm(kind="layer", eps=fields.number("layer_norm_eps", 1e-5)),
        **others,
    )


def repeated(
    fields: Fields, layer: Layer, name: str = "num_hidden_layers", default: int | None = None
) -> tuple[Layer, ...]:
    """As many layers as the file says."""
    return (layer,) * fields.count(name, default, at_most=LAYERS)


def decoder(fields: Fields, layer: Layer, **others: Any) -> DecoderConfig:
    """A decoder of equal layers."""
    told: dict[str, Any] = {
        "vocab_size": fields.count("vocab_size"),
        "hidden_size": fields.count("hidden_size"),
        "max_tokens": fields.count("max_position_embeddings", 2048),
        "layers": repeated(fields, layer),
        "norm": layer.norm,
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
    }
    return DecoderConfig(**(told | others))
