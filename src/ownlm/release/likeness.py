"""What codes cost an encoder or an encoder-decoder: how like the original its states stay on text.

Shapes: N rows, T tokens of each, D hidden.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ownlm.kernels import library
from ownlm.kernels.linear import accelerate
from ownlm.models.encoder import Encoder
from ownlm.models.encoder_decoder import EncoderDecoder

Reader: TypeAlias = Encoder | EncoderDecoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """Over `tokens` of held-out text: the mean cosine between a token's final state before and after, and the lowest mean of a row.
    `computed_by` says what ran the codes."""

    tokens: int
    cosine: float
    lowest: float
    computed_by: str


@torch.inference_mode()
def likeness(original: Reader, quantised: Reader, rows_NT: Tensor) -> Likeness:
    """As the codes will be computed: by the kernels, whose activations are integers too, where there are any. An encoder-decoder
    reads each row and is then told to write it."""
    native = accelerate(quantised)
    cosines = []
    for tokens_T in rows_NT:
        before_TD, after_TD = (_states(model, tokens_T).float() for model in (original, quantised))
        cosines.append(torch.cosine_similarity(before_TD, after_TD, dim=-1).mean().item())
    return Likeness(
        tokens=rows_NT.numel(),
        cosine=sum(cosines) / len(cosines),
        lowest=min(cosines),
        computed_by=f"the {library.instruction_set()} kernels" if native else "PyTorch",
    )


def _states(model: Reader, tokens_T: Tensor) -> Tensor:
    if isinstance(model, Encoder):
        hidden_1TD: Tensor = model(tokens_T[None])
    else:
        start = tokens_T.new_tensor([model.config.start_token])
        hidden_1TD = model(tokens_T[None], torch.cat([start, tokens_T[:-1]])[None])
    return hidden_1TD[0]
