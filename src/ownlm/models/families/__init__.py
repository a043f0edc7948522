"""Model families: what a config.json means, and what the tensors of its checkpoint are called.

    config.json ─► FAMILIES[model_type] ─► read(fields) ─► our config ─► build ─► module
                                       └─► names(config) ─► which stored tensor is made of which of ours

A family is two pure functions and a row in the dict at the end; none has a module of its own.
"""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ownlm.errors import UserError
from ownlm.models.decoder import Decoder, DecoderConfig
from ownlm.models.dual import DualTower, TextTower
from ownlm.models.encoder import Encoder
from ownlm.models.encoder_decoder import EncoderDecoder
from ownlm.models.families import decoders as d
from ownlm.models.families import encoders as e
from ownlm.models.families import gpt as g
from ownlm.models.families import seq2seq as s
from ownlm.models.families import vision as v
from ownlm.models.families.family import Family
from ownlm.models.families.fields import Fields
from ownlm.models.names import Table
from ownlm.models.specs import Layer, Rotary
from ownlm.models.two_stream import TwoStream
from ownlm.models.vision import VisionTower
from ownlm.models.vision_language import VisionLanguage

__all__ = ["FAMILIES", "Family", "family_of", "from_hf", "to_hf"]


def from_hf(
    config: Mapping[str, Any], *, where: str = "config.json", stored: frozenset[str] | None = None
) -> tuple[Any, Family]:
    """What this config.json describes, for files that hold the tensors `stored`. UserError: unknown family (naming the
    nearest), or every value we can't take."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1, cutoff=0.4)
        raise UserError(
            f"model_type {kind!r} is not a family ownlm knows.",
            where=where,
            cure=f"{f'Did you mean {near[0]!r}? ' if near else ''}Known: {', '.join(FAMILIES)}.",
        )
    family, fields = FAMILIES[kind], Fields(config, stored)
    read = family.read(fields)
    if not fields.faults:
        fields.faults += _contradictions(read)
    if fields.faults:
        raise UserError("; ".join(dict.fromkeys(fields.faults)) + ".", where=where)
    return read, family


def family_of(config: DecoderConfig) -> str:
    """The model_type under which a shape of our own is saved: one that transformers knows if there is one, else "ownlm"."""
    layer = config.layers[0]
    a, mlp = layer.attention, layer.mlp
    plain = DecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_tokens=config.max_tokens,
        layers=(Layer(attention=a, mlp=mlp, norm=config.norm, rotary=layer.rotary),) * config.num_layers,
        norm=config.norm,
        learned_positions=config.learned_positions,
        tie_embeddings=config.tie_embeddings,
    )
    simple = replace(a, bias=False, output_bias=False, qk_norm=False, scale=None)
    bare = type(a)(num_heads=a.num_heads, num_kv_heads=a.num_kv_heads, head_dim=a.head_dim)
    same_mlp = replace(mlp, activation="silu", gated=True, bias=False) == type(mlp)(size=mlp.size)
    if config != plain or simple != bare or not same_mlp or config.norm.offset:
        return "ownlm"
    if config.norm.kind == "rms" and _rotary(layer) and mlp.gated and a.scale is None and a.bias == a.output_bias:
        if a.qk_norm and not mlp.bias:
            return "qwen3"
        if not a.qk_norm and config.hidden_size % a.num_heads == 0:
            return "llama"
    gpt2 = config.norm.kind == "layer" and config.learned_positions and layer.rotary is None and not mlp.gated
    multi_head = a.num_heads == a.num_kv_heads and a.num_heads * a.head_dim == config.hidden_size
    if gpt2 and multi_head and not a.qk_norm and a.bias and a.output_bias and mlp.bias and a.scale in (None, 1.0):
        return "gpt2"
    return "ownlm"


def _rotary(layer: Layer) -> bool:
    """Rotary positions that Llama's config can tell."""
    rotary = layer.rotary
    return (
        rotary is not None
        and rotary.fraction == 1.0
        and getattr(rotary.scaling, "kind", "llama3") in ("linear", "llama3")
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that describes a shape of our own; transformers loads it unchanged unless its model_type is "ownlm"."""
    kind = family_of(config)
    return {"architectures": [FAMILIES[kind].architecture], "model_type": kind} | WRITERS[kind](config)


def _contradictions(config: Any) -> list[str]:
    faults = []
    for layer in getattr(config, "layers", ()):
        a = layer.attention
        if a.num_heads % a.num_kv_heads:
            faults.append(f"{a.num_heads} attention heads can't share {a.num_kv_heads} key/value heads")
        if isinstance(layer.rotary, Rotary) and int(a.head_dim * layer.rotary.fraction) % 2:
            faults.append(f"of head_dim {a.head_dim} an odd number turns, and rotary positions turn pairs")
    for part in ("text", "vision", "decoder"):
        if (inner := getattr(config, part, None)) is not None:
            faults += _contradictions(inner)
    return faults


def read_own(fields: Fields) -> DecoderConfig:
    """A shape that no other library knows: the fields of `DecoderConfig` themselves, under "decoder"."""
    raw = fields.config.get("decoder")
    try:
        config: DecoderConfig = TypeAdapter(DecoderConfig).validate_python(raw)
    except ValidationError as error:
        fields.faults += [f"decoder.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        return g.read_gpt2(Fields({}))
    if TypeAdapter(DecoderConfig).dump_python(config, mode="json") != raw:
        fields.faults.append("decoder has fields that this version of ownlm doesn't write")
    return config


def write_own(config: DecoderConfig) -> dict[str, Any]:
    return {"decoder": TypeAdapter(DecoderConfig).dump_python(config, mode="json")}


def own_names(config: DecoderConfig) -> Table:
    return {**d.llama_names(config), "lm_head_bias": "lm_head_bias", "embed_positions": "model.embed_positions"}


def _decoder(
    name: str,
    read: Any,
    names: Any = d.llama_names,
    *,
    prefix: str = "model.",
    derived: str = r".*rotary_emb\.inv_freq",
    token: str = "score",
) -> Family:
    """`token` is what files call the head that labels tokens; one for whole texts is "score" everywhere."""
    copies = {"lm_head.weight": "embed_tokens.weight", "embed_out.weight": "embed_tokens.weight"}
    return Family(
        architecture=name,
        read=lambda fields: d.with_task(fields, read(fields)),
        build=Decoder,
        names=lambda config: {
            **names(config),
            "head.out": token if config.head and config.head.task == "token" else "score",
        },
        prefix=prefix,
        derived=derived,
        copies=copies,
    )


def _encoder(name: str, read: Any, names: Any, *, prefix: str, head: str) -> Family:
    """`head` is what names the tied weight and bias of the masked-LM head, which some files repeat."""
    return Family(
        architecture=name,
        read=read,
        build=Encoder,
        names=names,
        prefix=prefix,
        derived=r"(.*\.)?embeddings\.(position_ids|token_type_ids)",
        spellings=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
        copies={f"{head}.weight": "embed_tokens.weight", f"{head}.bias": "head.bias"},
    )


def _roberta(name: str) -> Family:
    return _encoder(name, e.read_roberta, e.roberta_names, prefix="roberta.", head="lm_head.decoder")


def _t5(name: str, read: Any) -> Family:
    return Family(architecture=name, read=read, build=EncoderDecoder, names=s.t5_names, copies=s.T5_COPIES)


def _seeing(name: str, read: Any, build: Any, names: Any, prefix: str = "") -> Family:
    derived = r".*\.(position_ids|inv_freq)"
    return Family(architecture=name, read=read, build=build, names=names, prefix=prefix, derived=derived)


def _llava(name: str, read: Any) -> Family:
    family = _seeing(name, read, VisionLanguage, v.vision_language_names)
    return replace(family, spellings=v.SPELLINGS, copies={"lm_head.weight": "language.embed_tokens.weight"})


WRITERS = {"gpt2": g.write_gpt2, "llama": d.write_llama, "qwen3": d.write_llama, "ownlm": write_own}
MASKS = r".*attn(\.attention)?\.(bias|masked_bias)|.*attention\.(bias|masked_bias)|.*rotary_emb\.inv_freq"

FAMILIES: dict[str, Family] = {
    "gpt2": _decoder(
        "GPT2LMHeadModel", g.read_gpt2, g.gpt2_names, prefix="transformer.", derived=MASKS, token="classifier"
    ),
    "gpt_neo": _decoder(
        "GPTNeoForCausalLM", g.read_gpt_neo, g.gpt_neo_names, prefix="transformer.", derived=MASKS, token="classifier"
    ),
    "gpt_neox": _decoder(
        "GPTNeoXForCausalLM", g.read_gpt_neox, g.gpt_neox_names, prefix="gpt_neox.", derived=MASKS, token="classifier"
    ),
    "llama": _decoder("LlamaForCausalLM", d.read_llama),
    "mistral": _decoder("MistralForCausalLM", d.read_mistral),
    "mixtral": _decoder("MixtralForCausalLM", d.read_mixtral, d.mixtral_names),
    "phi": _decoder("PhiForCausalLM", d.read_phi, d.phi_names),
    "phi3": _decoder("Phi3ForCausalLM", d.read_phi3, d.phi3_names),
    "gemma": _decoder("GemmaForCausalLM", d.read_gemma),
    "gemma2": _decoder("Gemma2ForCausalLM", d.read_gemma2, d.gemma2_names),
    "gemma3_text": _decoder("Gemma3ForCausalLM", d.read_gemma3, d.gemma2_names),
    "qwen2": _decoder("Qwen2ForCausalLM", d.read_qwen2),
    "qwen3": _decoder("Qwen3ForCausalLM", d.read_qwen3),
    "qwen3_moe": _decoder("Qwen3MoeForCausalLM", d.read_qwen3_moe, d.qwen3_moe_names),
    "gpt_oss": _decoder("GptOssForCausalLM", d.read_gpt_oss, d.gpt_oss_names),
    "grok-1": _decoder("Grok1ModelForCausalLM", d.read_grok, d.grok_names),
    "bert": _encoder("BertForMaskedLM", e.read_bert, e.bert_names, prefix="bert.", head="cls.predictions.decoder"),
    "roberta": _roberta("RobertaForMaskedLM"),
    "xlm-roberta": _roberta("XLMRobertaForMaskedLM"),
    "camembert": _roberta("CamembertForMaskedLM"),
    "distilbert": _encoder(
        "DistilBertForMaskedLM", e.read_distilbert, e.distilbert_names, prefix="distilbert.", head="vocab_projector"
    ),
    "t5": _t5("T5ForConditionalGeneration", s.read_t5),
    "mt5": _t5("MT5ForConditionalGeneration", s.read_mt5),
    "xlnet": Family(
        architecture="XLNetLMHeadModel",
        read=s.read_xlnet,
        build=TwoStream,
        names=s.xlnet_names,
        prefix="transformer.",
        copies=s.XLNET_COPIES,
    ),
    "vit": _seeing("ViTForImageClassification", v.read_vit, VisionTower, v.vit_names, "vit."),
    "clip": _seeing("CLIPModel", v.read_clip, DualTower, v.clip_names),
    "clip_text_model": _seeing("CLIPTextModel", v.read_clip_text, TextTower, v.clip_text_names, "text_model."),
    "clip_vision_model": _seeing(
        "CLIPVisionModel", v.read_clip_vision, VisionTower, v.clip_vision_names, "vision_model."
    ),
    "pixtral": _seeing("PixtralVisionModel", v.read_pixtral, VisionTower, v.pixtral_names),
    "llava": _llava("LlavaForConditionalGeneration", v.read_llava),
    "mistral3": _llava("Mistral3ForConditionalGeneration", v.read_mistral3),
    "ownlm": _decoder("Decoder", read_own, own_names),
}
