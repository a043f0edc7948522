"""XLNet: a transformer of two streams, which can predict the tokens of a text in any order (arXiv:1906.08237).

    content stream h: the tokens, each of which sees itself ──────────────── hidden (fine-tuning)
    query stream g:   a mask at each place to predict, which sees all but itself ── hidden (pretraining)

Scores are (q + r_w) k + (q + r_r) r + (q + r_s) s: content, distance, and whether two tokens are of one segment. `mems` are
what each layer was given for earlier text, seen but not trained (arXiv:1901.02860).

Shapes: B batch, T tokens, M mems, S = M + T keys, P = S + T distances, K places to predict, D hidden, H heads, d head width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ownlm.models.attention import attend, everything
from ownlm.models.blocks import MLP, make_norm, project
from ownlm.models.heads import make_head
from ownlm.models.skeleton import Skeleton
from ownlm.models.specs import Head, Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStreamConfig:
    """A two-stream transformer, as data. `max_mems` is how many mems a forward leaves, of its first `reuse` tokens (None: all)."""

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    causal: bool = False
    clamp: int | None = None  # distances beyond count as this one
    max_mems: int | None = None
    reuse: int | None = None
    tie_embeddings: bool = True
    lm_head: bool = True
    head: Head | None = None  # of a task

    @property
    def num_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, slots=True)
class Scene:
    """What all layers of one forward share: sinusoids of the distances S ... 1 - T, which keys belong to another segment, and
    what each stream must not see. `targets_BKT` says where the queries stand."""

    distance_PD: Tensor
    other_BTS: Tensor | None
    hidden_h_BTS: Tensor | None
    hidden_g_BTS: Tensor | None
    targets_BKT: Tensor | None


class RelativeAttention(nn.Module):
    def __init__(self, hidden_size: int, layer: Layer) -> None:
        super().__init__()
        a = layer.attention
        self.heads, self.scale = a.num_heads, a.head_dim**-0.5
        width = a.num_heads * a.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.r_proj = (
            nn.Linear(hidden_size, width, bias=False) for _ in range(4)
        )
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        shape = a.num_heads, a.head_dim
        self.r_w_bias, self.r_r_bias, self.r_s_bias = (nn.Parameter(torch.zeros(shape)) for _ in range(3))
        self.segments = nn.Parameter(torch.zeros(2, *shape))  # for keys of the same segment, and of another

    def keys(self, x_BSD: Tensor, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (B, H, S, d), and the distances' keys (H, P, d): the same for both streams."""
        k, v = (self.by_head(y).transpose(1, 2) for y in project(x_BSD, self.k_proj, self.v_proj))
        return k, v, self.by_head(self.r_proj(scene.distance_PD)).transpose(0, 1)

    def by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)

    def forward(
        self,
        x_BTD: Tensor,
        keys: tuple[Tensor, Tensor, Tensor],
        scene: Scene,
        hidden_BTS: Tensor | None,
        targets_BKT: Tensor | None = None,
    ) -> Tensor:
        """With `targets_BKT`, `x` holds K queries, which are laid onto their places among the T and taken back."""
        k_BHSd, v_BHSd, r_HPd = keys
        q_BTHd = self.by_head(self.q_proj(x_BTD))
        if targets_BKT is not None:
            q_BTHd = torch.einsum("bkhd,bkt->bthd", q_BTHd, targets_BKT)
        T, S = q_BTHd.shape[1], k_BHSd.shape[2]
        score_BHTS = shifted((q_BTHd + self.r_r_bias).transpose(1, 2) @ r_HPd.mT, S)
        if scene.other_BTS is not None:
            same, other = torch.einsum("bthd,shd->sbht", q_BTHd + self.r_s_bias, self.segments)[..., None]
            score_BHTS = score_BHTS + torch.where(scene.other_BTS[:, None], other, same)
        score_BHTS = score_BHTS * self.scale
        if hidden_BTS is not None:
            # Not -inf: the first token of an order sees nothing, and then all keys weigh the same.
            score_BHTS = score_BHTS.masked_fill(hidden_BTS[:, None], torch.finfo(score_BHTS.dtype).min / 2)
        content_BHTd = (q_BTHd + self.r_w_bias).transpose(1, 2)
        y_BTHd = attend(content_BHTd, k_BHSd, v_BHSd, everything(T, S), self.scale, bias_BHTS=score_BHTS)
        if targets_BKT is not None:
            y_BTHd = torch.einsum("bthd,bkt->bkhd", y_BTHd, targets_BKT)
        out: Tensor = self.o_proj(y_BTHd.flatten(2))
        return out


def shifted(x_BHTP: Tensor, keys: int) -> Tensor:
    """(B, H, T, S): from scores by distance, S ... 1 - T, those by key: key j is M + i - j tokens before query i.

    Dropping the first T numbers and reading rows that are one shorter moves row i to the left by T - i places.
    """
    B, H, T, P = x_BHTP.shape
    return x_BHTP.flatten(2)[..., T:].view(B, H, T, P - 1)[..., :keys]


