"""transformers' ViT, CLIP, Pixtral, LLaVA and Mistral 3 with loud random weights, what they read, and what they make of it."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8,
    "image_size": 32,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLIP_TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 20, "bos_token_id": 95, "eos_token_id": 90, "pad_token_id": 0,
}  # fmt: skip
PIXTRAL = TOWER | {"model_type": "pixtral", "image_size": 64}
CLIP_TOWER = TOWER | {"model_type": "clip_vision_model"}
CLIP = {"model_type": "clip", "text_config": CLIP_TEXT, "vision_config": TOWER, "projection_dim": 16}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", {"model_type": "vit", **TOWER, "num_labels": 5}),
    "vit-bare": ("ViTModel", {"model_type": "vit", **TOWER, "qkv_bias": False, "image_size": 48}),
    "clip": ("CLIPModel", CLIP),
    "clip-legacy": ("CLIPModel", CLIP | {"text_config": CLIP_TEXT | {"eos_token_id": 2}}),
    "clip-text": ("CLIPTextModel", {"model_type": "clip_text_model", **CLIP_TEXT}),
    "clip-text-projected": ("CLIPTextModelWithProjection", {"model_type": "clip_text_model", **CLIP_TEXT}),
    "clip-vision": ("CLIPVisionModel", CLIP_TOWER),
    "clip-vision-projected": ("CLIPVisionModelWithProjection", CLIP_TOWER | {"projection_dim": 16}),
    "pixtral": ("PixtralVisionModel", PIXTRAL),
    "llava-pixtral": (
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava", "text_config": TEXT | {"model_type": "mistral"}, "vision_config": PIXTRAL,
            "image_token_index": 10, "vision_feature_select_strategy": "full", "vision_feature_layer": -1,
        },
    ),
    "llava-clip": (
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava", "text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP_TOWER,
            "image_token_index": 10,
        },
    ),
    "llava-clip-full": (
        "LlavaForConditionalGeneration",
        {
            "model_type": "llava", "text_config": TEXT | {"model_type": "qwen2"}, "vision_config": CLIP_TOWER,
            "image_token_index": 10, "vision_feature_select_strategy": "full", "vision_feature_layer": [-2, 1],
            "projector_hidden_act": "gelu_pytorch_tanh", "multimodal_projector_bias": False,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "model_type": "mistral3", "text_config": TEXT | {"model_type": "mistral"}, "vision_config": PIXTRAL,
            "image_token_index": 10, "spatial_merge_size": 2, "tie_word_embeddings": False, "vision_feature_layer": -2,
        },
    ),
    "mistral3-tied": (
        "Mistral3ForConditionalGeneration",
        {
            "model_type": "mistral3", "text_config": TEXT | {"model_type": "mistral"}, "vision_config": PIXTRAL,
            "image_token_index": 10, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


def loud(kind: str, config: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model whose every weight matters."""
    made = transformers.AutoConfig.for_model(**config)
    model = getattr(transformers, kind)._from_config(made, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            norm = "norm" in key or "ln_pre" in key
            parameter.copy_(noise + 1.0 if norm and key.endswith("weight") else noise)
    return model.eval()


def save(name: str, path: Path, seed: int = 0) -> Any:
    """One of CONFIGS, written to `path`."""
    model = loud(*CONFIGS[name], seed=seed)
    model.save_pretrained(path)
    return model


def pixels(*sizes: tuple[int, int], seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, height, width, generator=generator) for height, width in sizes]


SQUARE = torch.stack(pixels((32, 32), (32, 32)))
MANY = pixels((32, 48), (64, 16), (16, 16))  # patches: 4 × 6, 8 × 2, 2 × 2


def padded(images: list[Tensor]) -> dict[str, Tensor]:
    """What transformers takes for images of several sizes."""
    height, width = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    batch = torch.stack([torch.nn.functional.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images])
    return {"pixel_values": batch, "image_sizes": torch.tensor([i.shape[1:] for i in images])}


def texts() -> Tensor:
    """Five texts: one end token, several, padding of two kinds, the end at the last place, and none."""
    ids = torch.randint(3, 90, (5, 20), generator=torch.Generator().manual_seed(4))
    ids[0, 7:] = 0
    ids[0, 6] = 90
    ids[1, 9:] = 90
    ids[2, [4, 11]] = 90
    ids[3, -1] = 90
    return ids


def prompt(*counts: int) -> Tensor:
    """Text, so many image tokens, text, …"""
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randint(11, 97, (4,), generator=generator)]
    for count in counts:
        parts += [torch.full((count,), 10), torch.randint(11, 97, (3,), generator=generator)]
    return torch.cat(parts)[None]


def theirs(name: str, model: Any) -> Tensor:
    with torch.no_grad():
        if name in ("vit", "clip", "clip-legacy"):
            given = {} if name == "vit" else {"input_ids": texts()}
            out = model(pixel_values=SQUARE, **given)
            return out.logits if name == "vit" else out.logits_per_image
        if name == "vit-bare":
            return model(pixel_values=SQUARE, interpolate_pos_encoding=True).pooler_output
        if name.startswith("clip-text"):
            out = model(input_ids=texts())
            return out.text_embeds if "projected" in name else out.pooler_output
        if name.startswith("clip-vision"):
            out = model(pixel_values=SQUARE)
            return out.image_embeds if "projected" in name else out.pooler_output
        if name == "pixtral":
            return model(**padded(MANY)).last_hidden_state
        if name == "llava-pixtral":
            return model(input_ids=prompt(24, 16, 4), **padded(MANY)).logits
        if name.startswith("mistral3"):
            return model(input_ids=prompt(6, 4, 1), **padded(MANY)).logits
        count = 17 if name.endswith("full") else 16
        return model(input_ids=prompt(count, count), pixel_values=SQUARE).logits


def digests(path: Path) -> dict[str, str]:
    tensors = load_file(path / "model.safetensors")
    return {
        name: hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, t in tensors.items()
    }


def plain(name: str) -> str:
    """Without the prefixes that files of bare models and of CLIP towers within LLaVA have or have not."""
    return re.sub(r"^(vit|vision_model|text_model)\.|(?<=^vision_tower\.)vision_model\.", "", name)
