"""Fresh weights, made for training."""

import math
from typing import Any, TypeVar

import torch
from torch import nn

from ownlm.models.blocks import CrossAttention, SelfAttention

M = TypeVar("M", bound=nn.Module)


def init_weights(model: M, *, seed: int = 0, zero_output: bool = True, embedding_std: float | None = None) -> M:
    """The same model, of any skeleton, with fresh weights made for training; equal seeds give equal weights, whatever the dtype.

    Matrices are normal with std fan_in ** -0.5, so that activations start at unit size at every width (LeCun et al.
    1998, "Efficient BackProp", 4.6). With `zero_output` every branch ends in zero and the network starts as the
    identity (arXiv:1901.09321); without, in std / sqrt(2 L) as in GPT-2. Embeddings are normal with `embedding_std`:
    1 by default, 0.02 as in GPT-2 when they are the head as well and nothing scales the logits down (T5 does). A head of its
    own starts at 0.001, near the uniform prediction (both as in nanochat). Norms are one, biases zero. Queries of an
    attention that doesn't scale its scores start smaller by what it leaves out (as in T5).
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    named = dict(model.named_parameters())
    scaled = getattr(config, "logit_scale", 1.0) < 1
    embedding_std = embedding_std or (1.0 if scaled or "lm_head.weight" in named else 0.02)
    norms = {f"{name}.weight": getattr(module, "offset", 0.0) for name, module in model.named_modules()}
    with torch.no_grad():
        for name, parameter in named.items():
            if name.endswith(("bias", "_bias.weight", "sinks", "segments", "class_token")):
                parameter.zero_()
                continue
            if name == "logit_scale":  # CLIP's begins with the paper's value
                continue
            if parameter.ndim == 1:
                parameter.fill_(1.0 - norms.get(name, 0.0))
                continue
            std = math.prod(parameter.shape[1:] if parameter.ndim == 4 else parameter.shape[-1:]) ** -0.5
            if name.endswith("embed_tokens.weight"):
                std = embedding_std
            elif name.endswith(("embed_positions.weight", "embed_types.weight")):
                std = embedding_std / 2
            elif name == "lm_head.weight":
                std = 0.001
            elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                std = 0.0 if zero_output else std / (2 * config.num_layers) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for module in model.modules():
            if isinstance(module, SelfAttention | CrossAttention) and module.spec.scale == 1.0:
                module.q_proj.weight.mul_(module.spec.head_dim**-0.5)
    return model
