"""Grok-1, for which transformers has no class, against a plain numpy version of what xai-org/grok-1 (model.py) computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from references import difference
from safetensors.numpy import load_file
from torch import Tensor

from ownlm.checkpoints.weights import load_model, save_model
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf

Array = NDArray[np.float64]
CONFIG: dict[str, Any] = {
    "model_type": "grok-1", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts": 4, "num_experts_per_tok": 2, "attn_output_multiplier": 0.4, "max_attn_value": 30.0,
    "embedding_multiplier_scale": 7.8, "output_multiplier_scale": 0.577, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rms(x: Array, scale: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def turned(x: Array) -> Array:
    """(T, heads, d), the whole head rotated in halves."""
    T, _, d = x.shape
    phase = np.arange(T)[:, None] / 10_000.0 ** (np.arange(0, d, 2) / d)
    phase = np.concatenate([phase, phase], -1)[:, None]
    half = np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1)
    return x * np.cos(phase) + half * np.sin(phase)


def grok(w: dict[str, Array], ids: list[int]) -> Array:
    T, heads, kv, d = len(ids), 6, 2, 8
    x = w["model.embed_tokens.weight"][ids] * CONFIG["embedding_multiplier_scale"]
    for layer in range(2):
        p = f"model.layers.{layer}."
        h = rms(x, w[p + "pre_attn_norm.scale"])
        q, k, v = (
            (h @ w[f"{p}attn.{name}_proj.weight"].T).reshape(T, n, d)
            for name, n in (("q", heads), ("k", kv), ("v", kv))
        )
        q, k = turned(q), turned(k)
        out = np.zeros((T, heads, d))
        for head in range(heads):
            scores = q[:, head] @ k[:, head // (heads // kv)].T * CONFIG["attn_output_multiplier"]
            scores = 30 * np.tanh(scores / 30)
            scores[np.triu_indices(T, 1)] = -np.inf
            out[:, head] = softmax(scores) @ v[:, head // (heads // kv)]
        x = x + rms(out.reshape(T, -1) @ w[p + "attn.o_proj.weight"].T, w[p + "post_attn_norm.scale"])
        h = rms(x, w[p + "pre_moe_norm.scale"])
        share = softmax(h @ w[p + "moe_block.gate.weight"].T)
        y = np.zeros_like(h)
        for t in range(T):
            for expert in np.argsort(-share[t])[:2]:
                e = f"{p}moe_block.experts.{expert}."
                inner = gelu(h[t] @ w[e + "linear.weight"].T) * (h[t] @ w[e + "linear_v.weight"].T)
                y[t] += share[t, expert] * (inner @ w[e + "linear_1.weight"].T)
        x = x + rms(y, w[p + "post_moe_norm.scale"])
    x = rms(x, w["model.norm.scale"])
    return x @ w["model.embed_tokens.weight"].T * CONFIG["output_multiplier_scale"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """(a loud checkpoint, tokens, the reference's logits)"""
    path = tmp_path_factory.mktemp("grok")
    model = Decoder(from_hf(CONFIG)[0], CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1))
    save_model(model, path)
    ids = torch.randint(0, 97, (1, 40), generator=generator)
    weights = {name: tensor.astype(np.float64) for name, tensor in load_file(path / "model.safetensors").items()}
    return path, ids, torch.from_numpy(grok(weights, ids[0].tolist()))


def test_logits(made: tuple[Path, Tensor, Tensor]) -> None:
    path, ids, reference = made
    model = load_model(path)
    with torch.inference_mode():
        assert difference(model.logits(model(ids))[0], reference) <= 1e-5


# Renormalised shares can't be noticed: they scale a token's output, and the norm after it takes the scale away.
MISTAKES: dict[str, Any] = {
    "one expert": lambda layer: replace(layer, mlp=replace(layer.mlp, experts=replace(layer.mlp.experts, per_token=1))),
    "no cap": lambda layer: replace(layer, attention=replace(layer.attention, softcap=None)),
    "root of the head": lambda layer: replace(layer, attention=replace(layer.attention, scale=None)),
    "gelu erf": lambda layer: replace(layer, mlp=replace(layer.mlp, activation="gelu")),
    "silu": lambda layer: replace(layer, mlp=replace(layer.mlp, activation="silu")),
    "norms before only": lambda layer: replace(layer, norms="before"),
    "half of the head turned": lambda layer: replace(layer, rotary=replace(layer.rotary, fraction=0.5)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake: str, made: tuple[Path, Tensor, Tensor]) -> None:
    path, ids, reference = made
    right = load_model(path)
    wrong = Decoder(replace(right.config, layers=tuple(map(MISTAKES[mistake], right.config.layers)))).eval()
    wrong.load_state_dict(right.state_dict(), strict=False)
    with torch.inference_mode():
        assert difference(wrong.logits(wrong(ids))[0], reference) > 3e-5
