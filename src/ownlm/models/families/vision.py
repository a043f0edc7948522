"""The families that see: ViT, CLIP and its towers, Pixtral's tower, LLaVA and Mistral 3."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ownlm.models.dual import DualConfig, TextConfig
from ownlm.models.families.decoders import LLAMA, gpt, llama, read_mistral, read_qwen2
from ownlm.models.families.fields import Fields
from ownlm.models.families.heads import class_of, labels
from ownlm.models.families.layers import WIDTH, gpt_layer, multi_head, repeated
from ownlm.models.names import Table, To, block, nested
from ownlm.models.specs import FeedForward, Layer, Norm, Rotary
from ownlm.models.vision import VisionConfig
from ownlm.models.vision_language import VisionLanguageConfig

# The hub's files leave out what equals the defaults of transformers' classes.
VIT: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 16, "layer_norm_eps": 1e-12,
}  # fmt: skip
CLIP_TEXT: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "projection_dim": 512, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 49407,
}  # fmt: skip
CLIP_VISION = VIT | {"projection_dim": 512, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
PIXTRAL: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 1024, "patch_size": 16, "hidden_act": "gelu",
}  # fmt: skip
DECODER: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "sliding_window": 4096,
}  # fmt: skip
MISTRAL = DECODER | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SIDE, PATCH = 2**14, 2**10  # pixels; no tower comes near these


def tower(fields: Fields, layer: Layer, **others: Any) -> VisionConfig:
    """The fields that all towers share."""
    size, patch = fields.count("image_size", at_most=SIDE), fields.count("patch_size", at_most=PATCH)
    if patch > size:
        fields.faults.append(f"patch_size {patch} is more than image_size {size}")
    return VisionConfig(
        hidden_size=fields.count("hidden_size"),
        image_size=size,
        patch_size=patch,
        layers=repeated(fields, layer),
        channels=fields.count("num_channels", 3, at_most=PATCH),
        norm=layer.norm,
        **others,
    )


# ── ViT ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_vit(fields: Fields) -> VisionConfig:
    """arXiv:2010.11929. With a classifier or a pooler, as the files have it."""
    fields.only(quantization_config=None, pooler_act="tanh", pooler_output_size=fields.count("hidden_size"))
    names = labels(fields)
    classifies = fields.holds("classifier.weight", class_of(fields.config) != "ViTModel")
    return tower(
        fields,
        gpt_layer(fields, attention={"bias": fields.flag("qkv_bias", True)}),
        patch_bias=True,
        class_token=True,
        last_norm="all",
        head=len(names) if classifies else None,
        labels=names if classifies else (),
        pooler=fields.holds("pooler.dense.weight", not classifies),
    )


def vit_names(config: VisionConfig) -> Table:
    return {
        "class_token": To("vit.embeddings.cls_token", "leading", 2),
        "positions.weight": To("vit.embeddings.position_embeddings", "leading", 1),
        "patches.weight": To("vit.embeddings.patch_embeddings.projection.weight", "flat", config.patch_size),
        "patches.bias": "vit.embeddings.patch_embeddings.projection.bias",
        **block(
            "vit.encoder.layer.{}.attention", attention="attention.query attention.key attention.value output.dense"
        ),
        **block(
            "vit.encoder.layer.{}", norms="layernorm_before layernorm_after", mlp="intermediate.dense output.dense"
        ),
        "last_norm": "vit.layernorm",
        "pooler": "vit.pooler.dense",
        "head": "classifier",
    }


# ── CLIP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_clip(fields: Fields) -> DualConfig:
    fields.only(quantization_config=None)
    size = fields.count("projection_dim", 512, at_most=WIDTH)
    text, vision = _part(fields, "text_config", CLIP_TEXT), _part(fields, "vision_config", CLIP_VISION)
    return DualConfig(
        text=replace(read_clip_text(text), head=size), vision=replace(read_clip_vision(vision), head=size)
    )


def _part(fields: Fields, name: str, defaults: Mapping[str, Any]) -> Fields:
    """A table within the config; old files have a second one, which wins together with the defaults."""
    part, later = fields.table(name, defaults), fields.get(f"{name}_dict")
    part.config = {**part.config, **defaults, **later} if isinstance(later, Mapping) else part.config
    return part


def read_clip_text(fields: Fields) -> TextConfig:
    """The text tower: GPT-2's shape with a sigmoid gelu. Alone, with a projection where the files have one."""
    eos, size = fields.count("eos_token_id"), fields.count("projection_dim", at_most=WIDTH)
    return TextConfig(
        decoder=gpt(fields, tie_embeddings=True),  # no head over the vocabulary
        eos_id=None if eos == 2 else eos,  # 2 is a mistake of the first files, as transformers reads them
        head=size if fields.holds("text_projection.weight", False) else None,
    )


def read_clip_vision(fields: Fields) -> VisionConfig:
    size = fields.count("projection_dim", at_most=WIDTH)
    head = size if fields.holds("visual_projection.weight", False) else None
    return tower(fields, gpt_layer(fields), class_token=True, first_norm=True, last_norm="class", head=head)


def _clip_block(ours: str, stored: str) -> Table:
    attention = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj"
    return block(stored, ours, attention=attention, norms="layer_norm1 layer_norm2", mlp="mlp.fc1 mlp.fc2")


CLIP_TEXT_NAMES: Table = {
    "decoder.embed_tokens": "text_model.embeddings.token_embedding",
    "decoder.embed_positions": "text_model.embeddings.position_embedding",
    **_clip_block("decoder.layers.{}", "text_model.encoder.layers.{}"),
    "decoder.norm": "text_model.final_layer_norm",
    "head": "text_projection",
}


