"""The families that see: ViT, CLIP and its towers, Pixtral's tower, LLaVA and Mistral 3."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ownlm.models.decoder import DecoderConfig
from ownlm.models.dual import DualConfig, TextConfig
from ownlm.models.families import decoders as d
from ownlm.models.families import gpt as g
from ownlm.models.families.fields import Fields
from ownlm.models.names import Table, To, nested
from ownlm.models.specs import Attention, FeedForward, Layer, Norm, Rotary
from ownlm.models.vision import VisionConfig
from ownlm.models.vision_language import VisionLanguageConfig

# The hub's files leave out what equals the defaults of transformers' classes.
CLIP_TEXT: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "projection_dim": 512, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}  # fmt: skip
CLIP_VISION: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
PIXTRAL: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 1024, "patch_size": 16, "hidden_act": "gelu",
}  # fmt: skip
DECODER: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
MISTRAL: dict[str, Any] = DECODER | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
# The decoders that images are put before: by model_type their reader and the defaults of their fields.
TEXTS = {"llama": (d.read_llama, DECODER), "mistral": (d.read_mistral, MISTRAL), "qwen2": (d.read_qwen2, DECODER)}
SIDE, PATCH = 2**14, 2**10  # pixels; no tower comes near these


def tower(fields: Fields, norm: Norm, mlp: Mapping[str, Any], **others: Any) -> VisionConfig:
    """The fields that all towers share; `mlp` are further fields of the feed-forward's spec, `others` of the config."""
    width, heads = fields.count("hidden_size", 768), fields.count("num_attention_heads", 12, at_most=d.HEADS)
    if width % heads:
        fields.faults.append(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    size, patch = fields.count("image_size", 224, at_most=SIDE), fields.count("patch_size", 16, at_most=PATCH)
    if patch > size:
        fields.faults.append(f"patch_size {patch} is more than image_size {size}")
    layer = Layer(
        attention=Attention(
            num_heads=heads, num_kv_heads=heads, head_dim=max(1, width // heads), **others.pop("attention")
        ),
        mlp=FeedForward(
            size=fields.count("intermediate_size", 4 * width, at_most=d.WIDTH),
            activation=fields.activation("hidden_act", "gelu"),
            **mlp,
        ),
        norm=norm,
        rotary=others.pop("rotary", None),
    )
    return VisionConfig(
        hidden_size=width,
        image_size=size,
        patch_size=patch,
        layers=(layer,) * fields.count("num_hidden_layers", 12, at_most=d.LAYERS),
        channels=fields.count("num_channels", 3, at_most=PATCH),
        norm=norm,
        **others,
    )


# ── ViT ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_vit(fields: Fields) -> VisionConfig:
    """arXiv:2010.11929. With a classifier or a pooler, as the files have it."""
    fields.only(quantization_config=None, pooler_act="tanh")
    labels = read_labels(fields)
    classifies = fields.holds("classifier.weight", "ViTModel" not in (fields.config.get("architectures") or ()))
    config = tower(
        fields,
        Norm(kind="layer", eps=fields.number("layer_norm_eps", 1e-12)),
        {"gated": False, "bias": True},
        attention={"bias": fields.flag("qkv_bias", True), "output_bias": True},
        patch_bias=True,
        class_token=True,
        last_norm="all",
        head=len(labels) if classifies else None,
        labels=labels if classifies else (),
        pooler=fields.holds("pooler.dense.weight", not classifies),
    )
    fields.only(pooler_output_size=config.hidden_size)
    return config


def read_labels(fields: Fields) -> tuple[str, ...]:
    """The names of a classifier's classes: id2label, or LABEL_0 … of num_labels (2)."""
    table = fields.config.get("id2label")
    if table is None:
        return tuple(f"LABEL_{n}" for n in range(fields.count("num_labels", 2)))
    names = {str(key): value for key, value in table.items()} if isinstance(table, Mapping) else {}
    if not names or set(names) != set(map(str, range(len(names)))):
        fields.faults.append("id2label must name the classes 0, 1, 2, …")
        return ("",)
    return tuple(str(names[str(n)]) for n in range(len(names)))


def vit_names(config: VisionConfig) -> Table:
    block, stored = "layers.{}.", "vit.encoder.layer.{}."
    return {
        "class_token": To("vit.embeddings.cls_token", "leading", 2),
        "positions.weight": To("vit.embeddings.position_embeddings", "leading", 1),
        "patches.weight": To("vit.embeddings.patch_embeddings.projection.weight", "flat", config.patch_size),
        "patches.bias": "vit.embeddings.patch_embeddings.projection.bias",
        f"{block}input_layernorm": f"{stored}layernorm_before",
        f"{block}self_attn.q_proj": f"{stored}attention.attention.query",
        f"{block}self_attn.k_proj": f"{stored}attention.attention.key",
        f"{block}self_attn.v_proj": f"{stored}attention.attention.value",
        f"{block}self_attn.o_proj": f"{stored}attention.output.dense",
        f"{block}post_attention_layernorm": f"{stored}layernorm_after",
        f"{block}mlp.up_proj": f"{stored}intermediate.dense",
        f"{block}mlp.down_proj": f"{stored}output.dense",
        "last_norm": "vit.layernorm",
        "pooler": "vit.pooler.dense",
        "head": "classifier",
    }


# ── CLIP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_clip(fields: Fields) -> DualConfig:
    fields.only(quantization_config=None)
    size = fields.count("projection_dim", 512, at_most=d.WIDTH)
    text, vision = _part(fields, "text_config", CLIP_TEXT), _part(fields, "vision_config", CLIP_VISION)
    return DualConfig(
        text=replace(read_clip_text(text), head=size), vision=replace(read_clip_vision(vision), head=size)
    )


def _part(fields: Fields, name: str, defaults: Mapping[str, Any]) -> Fields:
    """A table within the config over its defaults; old files have a second one, which wins together with the defaults."""
    part = fields.table(name) if fields.config.get(name) is not None else Fields({}, fields.stored)
    part.faults = fields.faults
    later = fields.config.get(f"{name}_dict")
    part.config = {**defaults, **part.config, **({**defaults, **later} if isinstance(later, Mapping) else {})}
    return part


def read_clip_text(fields: Fields) -> TextConfig:
    """The text tower: GPT-2's shape with a sigmoid gelu. Alone, with a projection where the files have one."""
    fields.config = {**CLIP_TEXT, **fields.config}
    decoder = g.gpt(
        fields,
        width="hidden_size",
        layers="num_hidden_layers",
        heads="num_attention_heads",
        inner="intermediate_size",
        context="max_position_embeddings",
        activation="hidden_act",
        eps="layer_norm_eps",
        default="quick_gelu",
    )
    eos = fields.count("eos_token_id")
    size = fields.count("projection_dim", at_most=d.WIDTH)
    return TextConfig(
        decoder=replace(decoder, tie_embeddings=True),  # no head over the vocabulary
        eos_id=None if eos == 2 else eos,  # 2 is a mistake of the first files, as transformers reads them
        head=size if fields.holds("text_projection.weight", False) else None,
    )


def read_clip_vision(fields: Fields) -> VisionConfig:
    fields.config = {**CLIP_VISION, **fields.config}
    size = fields.count("projection_dim", at_most=d.WIDTH)
    return tower(
        fields,
        Norm(kind="layer", eps=fields.number("layer_norm_eps")),
        {"gated": False, "bias": True},
        attention={"bias": True, "output_bias": True},
        class_token=True,
        first_norm=True,
        last_norm="class",
        head=size if fields.holds("visual_projection.weight", False) else None,
    )


def _clip_blocks(ours: str, stored: str) -> Table:
    return {
        ours: stored,
        f"{ours}.self_attn.o_proj": f"{stored}.self_attn.out_proj",
        f"{ours}.input_layernorm": f"{stored}.layer_norm1",
        f"{ours}.post_attention_layernorm": f"{stored}.layer_norm2",
        f"{ours}.mlp.up_proj": f"{stored}.mlp.fc1",
        f"{ours}.mlp.down_proj": f"{stored}.mlp.fc2",
    }


def clip_text_names(config: TextConfig) -> Table:
    return {
        "decoder.embed_tokens": "text_model.embeddings.token_embedding",
        "decoder.embed_positions": "text_model.embeddings.position_embedding",
        **_clip_blocks("decoder.layers.{}", "text_model.encoder.layers.{}"),
        "decoder.norm": "text_model.final_layer_norm",
        "head": "text_projection",
    }


def clip_vision_names(config: VisionConfig) -> Table:
    return {
        "class_token": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding",
        "patches.weight": To("vision_model.embeddings.patch_embedding.weight", "flat", config.patch_size),
        "first_norm": "vision_model.pre_layrnorm",
        **_clip_blocks("layers.{}", "vision_model.encoder.layers.{}"),
        "last_norm": "vision_model.post_layernorm",
        "head": "visual_projection",
    }


def clip_names(config: DualConfig) -> Table:
    return {
        **nested(clip_text_names(config.text), "text.", ""),
        **nested(clip_vision_names(config.vision), "vision.", ""),
        "logit_scale": To("logit_scale", "scalar"),
    }


# ── Pixtral, LLaVA, Mistral 3 ────────────────────────────────────────────────────────────────────────────────────────


def read_pixtral(fields: Fields) -> VisionConfig:
    fields.config = {**PIXTRAL, **fields.config}
    rope = fields.config.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        fields.faults.append(f"rope_type {rope['rope_type']!r} is not supported (only 'axial')")
    rotary = Rotary(theta=fields.number("rope_theta", fields.number("rope_theta", 10_000.0), of=rope))
    config = tower(fields, Norm(eps=1e-5), {}, attention={}, rotary=rotary, first_norm=True)
    if config.layers[0].attention.head_dim % 4:
        fields.faults.append("the width of a head must be a multiple of 4: pairs of it turn by row and by column")
    return config


def pixtral_names(config: VisionConfig) -> Table:
    block, stored = "layers.{}.", "transformer.layers.{}."
    return {
        "patches.weight": To("patch_conv.weight", "flat", config.patch_size),
        "first_norm": "ln_pre",
        f"{block}input_layernorm": f"{stored}attention_norm",
        f"{block}self_attn": f"{stored}attention",
        f"{block}post_attention_layernorm": f"{stored}ffn_norm",
        f"{block}mlp": f"{stored}feed_forward",
    }


VISIONS = {"pixtral": (read_pixtral, PIXTRAL), "clip_vision_model": (read_clip_vision, CLIP_VISION)}


def read_llava(fields: Fields) -> VisionLanguageConfig:
    config = _vision_language(fields, state=-2)
    strategy = fields.config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        fields.faults.append(f"vision_feature_select_strategy must be 'default' or 'full', got {strategy!r}")
    if strategy == "default" and not config.vision.class_token:
        fields.faults.append(
            "vision_feature_select_strategy 'default' drops a class token that this tower doesn't have"
        )
    return replace(config, class_token=strategy == "full" and config.vision.class_token)


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
    text, vision = _kind(fields, "text_config", TEXTS, "mistral"), _kind(fields, "vision_config", VISIONS, "pixtral")
    decoder: DecoderConfig = text
    flags = [fields.flag("tie_word_embeddings", False), decoder.tie_embeddings]
    tied = not fields.holds("lm_head.weight", not any(flags))  # the configs contradict themselves, and the files don't
    states = fields.config.get("vision_feature_layer", state)
    states = tuple(states) if isinstance(states, list) else (states,)
    count = len(vision.layers)
    if not states or not all(type(n) is int and -count - 1 <= n <= count for n in states):
        fields.faults.append(f"vision_feature_layer {states} is beyond the {count} layers of the tower")
        states = (-1,)
    name = "image_token_id" if "image_token_id" in fields.config else "image_token_index"
    return VisionLanguageConfig(
        vision=replace(vision, head=None),
        text=replace(decoder, tie_embeddings=tied),
        image_token=fields.count(name, 32_000 if state == -2 else 10),
        states=states,
        activation=fields.activation("projector_hidden_act", "gelu"),
        bias=fields.flag("multimodal_projector_bias", bias),
    )


def _kind(fields: Fields, name: str, kinds: Mapping[str, Any], default: str) -> Any:
    """What a table within the config describes, by its model_type."""
    table = fields.config.get(name)
    kind = table.get("model_type", default) if isinstance(table, Mapping) else default
    if kind not in kinds:
        fields.faults.append(f"{name}.model_type {kind!r} is not supported here (supported: {', '.join(kinds)})")
        kind = default
    read, defaults = kinds[kind]
    return read(_part(fields, name, defaults))


def vision_language_names(config: VisionLanguageConfig) -> Table:
    seen = pixtral_names if config.vision.rotary is not None else clip_vision_names
    return {
        **nested(seen(config.vision), "vision.", "vision_tower."),
        **nested(d.llama_names(config.text), "language.", "language_model."),
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
