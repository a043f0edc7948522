"""Model families: what a config.json means, and what the tensors of its checkpoint are called.

    config.json ─► FAMILIES[model_type] ─► read(fields) ─► our config ─► build ─► module
                                       └─► names(config) ─► which stored tensor is made of which of ours

A family is a function, a table and a row in the dict at the end; none has a module of its own.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ownlm.errors import UserError
from ownlm.models.decoder import Decoder, DecoderConfig
from ownlm.models.dual import DualTower, TextTower
from ownlm.models.encoder import Encoder
from ownlm.models.encoder_decoder import EncoderDecoder
from ownlm.models.families import decoders as d
from ownlm.models.families import encoders as e
from ownlm.models.families import own
from ownlm.models.families import seq2seq as s
from ownlm.models.families import vision as v
from ownlm.models.families.family import Family
from ownlm.models.families.fields import Fields
from ownlm.models.names import Table, fixed, moved
from ownlm.models.specs import Rotary
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
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1, cutoff=0.4)
        raise UserError(
            f"model_type {kind!r} is not a family ownlm knows.",
            where=where,
            cure=f"{f'Did you mean {near[0]!r}? ' if near else ''}Known: {', '.join(FAMILIES)}.",
        )
    read, faults = _read(config, FAMILIES[kind], stored)
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)) + ".", where=where)
    return read, FAMILIES[kind]


def _read(config: Mapping[str, Any], family: Family, stored: frozenset[str] | None = None) -> tuple[Any, list[str]]:
    fields = Fields(config, stored, spelled=family.spelled, defaults=family.defaults)
    read = family.read(fields)
    return read, fields.faults or _contradictions(read)


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


def family_of(config: DecoderConfig) -> str:
    """The model_type under which a shape of our own is saved: one that transformers knows if its fields can tell all of it,
    else "ownlm"."""
    shared = config.hidden_size % config.layers[0].attention.num_heads == 0
    for kind in own.WRITTEN:
        if _read(own.write(config, kind), FAMILIES[kind]) == (config, []):
            return kind if shared or kind != "llama" else "ownlm"  # transformers asks that of Llama alone
    return "ownlm"


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that describes a shape of our own; transformers loads it unchanged unless its model_type is "ownlm"."""
    kind = family_of(config)
    return {"architectures": [FAMILIES[kind].architecture], "model_type": kind} | own.write(config, kind)