class TwoStreamBlock(nn.Module):
    """One layer over both streams; the same weights for each."""

    def __init__(self, hidden_size: int, layer: Layer) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(hidden_size, layer)
        self.attention_norm = make_norm(hidden_size, layer.norm)
        self.mlp = MLP(hidden_size, layer.mlp)
        self.mlp_norm = make_norm(hidden_size, layer.norm)

    def forward(
        self, h_BTD: Tensor, g_BKD: Tensor | None, mems_BMD: Tensor, scene: Scene
    ) -> tuple[Tensor, Tensor | None]:
        keys = self.self_attn.keys(torch.cat([mems_BMD, h_BTD], 1), scene)
        if g_BKD is not None:
            g_BKD = self._after(g_BKD, self.self_attn(g_BKD, keys, scene, scene.hidden_g_BTS, scene.targets_BKT))
        return self._after(h_BTD, self.self_attn(h_BTD, keys, scene, scene.hidden_h_BTS)), g_BKD

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.attention_norm(x + y)
        out: Tensor = self.mlp_norm(x + self.mlp(x))
        return out


class TwoStream(Skeleton):
    """`model(tokens_BT)` gives hidden states; `logits` (language model) or `head` (of a task) read them."""

    config: TwoStreamConfig

    def __init__(self, config: TwoStreamConfig, hf: Mapping[str, Any] | None = None) -> None:
        super().__init__(config, hf)
        D = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.embed_mask = nn.Parameter(torch.zeros(1, 1, D))
        self.layers = nn.ModuleList(TwoStreamBlock(D, layer) for layer in config.layers)
        if config.lm_head and not config.tie_embeddings:
            self.lm_head = nn.Linear(D, config.vocab_size)
        elif config.lm_head:
            self.lm_head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if config.head is not None:
            self.head = make_head(D, config.vocab_size, config.head, config.layers[0].norm)

    @property
    def numbers(self) -> Tensor:
        return self.embed_mask

    def forward(self, tokens_BT: Tensor, **others: Any) -> Tensor:
        """hidden_BTD of the content stream; where targets are given, hidden_BKD of the query stream. Arguments as in `remember`."""
        return self.remember(tokens_BT, **others)[0]

    def remember(
        self,
        tokens_BT: Tensor,
        *,
        mask_BT: Tensor | None = None,
        types_BT: Tensor | None = None,
        perm_mask_BTT: Tensor | None = None,
        targets_BKT: Tensor | None = None,
        mems: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(what `forward` gives, the mems for the text that follows).

        mask_BT: False where there is padding, which nobody sees.
        types_BT: the segment of each token (only whether two are equal counts); that of mems is 0.
        perm_mask_BTT: True at [b, i, j] where token i must not see token j.
        targets_BKT: 1 at [b, k, t] where query k stands at place t, 0 elsewhere.
        mems: for each layer (B, M, D), as `remember` gave them for the text before.
        """
        h_BTD = self.embed_tokens(tokens_BT)
        mems = [h_BTD[:, :0]] * self.config.num_layers if mems is None else mems
        scene = self._scene(h_BTD, mems[0].shape[1], mask_BT, types_BT, perm_mask_BTT, targets_BKT)
        g_BKD = None if targets_BKT is None else self.embed_mask.expand(*targets_BKT.shape[:2], -1)
        left = []
        for layer, mems_BMD in zip(self.layers, mems, strict=True):
            left.append(self._kept(mems_BMD, h_BTD))
            h_BTD, g_BKD = layer(h_BTD, g_BKD, mems_BMD, scene)
        return h_BTD if g_BKD is None else g_BKD, tuple(left)

    def _kept(self, mems_BMD: Tensor, h_BTD: Tensor) -> Tensor:
        whole = torch.cat([mems_BMD, h_BTD[:, : self.config.reuse]], 1).detach()
        return whole if self.config.max_mems is None else whole[:, -self.config.max_mems :]

    def _scene(
        self,
        h_BTD: Tensor,
        num_mems: int,
        mask_BT: Tensor | None,
        types_BT: Tensor | None,
        perm_mask_BTT: Tensor | None,
        targets_BKT: Tensor | None,
    ) -> Scene:
        T, device = h_BTD.shape[1], h_BTD.device
        hidden = torch.zeros(1, T, T, dtype=torch.bool, device=device)
        if self.config.causal:
            hidden = hidden | torch.ones_like(hidden).triu(1)
        if mask_BT is not None:
            hidden = hidden | ~mask_BT.bool()[:, None]
        if perm_mask_BTT is not None:
            hidden = hidden | perm_mask_BTT.bool()
        plain = not self.config.causal and mask_BT is None and perm_mask_BTT is None
        itself_TT = torch.eye(T, dtype=torch.bool, device=device)
        hidden_h, hidden_g = (nn.functional.pad(x, (num_mems, 0)) for x in (hidden & ~itself_TT, hidden))
        other = None
        if types_BT is not None:
            other = nn.functional.pad(types_BT, (num_mems, 0))[:, None] != types_BT[:, :, None]
        targets = None if targets_BKT is None else targets_BKT.to(h_BTD.dtype)
        distance_PD = self._distances(num_mems + T, T, device).to(h_BTD.dtype)
        return Scene(distance_PD, other, None if plain else hidden_h, None if plain else hidden_g, targets)

    def _distances(self, keys: int, queries: int, device: torch.device) -> Tensor:
        """(P, D): sines, then cosines, of the distances S ... 1 - T, each in D/2 frequencies."""
        distance_P = torch.arange(keys, -queries, -1, device=device).float()
        if self.config.clamp is not None:
            distance_P = distance_P.clamp(-self.config.clamp, self.config.clamp)
        D = self.config.hidden_size
        angle = distance_P[:, None] * (1 / 10_000 ** (torch.arange(0, D, 2, device=device).float() / D))
        return torch.cat([angle.sin(), angle.cos()], -1)
