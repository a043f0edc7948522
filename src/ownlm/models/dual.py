"""The dual tower: CLIP, texts and images as vectors of one space (arXiv:2103.00020).

    tokens ─ causal decoder ─ hidden of the end token ─ head ─┐
                                                              ├─ exp(logit_scale) * cosine
    images ─ vision tower ─ class token ─ head ───────────────┘

Shapes: B texts, T tokens, I images, F features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ownlm.models.decoder import Decoder, DecoderConfig
from ownlm.models.vision import VisionConfig, VisionTower


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """A decoder without a head over its vocabulary, read at the first `eos_id` of a text; None: at the highest id of the
    text, which the end token has in the first CLIP vocabularies. `head` is the size of the shared space."""

    decoder: DecoderConfig
    eos_id: int | None
    head: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DualConfig:
    text: TextConfig
    vision: VisionConfig


class TextTower(nn.Module):
    """`tower(tokens_BT)` gives hidden states, `tower.features(tokens_BT)` one vector for each text."""

    def __init__(self, config: TextConfig, hf: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config, self.hf = config, hf
        self.decoder = Decoder(config.decoder)
        width = config.decoder.hidden_size
        self.head = None if config.head is None else nn.Linear(width, config.head, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """hidden_BTD, the final norm applied. Whatever follows the end token changes nothing before it."""
        hidden_BTD: Tensor = self.decoder(tokens_BT)
        return hidden_BTD

    def features(self, tokens_BT: Tensor) -> Tensor:
        """One vector for each text, (B, D or head): the hidden state of its end token, through the head."""
        eos = self.config.eos_id
        place_B = (tokens_BT if eos is None else (tokens_BT == eos).int()).argmax(-1)
        x_BD = self(tokens_BT)[torch.arange(len(tokens_BT), device=tokens_BT.device), place_B]
        features_BF: Tensor = x_BD if self.head is None else self.head(x_BD)
        return features_BF


class DualTower(nn.Module):
    """Texts and images in one space. `hf` is the config.json it came with, which is written back when it is saved."""

    def __init__(self, config: DualConfig, hf: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config, self.hf = config, hf
        self.text, self.vision = TextTower(config.text), VisionTower(config.vision)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # the paper's temperature, 2.5

    def text_features(self, tokens_BT: Tensor) -> Tensor:
        """(B, F), of any length."""
        return self.text.features(tokens_BT)

    def image_features(self, images: Tensor) -> Tensor:
        """(I, C, H, W) -> (I, F), of any length."""
        return self.vision.features(images)

    def similarity(self, image_IF: Tensor, text_BF: Tensor) -> Tensor:
        """(I, B) logits of "this text belongs to that image", from features."""
        return self.logit_scale.exp() * F.normalize(image_IF, dim=-1) @ F.normalize(text_BF, dim=-1).T

    def forward(self, images: Tensor, tokens_BT: Tensor) -> Tensor:
        """(I, B) logits of every image with every text."""
        return self.similarity(self.image_features(images), self.text_features(tokens_BT))