# ── The rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Names = Table | Callable[[Any], Table]
ROTARY = r".*rotary_emb\.inv_freq"
MASKS = rf".*attn(\.attention)?\.(bias|masked_bias)|.*attention\.(bias|masked_bias)|{ROTARY}"
AS_IS: Mapping[str, str] = {}
GEMMA: dict[str, Any] = {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GPT2: dict[str, Any] = {
    "vocab_size": 50_257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 1024, "hidden_act": "gelu_new", "tie_word_embeddings": True,
}  # fmt: skip


def _decoder(
    name: str, read: Any, names: Names = d.LLAMA, *, prefix: str = "model.", derived: str = ROTARY,
    spelled: Mapping[str, str] = AS_IS, token: str = "score", span: str = "", **defaults: Any,
) -> Family:  # fmt: skip
    """`token` is what files call the head that labels tokens; one for whole texts is "score" everywhere. `span` begins all other names
    in files with a head for spans; empty: transformers has none in this family."""
    table = names if callable(names) else fixed(names)

    def names_of(config: DecoderConfig) -> Table:
        task = None if config.head is None else config.head.task
        body = moved(table(config), prefix, span) if task == "span" else table(config)
        return body | {"head.out": {"token": token, "span": "qa_outputs"}.get(str(task), "score")}

    return Family(
        architecture=name,
        read=lambda fields: d.with_task(fields, read(fields), span=bool(span)),
        spelled=spelled,
        defaults=defaults,
        build=Decoder,
        names=names_of,
        prefix=prefix,
        span_prefix=span,
        derived=derived,
        copies={"lm_head.weight": "embed_tokens.weight", "embed_out.weight": "embed_tokens.weight"},
    )


def _encoder(
    name: str, read: Any, body: Table, heads: e.Heads, *, prefix: str, head: str,
    spelled: Mapping[str, str] = AS_IS,
) -> Family:  # fmt: skip
    """`head` is what names the tied weight and bias of the masked-LM head, which some files repeat."""
    return Family(
        architecture=name,
        read=read,
        spelled=spelled,
        defaults={"layer_norm_eps": 1e-12},
        build=Encoder,
        names=lambda config: e.names(config, prefix, body, heads),
        prefix=prefix,
        derived=r"(.*\.)?embeddings\.(position_ids|token_type_ids)",
        spellings=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
        copies={f"{head}.weight": "embed_tokens.weight", f"{head}.bias": "head.bias"},
    )


def _roberta(name: str) -> Family:
    return _encoder(name, e.read_roberta, e.BERT, e.ROBERTA_HEADS, prefix="roberta.", head="lm_head.decoder")


def _t5(name: str, read: Any, **defaults: Any) -> Family:
    return Family(
        architecture=name,
        read=read,
        spelled=s.T5_FIELDS,
        defaults={"head_dim": 64} | defaults,
        build=EncoderDecoder,
        names=s.t5_names,
        copies={f"{stack}.embed_tokens.weight": "embed_tokens.weight" for stack in ("encoder", "decoder")},
    )


def _seeing(name: str, read: Any, build: Any, names: Names, prefix: str = "", **others: Any) -> Family:
    table, derived = names if callable(names) else fixed(names), r".*\.(position_ids|inv_freq)"
    return Family(
        architecture=name, read=read, build=build, names=table, prefix=prefix, derived=derived, **others
    )  # fmt: skip


def _llava(name: str, read: Any) -> Family:
    copies = {"lm_head.weight": "language.embed_tokens.weight"}
    return _seeing(name, read, VisionLanguage, v.vision_language_names, spellings=v.SPELLINGS, copies=copies)


FAMILIES: dict[str, Family] = {
    "gpt2": _decoder(
        "GPT2LMHeadModel", d.read_gpt2, d.GPT2, prefix="transformer.", derived=MASKS, spelled=d.GPT2_FIELDS,
        token="classifier", span="transformer.", **GPT2,
    ),
    "gpt_neo": _decoder(
        "GPTNeoForCausalLM", d.read_gpt_neo, d.GPT_NEO, prefix="transformer.", derived=MASKS, spelled=d.GPT_NEO_FIELDS,
        token="classifier", span="transformer.", window_size=256, **GPT2,
    ),
    "gpt_neox": _decoder(
        "GPTNeoXForCausalLM", d.read_gpt_neox, d.gpt_neox_names, prefix="gpt_neox.", derived=MASKS,
        spelled=d.GPT_NEOX_FIELDS, token="classifier", span="gpt_neox.", partial_rotary_factor=0.25,
        **GPT2 | {"hidden_act": "gelu", "tie_word_embeddings": False},
    ),
    "llama": _decoder("LlamaForCausalLM", d.llama, span="transformer."),
    "mistral": _decoder("MistralForCausalLM", d.read_mistral, span="model.", sliding_window=4096),
    "mixtral": _decoder(
        "MixtralForCausalLM", d.read_mixtral, d.MIXTRAL, span="model.", rope_theta=1e6, rms_norm_eps=1e-5, num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "phi": _decoder("PhiForCausalLM", d.read_phi, d.PHI, hidden_act="gelu_new", partial_rotary_factor=0.5),
    "phi3": _decoder("Phi3ForCausalLM", d.read_mistral, d.PHI3, rms_norm_eps=1e-5),
    "gemma": _decoder("GemmaForCausalLM", d.gemma, spelled=d.GEMMA_FIELDS, **GEMMA),
    "gemma2": _decoder(
        "Gemma2ForCausalLM", d.read_gemma2, d.GEMMA2, spelled=d.GEMMA_FIELDS, sliding_window=4096,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **GEMMA,
    ),
    "gemma3_text": _decoder(
        "Gemma3ForCausalLM", d.read_gemma3, d.GEMMA2, spelled=d.GEMMA_FIELDS, sliding_window=4096, rope_theta=1e6, **GEMMA,
    ),
    "qwen2": _decoder("Qwen2ForCausalLM", d.read_qwen2, span="transformer.", sliding_window=4096),
    "qwen3": _decoder("Qwen3ForCausalLM", d.read_qwen3, span="transformer.", sliding_window=4096, head_dim=128),
    "qwen3_moe": _decoder(
        "Qwen3MoeForCausalLM", d.read_qwen3_moe, d.QWEN3_MOE, span="transformer.", sliding_window=4096, head_dim=128, num_local_experts=128,
        num_experts_per_tok=8,
    ),
    "gpt_oss": _decoder(
        "GptOssForCausalLM", d.read_gpt_oss, d.GPT_OSS, head_dim=64, rope_theta=150_000.0, rms_norm_eps=1e-5,
        sliding_window=128, num_local_experts=128, num_experts_per_tok=4,
    ),
    "grok-1": _decoder(
        "Grok1ModelForCausalLM", d.read_grok, d.GROK, spelled={"num_local_experts": "num_experts"}, rms_norm_eps=1e-5,
        tie_word_embeddings=True, num_local_experts=8, num_experts_per_tok=2,
    ),
    "bert": _encoder(
        "BertForMaskedLM", e.read_bert, e.BERT, e.BERT_HEADS, prefix="bert.", head="cls.predictions.decoder"
    ),
    "roberta": _roberta("RobertaForMaskedLM"),
    "xlm-roberta": _roberta("XLMRobertaForMaskedLM"),
    "camembert": _roberta("CamembertForMaskedLM"),
    "distilbert": _encoder(
        "DistilBertForMaskedLM", e.read_distilbert, e.DISTILBERT, e.DISTILBERT_HEADS, prefix="distilbert.",
        head="vocab_projector", spelled=e.DISTILBERT_FIELDS,
    ),
    "t5": _t5("T5ForConditionalGeneration", s.read_t5),
    "mt5": _t5("MT5ForConditionalGeneration", s.read_mt5, feed_forward_proj="gated-gelu"),
    "xlnet": Family(
        architecture="XLNetLMHeadModel", read=s.read_xlnet, spelled=s.XLNET_FIELDS, defaults={"layer_norm_eps": 1e-12},
        build=TwoStream, names=s.xlnet_names, prefix="transformer.", copies={"lm_loss.weight": "embed_tokens.weight"},
    ),
    "vit": _seeing("ViTForImageClassification", v.read_vit, VisionTower, v.vit_names, "vit.", defaults=v.VIT),
    "clip": _seeing("CLIPModel", v.read_clip, DualTower, v.clip_names),
    "clip_text_model": _seeing(
        "CLIPTextModel", v.read_clip_text, TextTower, v.CLIP_TEXT_NAMES, "text_model.", defaults=v.CLIP_TEXT
    ),
    "clip_vision_model": _seeing(
        "CLIPVisionModel", v.read_clip_vision, VisionTower, v.clip_vision_names, "vision_model.", defaults=v.CLIP_VISION
    ),
    "pixtral": _seeing("PixtralVisionModel", v.read_pixtral, VisionTower, v.pixtral_names, defaults=v.PIXTRAL),
    "llava": _llava("LlavaForConditionalGeneration", v.read_llava),
    "mistral3": _llava("Mistral3ForConditionalGeneration", v.read_mistral3),
    "ownlm": _decoder("Decoder", own.read_own, own.OWN, span="model."),
}  # fmt: skip