def clip_vision_names(config: VisionConfig) -> Table:
    return {
        "class_token": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding",
        "patches.weight": To("vision_model.embeddings.patch_embedding.weight", "flat", config.patch_size),
        "first_norm": "vision_model.pre_layrnorm",
        **_clip_block("layers.{}", "vision_model.encoder.layers.{}"),
        "last_norm": "vision_model.post_layernorm",
        "head": "visual_projection",
    }


def clip_names(config: DualConfig) -> Table:
    towers = nested(CLIP_TEXT_NAMES, "text.", "") | nested(clip_vision_names(config.vision), "vision.", "")
    return towers | {"logit_scale": To("logit_scale", "scalar")}


# ── Pixtral, LLaVA, Mistral 3 ────────────────────────────────────────────────────────────────────────────────────────


def read_pixtral(fields: Fields) -> VisionConfig:
    rope = fields.table("rope_parameters", {"rope_theta": fields.number("rope_theta", 10_000.0)})
    rope.choice("rope_type", {"axial": True, "default": True}, "axial")
    layer = Layer(
        attention=multi_head(fields),
        mlp=FeedForward(size=fields.count("intermediate_size", at_most=WIDTH), activation=fields.activation()),
        norm=Norm(eps=1e-5),
        rotary=Rotary(theta=rope.number("rope_theta")),
    )
    if layer.attention.head_dim % 4:
        fields.faults.append("the width of a head must be a multiple of 4: pairs of it turn by row and by column")
    return tower(fields, layer, first_norm=True)


def pixtral_names(config: VisionConfig) -> Table:
    return {
        "patches.weight": To("patch_conv.weight", "flat", config.patch_size),
        "first_norm": "ln_pre",
        "layers.{}.self_attn": "transformer.layers.{}.attention",
        "layers.{}.mlp": "transformer.layers.{}.feed_forward",
        **block("transformer.layers.{}", norms="attention_norm ffn_norm"),
    }


# What a part may be: by model_type its reader and the defaults of its fields.
Kinds = dict[str, tuple[Callable[[Fields], Any], Mapping[str, Any]]]
TEXTS: Kinds = {"mistral": (read_mistral, MISTRAL), "llama": (llama, DECODER), "qwen2": (read_qwen2, DECODER)}
VISIONS: Kinds = {"pixtral": (read_pixtral, PIXTRAL), "clip_vision_model": (read_clip_vision, CLIP_VISION)}


def read_llava(fields: Fields) -> VisionLanguageConfig:
    config = _vision_language(fields, state=-2)
    full = fields.choice("vision_feature_select_strategy", {"default": False, "full": True}, "default")
    if not full and not config.vision.class_token:
        fields.faults.append(
            "vision_feature_select_strategy 'default' drops a class token that this tower doesn't have"
        )
    return replace(config, class_token=full and config.vision.class_token)


def read_mistral3(fields: Fields) -> VisionLanguageConfig:
    config = _vision_language(fields, state=-1, bias=False)
    if config.vision.rotary is None:
        fields.faults.append("vision_config must be of model_type 'pixtral'")
    if len(config.states) > 1:
        fields.faults.append("vision_feature_layer must be one number")
    merge = fields.count("spatial_merge_size", 2, at_most=PATCH)
    return replace(config, merge=merge, first_norm=replace(config.text.norm, offset=0.0))


def _vision_language(fields: Fields, *, state: int, bias: bool = True) -> VisionLanguageConfig:
    fields.only(quantization_config=None)
    text, vision = _kind(fields, "text_config", TEXTS), _kind(fields, "vision_config", VISIONS)
    flags = [fields.flag("tie_word_embeddings", False), text.tie_embeddings]
    tied = not fields.holds("lm_head.weight", not any(flags))  # the configs contradict themselves, and the files don't
    states = fields.get("vision_feature_layer", state)
    states = tuple(states) if isinstance(states, list) else (states,)
    count = len(vision.layers)
    if not states or not all(type(n) is int and -count - 1 <= n <= count for n in states):
        fields.faults.append(f"vision_feature_layer {states} is beyond the {count} layers of the tower")
        states = (-1,)
    name = "image_token_id" if "image_token_id" in fields.config else "image_token_index"
    return VisionLanguageConfig(
        vision=replace(vision, head=None),
        text=replace(text, tie_embeddings=tied),
        image_token=fields.count(name, 32_000 if state == -2 else 10),
        states=states,
        activation=fields.activation("projector_hidden_act", "gelu"),
        bias=fields.flag("multimodal_projector_bias", bias),
    )


def _kind(fields: Fields, name: str, kinds: Kinds) -> Any:
    """What a table within the config describes, by its model_type; the first kind where it doesn't say."""
    table, default = fields.get(name), next(iter(kinds))
    kind = table.get("model_type", default) if isinstance(table, Mapping) else default
    if not isinstance(kind, str) or kind not in kinds:
        fields.faults.append(f"{name}.model_type {kind!r} is not supported here (supported: {', '.join(kinds)})")
        kind = default
    read, defaults = kinds[kind]
    return read(_part(fields, name, defaults))


def vision_language_names(config: VisionLanguageConfig) -> Table:
    seen = pixtral_names if config.vision.rotary is not None else clip_vision_names
    return {
        **nested(seen(config.vision), "vision.", "vision_tower."),
        **nested(LLAMA, "language.", "language_model."),
        "projector": "multi_modal_projector",
        "projector.merge": "multi_modal_projector.patch_merger.merging_layer",
    }


# Files written from transformers 5's modules, and its CLIP towers, which have lost a level.
SPELLINGS = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_tower.vision_model.\1."),
)
