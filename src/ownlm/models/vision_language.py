"""Images in a decoder's context: LLaVA (arXiv:2304.08485), Pixtral (arXiv:2410.07073) and Mistral 3.

    images ─ vision tower ─ states of some layers ─ projector ─┐ in place of the image tokens' vectors
    tokens ─ embed ────────────────────────────────────────────┴─ decoder ─ hidden ─ logits

Shapes: B rows, T tokens, D hidden of the decoder, N patches, V hidden of the tower (times the layers read).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ownlm.errors import UserError
from ownlm.models.blocks import ACTIVATIONS, make_norm
from ownlm.models.decoder import Decoder, DecoderConfig
from ownlm.models.specs import Activation, Norm
from ownlm.models.vision import VisionConfig, VisionTower


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionLanguageConfig:
    """A vision tower and a decoder that reads what it sees.

    image_token   stands in the tokens for each vector that comes from an image
    states        which hidden states of the tower are read, side by side
    class_token   whether the tower's class token is one of the vectors
    merge         a square of so many patches, along a side, becomes one vector (Mistral 3)
    first_norm    a norm before that
    """

    vision: VisionConfig
    text: DecoderConfig
    image_token: int
    states: tuple[int, ...] = (-1,)
    class_token: bool = False
    merge: int | None = None
    first_norm: Norm | None = None
    activation: Activation = "gelu"
    bias: bool = True


class Projector(nn.Module):
    """The tower's states -> vectors of the decoder."""

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__()
        self.activation, self.count = ACTIVATIONS[config.activation], config.merge
        width, D = config.vision.hidden_size * len(config.states), config.text.hidden_size
        self.norm = None if config.first_norm is None else make_norm(width, config.first_norm)
        self.merge = None if config.merge is None else nn.Linear(width * config.merge**2, width, bias=False)
        self.linear_1 = nn.Linear(width, D, bias=config.bias)
        self.linear_2 = nn.Linear(D, D, bias=config.bias)

    def forward(self, x_NV: Tensor, size: tuple[int, int]) -> Tensor:
        """One image's states, `size` its (rows, columns) of patches -> (n, D)."""
        if self.norm is not None:
            x_NV = self.norm(x_NV)
        if self.merge is not None and self.count is not None:
            x_NV = self.merge(squares(x_NV.view(*size, -1), self.count))
        y_ND: Tensor = self.linear_2(self.activation(self.linear_1(x_NV)))
        return y_ND


def squares(x_RCV: Tensor, side: int) -> Tensor:
    """(rows, columns, V) -> (squares of `side` × `side`, V * side²): each feature of all patches of a square together. What is
    left at the edges is dropped."""
    rows, columns = x_RCV.shape[0] // side, x_RCV.shape[1] // side
    x = x_RCV[: rows * side, : columns * side].reshape(rows, side, columns, side, -1)
    return x.permute(0, 2, 4, 1, 3).reshape(rows * columns, -1)


class VisionLanguage(nn.Module):
    """`model(tokens_BT, images=…)` gives hidden states. Its decoder, `model.language`, goes on alone once the images are read:
    `embed` gives what stands in for the embedding of the prompt.

    `hf` is the config.json it came with, which is written back when the model is saved.
    """

    def __init__(self, config: VisionLanguageConfig, hf: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config, self.hf = config, hf
        self.vision, self.projector = VisionTower(config.vision), Projector(config)
        self.language = Decoder(config.text)

    @property
    def head_weight(self) -> Tensor:
        return self.language.head_weight

    def image_features(self, images: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """For each image (C, H, W) its vectors (n, D), in the order of reading."""
        sizes, states = self.vision.sizes(images), self.config.states
        if self.vision.config.rotary is not None:
            # One by one: they don't see each other, and a mask over all patches of all images would be large.
            parts = [torch.cat(self.vision.states([image], states), -1)[0] for image in images]
        else:
            first = int(self.vision.config.class_token and not self.config.class_token)
            parts = list(torch.cat(self.vision.states(images, states), -1)[:, first:])
        return [self.projector(part, size) for part, size in zip(parts, sizes, strict=True)]

    def embed(self, tokens_BT: Tensor, images: Tensor | Sequence[Tensor]) -> Tensor:
        """embeds_BTD: the tokens' vectors, the images' in place of the image tokens, row by row. Raises UserError when there
        are more or fewer of those."""
        x_BTD = self.language.embed(tokens_BT)
        here_BT = tokens_BT == self.config.image_token
        if not len(images):
            if here_BT.any():
                raise UserError(f"{int(here_BT.sum())} image tokens, and no image.", where="images")
            return x_BTD
        features_ND = torch.cat(self.image_features(images))
        if int(here_BT.sum()) != len(features_ND):
            raise UserError(
                f"{int(here_BT.sum())} image tokens for images that take {len(features_ND)}.", where="images"
            )
        return x_BTD.masked_scatter(here_BT[..., None], features_ND.to(x_BTD.dtype))

    def forward(self, tokens_BT: Tensor, *, images: Tensor | Sequence[Tensor] = (), **decoder: Any) -> Tensor:
        """hidden_BTD; `decoder` are the further arguments of `Decoder.forward`."""
        hidden_BTD: Tensor = self.language(tokens_BT, embeds_BTD=self.embed(tokens_BT, images), **decoder)
        return hidden_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, vocabulary) in fp32."""
        return self.language.logits(hidden)
