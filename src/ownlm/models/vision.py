"""The vision tower: ViT, CLIP's and Pixtral's are settings of it.

    image ─ patches ─ linear (+ class token, + positions) ─ norm? ─ block ─ block ─ … ─ hidden
                                                                class token ─ norm ─ pooler? ─ head?

With learned positions it reads images of one size, (B, C, H, W), a row of patches each. With rotary positions it reads images
of any sizes as one row (Pixtral): a patch turns by its row and column, and sees the patches of its own image only.

Shapes: B rows, N patches of all images of a row (and the class token), P side of a patch, C channels, D hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ownlm.errors import UserError
from ownlm.models.attention import everything, masked
from ownlm.models.blocks import Block, Step, make_norm
from ownlm.models.rotary import frequencies, plane_rotation
from ownlm.models.specs import Layer, Norm, Rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """A vision tower, as data.

    image_size   side of the images: the only one it reads with learned positions, the largest one with rotary ones
    first_norm   one more norm, between embedding and layers
    last_norm    which hidden states have one after the last layer: none, the class token (CLIP), all (ViT)
    pooler       tanh(linear) of the class token
    head         size of what a last linear layer makes of the class token; `labels` are its names where it classifies
    """

    hidden_size: int
    image_size: int
    patch_size: int
    layers: tuple[Layer, ...]
    channels: int = 3
    norm: Norm = field(default_factory=Norm)
    patch_bias: bool = False
    class_token: bool = False
    first_norm: bool = False
    last_norm: Literal["none", "class", "all"] = "none"
    pooler: bool = False
    head: int | None = None
    labels: tuple[str, ...] = ()

    @property
    def rotary(self) -> Rotary | None:
        """How all layers turn; None for learned positions."""
        (rotary,) = {layer.rotary for layer in self.layers}
        return rotary

    @property
    def grid(self) -> int:
        """Patches along a side of an image of `image_size`."""
        return self.image_size // self.patch_size


class VisionTower(nn.Module):
    """`tower(images)` gives hidden states, `tower.features(images)` one vector for each image.

    `hf` is the config.json it came with, which is written back when the model is saved.
    """

    def __init__(self, config: VisionConfig, hf: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config, self.hf = config, hf
        D = config.hidden_size

        def norm(there: bool) -> nn.Module | None:
            return make_norm(D, config.norm) if there else None

        self.patches = nn.Linear(config.channels * config.patch_size**2, D, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(D)) if config.class_token else None
        learned = config.rotary is None
        self.positions = nn.Embedding(config.grid**2 + config.class_token, D) if learned else None
        self.first_norm = norm(config.first_norm)
        self.layers = nn.ModuleList(Block(D, layer, index) for index, layer in enumerate(config.layers))
        self.last_norm = norm(config.last_norm != "none")
        self.pooler = nn.Linear(D, D) if config.pooler else None
        # A classifier has a bias, a projection into a shared space has none.
        self.head = None if config.head is None else nn.Linear(D, config.head, bias=bool(config.labels))

    def forward(self, images: Tensor | Sequence[Tensor], *, interpolate: bool = False) -> Tensor:
        """hidden_BND of the last layer, normed where `last_norm` is "all". Arguments as in `states`."""
        (x_BND,) = self.states(images, [-1], interpolate=interpolate)
        if self.last_norm is not None and self.config.last_norm == "all":
            x_BND = self.last_norm(x_BND)
        return x_BND

    def features(self, images: Tensor, *, interpolate: bool = False) -> Tensor:
        """One vector for each image through the head, (B, head); `pooled` where there is none."""
        x_BD = self.pooled(images, interpolate=interpolate)
        return x_BD if self.head is None else self.head(x_BD)

    def pooled(self, images: Tensor, *, interpolate: bool = False) -> Tensor:
        """(B, D): the class token of each image, normed, through the pooler where there is one."""
        (x_BND,) = self.states(images, [-1], interpolate=interpolate)
        x_BD = x_BND[:, 0]
        if self.last_norm is not None:
            x_BD = self.last_norm(x_BD)
        if self.pooler is not None:
            x_BD = self.pooler(x_BD).tanh()
        return x_BD

    def states(
        self, images: Tensor | Sequence[Tensor], wanted: Sequence[int], *, interpolate: bool = False
    ) -> list[Tensor]:
        """The hidden states before any layer (0), after the first (1), …, counted from the end where negative.

        images       (B, C, H, W); with rotary positions also a list of (C, H, W), in one row
        interpolate  stretch learned positions to another image size instead of refusing it
        Raises UserError for images the tower can't read.
        """
        count = len(self.layers)
        numbers = [n if n >= 0 else n + count + 1 for n in wanted]
        x_BND, step = self._rows(images) if self.config.rotary else self._batch(images, interpolate)
        if self.first_norm is not None:
            x_BND = self.first_norm(x_BND)
        states = {0: x_BND}
        for number in range(1, max(numbers) + 1):
            states[number] = x_BND = self.layers[number - 1](x_BND, step)
        return [states[number] for number in numbers]

    def sizes(self, images: Tensor | Sequence[Tensor]) -> list[tuple[int, int]]:
        """(rows, columns) of patches of each image; what is left of a patch at its edges isn't read."""
        P = self.config.patch_size
        return [(image.shape[-2] // P, image.shape[-1] // P) for image in images]

    def _embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, rows * columns, D)."""
        C, P = self.config.channels, self.config.patch_size
        rows, columns = images.shape[-2] // P, images.shape[-1] // P
        if images.ndim != 4 or images.shape[1] != C or not rows or not columns:
            raise UserError(
                f"images of shape {tuple(images.shape[-3:])}, for a model that reads {C} channels and patches of {P} × {P} pixels.",
                where="images",
            )
        x = images[..., : rows * P, : columns * P].to(self.patches.weight.dtype)
        x = x.reshape(len(images), C, rows, P, columns, P).permute(0, 2, 4, 1, 3, 5)
        patches_BND: Tensor = self.patches(x.flatten(3).flatten(1, 2))
        return patches_BND

    def _batch(self, images: Tensor | Sequence[Tensor], interpolate: bool) -> tuple[Tensor, Step]:
        """Images of one size, a row each, with learned positions."""
        assert self.positions is not None
        batch = images if isinstance(images, Tensor) else torch.stack(list(images))
        height, width, size = *batch.shape[-2:], self.config.image_size
        x_BND = self._embed(batch)
        positions_ND = self.positions.weight
        if (height, width) != (size, size):
            if not interpolate:
                raise UserError(
                    f"images of {width} × {height} pixels, for a model that reads {size} × {size}.",
                    where="images",
                    cure="Resize them, or ask for interpolate=True.",
                )
            positions_ND = self._stretched(height // self.config.patch_size, width // self.config.patch_size)
        if self.class_token is not None:
            x_BND = torch.cat([self.class_token.expand(len(batch), 1, -1), x_BND], 1)
        count = x_BND.shape[1]
        return x_BND + positions_ND, Step({}, {None: everything(count, count)})

    def _stretched(self, rows: int, columns: int) -> Tensor:
        """The learned positions for another number of patches, bicubic over the image; that of the class token stays."""
        assert self.positions is not None
        first = int(self.config.class_token)
        kept, grid = self.positions.weight[:first], self.positions.weight[first:]
        plane = grid.T.reshape(1, -1, self.config.grid, self.config.grid)
        plane = F.interpolate(plane, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([kept, plane[0].flatten(1).T])

    def _rows(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, Step]:
        """All images in one row, each seeing itself."""
        rotary, device = self.config.rotary, self.patches.weight.device
        assert rotary is not None
        x_BND = torch.cat([self._embed(image[None]) for image in images], 1)
        sizes = self.sizes(images)
        places = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2) for h, w in sizes]
        rows, columns = torch.cat(places).to(device).T
        freq = frequencies(rotary, self.config.layers[0].attention.head_dim).to(device)
        turn = plane_rotation(freq, rows, columns, x_BND.dtype)
        if len(sizes) == 1:
            return x_BND, Step({rotary: turn}, {None: everything(len(rows), len(rows))})
        image_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor([h * w for h, w in sizes])).to(device)
        return x_BND, Step({rotary: turn}, {None: masked((image_N != image_N[:, None])[None])})
