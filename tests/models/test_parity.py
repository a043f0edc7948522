"""Logits equal transformers' in fp32, on loud weights; and each of a list of deliberate mistakes is noticed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from references import CONFIGS, difference, save
from safetensors.torch import load_file
from torch import Tensor

from ownlm.checkpoints.weights import load_model
from ownlm.models.blocks import MoE, RMSNorm, SelfAttention
from ownlm.models.decoder import Decoder
from ownlm.models.specs import Activation

BAR = 1e-5
VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "hf-tiny"
LENGTH = 160  # beyond one attention tile, and beyond the original context of the scaled llama


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """By name: a directory that transformers wrote, and its logits for `tokens()`."""
    made: dict[str, tuple[Path, Tensor]] = {}

    def get(name: str) -> tuple[Path, Tensor]:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            model = save(CONFIGS[name], path)
            with torch.no_grad():
                made[name] = path, model(tokens()).logits
        return made[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_logits(name: str, training: bool, checkpoints: Any) -> None:
    path, reference = checkpoints(name)
    model = load_model(path)
    with torch.set_grad_enabled(training):
        logits = model.logits(model(tokens()))
    assert logits.dtype == torch.float32
    assert reference.abs().max() > 5  # loud
    assert difference(logits.detach(), reference) <= BAR


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3"])
def test_gradients(name: str, tmp_path: Path) -> None:
    reference = save(CONFIGS[name], tmp_path)
    model = load_model(tmp_path)
    ids = tokens()
    reference(ids, labels=ids).loss.backward()
    logits = model.logits(model(ids))[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    for ours, parameter in model.named_parameters():
        if name == "gpt2":
            continue
        assert difference(parameter.grad, theirs[ours]) <= BAR, ours
    if name == "gpt2":
        assert difference(model.embed_tokens.weight.grad, theirs["transformer.wte.weight"]) <= BAR
        fused = torch.cat([getattr(model.layers[0].self_attn, f"{part}_proj").weight.grad for part in "qkv"])
        assert difference(fused.T, theirs["transformer.h.0.attn.c_attn.weight"]) <= BAR


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name: str, side: str, tmp_path: Path) -> None:
    reference, model = save(CONFIGS[name], tmp_path), load_model(tmp_path)
    ids, keep = tokens(), torch.ones(2, LENGTH, dtype=torch.bool)
    keep[1, : 40 if side == "left" else None] = side == "right"
    if side == "right":
        keep[1, -40:] = False
    positions = (keep.cumsum(1) - 1).masked_fill(~keep, -1)
    with torch.no_grad():
        expected = reference(ids, attention_mask=keep.long(), position_ids=positions.clamp(min=0)).logits
        logits = model.logits(model(ids, positions_BT=positions))
    assert difference(logits[keep], expected[keep]) <= BAR


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3", "mistral", "mixtral", "phi2", "gemma2", "gpt_oss"])
def test_vectors(name: str) -> None:
    if not VECTORS.exists():
        pytest.skip("the shared test vectors lie beside the repository, and are not there")
    vectors = load_file(VECTORS / name / "ref.safetensors")
    model = load_model(VECTORS / name)
    with torch.inference_mode():
        logits = model.logits(model(vectors["in.input_ids"]))
    assert difference(logits, vectors["out"]) <= BAR


@pytest.mark.parametrize("name", ["llama", "llama3", "llama-linear", "qwen3"])
def test_both_config_schemas(name: str, checkpoints: Any, tmp_path: Path) -> None:
    path, reference = checkpoints(name)
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    # The hub has both spellings of the kind.
    config["rope_scaling"] = None if kind == "default" else rope | {"type" if kind == "linear" else "rope_type": kind}
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    model = load_model(tmp_path)
    with torch.inference_mode():
        assert difference(model.logits(model(tokens())), reference) <= BAR


# ── Deliberate mistakes: each must move the logits well beyond the bar ───────────────────────────────────────────────


def rebuilt(model: Decoder, **changes: Any) -> Decoder:
    """The same weights under another config."""
    other = Decoder(replace(model.config, **changes)).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def layers(model: Decoder, change: Callable[[Any], Any]) -> Decoder:
    """The same weights, with `change` applied to the spec of every layer."""
    return rebuilt(model, layers=tuple(map(change, model.config.layers)))


def attention(model: Decoder, **changes: Any) -> Decoder:
    return layers(model, lambda layer: replace(layer, attention=replace(layer.attention, **changes)))


def mlp(model: Decoder, **changes: Any) -> Decoder:
    return layers(model, lambda layer: replace(layer, mlp=replace(layer.mlp, **changes)))


def experts(model: Decoder, **changes: Any) -> Decoder:
    return mlp(model, experts=replace(model.config.layers[0].mlp.experts, **changes))


def norms(model: Decoder, **changes: Any) -> Decoder:
    norm = replace(model.config.norm, **changes)
    other = layers(model, lambda layer: replace(layer, norm=norm))
    return rebuilt(other, norm=norm)


def rotary(model: Decoder, **changes: Any) -> Decoder:
    return layers(model, lambda layer: replace(layer, rotary=replace(layer.rotary, **changes)))


def scaled(model: Decoder, **changes: Any) -> Decoder:
    return layers(
        model,
        lambda layer: replace(layer, rotary=replace(layer.rotary, scaling=replace(layer.rotary.scaling, **changes))),
    )


def first_layer_everywhere(model: Decoder) -> Decoder:
    """Every layer takes the attention spec and the rotation of the first."""
    first = model.config.layers[0]
    return layers(model, lambda layer: replace(layer, attention=first.attention, rotary=first.rotary))


def each_attention(model: Decoder, change: Callable[[SelfAttention], None]) -> Decoder:
    with torch.no_grad():
        for layer in model.layers:
            change(layer.self_attn)
    return model


def interleave_kv(a: SelfAttention) -> None:
    """Query head h reads key/value head h mod K instead of h // G."""
    a.q_proj.weight.copy_(a.q_proj.weight.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2))
    a.o_proj.weight.copy_(a.o_proj.weight.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1, 3))


def interleave_rotary(a: SelfAttention) -> None:
    """The layout of GGUF and Meta files, read as if it were ours."""
    for layer in (a.q_proj, a.k_proj):
        layer.weight.copy_(layer.weight.unflatten(0, (-1, 2, a.spec.head_dim // 2)).transpose(1, 2).flatten(0, 2))


def exchange_qkv(a: SelfAttention) -> None:
    """q, k and v taken for three blocks of rows."""
    whole = torch.cat([layer.weight for layer in (a.q_proj, a.k_proj, a.v_proj)])
    by_head = whole.unflatten(0, (3, a.spec.num_heads, -1)).transpose(0, 1).flatten(0, 2)
    for layer, part in zip((a.q_proj, a.k_proj, a.v_proj), by_head.chunk(3), strict=True):
        layer.weight.copy_(part)


def without_qk_norm(a: SelfAttention) -> None:
    a.q_norm = a.k_norm = None


def swap_qk_norms(a: SelfAttention) -> None:
    a.q_norm, a.k_norm = a.k_norm, a.q_norm


def offset_norms(model: Decoder) -> Decoder:
    """Gemma's (1 + w) where w is meant."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight += 1
    return model


def drop_biases(model: Decoder) -> Decoder:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.bias"):
                parameter.zero_()
    return model


def untie(model: Decoder) -> Decoder:
    other = rebuilt(model, tie_embeddings=not model.config.tie_embeddings)
    with torch.no_grad():
        if other.lm_head is not None:
            other.lm_head.weight.copy_(other.embed_tokens.weight.roll(1, 0))
    return other


def shift_positions(model: Decoder) -> Decoder:
    assert model.embed_positions is not None
    with torch.no_grad():
        model.embed_positions.weight.copy_(model.embed_positions.weight.roll(1, 0))
    return model


def swap_gate_and_up(model: Decoder) -> Decoder:
    for layer in model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
    return model


def activation(kind: Activation) -> Callable[[Decoder], Decoder]:
    return lambda model: mlp(model, activation=kind)


def without_router_bias(model: Decoder) -> Decoder:
    for module in model.modules():
        if isinstance(module, MoE):
            module.gate.bias.data.zero_()
    return model


def swap_norms(model: Decoder) -> Decoder:
    """Llama's place of post_attention_layernorm where Gemma 2's is meant."""
    for layer in model.layers:
        layer.attention_norm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.attention_norm
    return model


MISTAKES: dict[str, tuple[str, Callable[[Decoder], Decoder]]] = {
    "gelu erf for tanh": ("gpt2", activation("gelu")),
    "gelu tanh for erf": ("gpt2-untied-gelu", activation("gelu_tanh")),
    "layer norm eps": ("gpt2", lambda m: norms(m, eps=1e-3)),
    "rms norm eps": ("qwen3", lambda m: norms(m, eps=1e-4)),
    "norm offset": ("llama", offset_norms),
    "positions off by one": ("gpt2", shift_positions),
    "output bias dropped": ("llama-biased", drop_biases),
    "rope theta": ("qwen3", lambda m: rotary(m, theta=9_000.0)),
    "rope layout": ("qwen3", lambda m: each_attention(m, interleave_rotary)),
    "rope scaling dropped": ("llama3", lambda m: rotary(m, scaling=None)),
    "rope scaling, low factor": ("llama3", lambda m: scaled(m, low_freq_factor=1.2)),
    "rope scaling, original context": ("llama3", lambda m: scaled(m, original_max_tokens=64)),
    "linear scaling dropped": ("llama-linear", lambda m: rotary(m, scaling=None)),
    "qk-norm dropped": ("qwen3", lambda m: each_attention(m, without_qk_norm)),
    "q and k norms swapped": ("qwen3", lambda m: each_attention(m, swap_qk_norms)),
    "scale from the hidden size": ("qwen3", lambda m: attention(m, scale=32**-0.5)),
    "no scale": ("llama", lambda m: attention(m, scale=1.0)),
    "scale where none is": ("gpt2-untied-gelu", lambda m: attention(m, scale=None)),
    "kv heads in another order": ("llama", lambda m: each_attention(m, interleave_kv)),
    "silu for relu²": ("llama-biased", activation("silu")),
    "relu for relu²": ("llama-biased", activation("relu")),
    "gate and up swapped": ("llama", swap_gate_and_up),
    "tied head untied": ("qwen3-tied", untie),
    "untied head tied": ("qwen3", untie),
    "window dropped": ("mistral", lambda m: attention(m, window=None)),
    "window one too wide": ("mistral", lambda m: attention(m, window=25)),
    "windows in every layer": ("gpt-neo", lambda m: attention(m, window=24)),
    "banded layers exchanged": ("gpt-neo", lambda m: rebuilt(m, layers=m.config.layers[::-1])),
    "scale in GPT-Neo": ("gpt-neo", lambda m: attention(m, scale=None)),
    "q, k, v not by head": ("gpt-neox", lambda m: each_attention(m, exchange_qkv)),
    "all of a head rotated": ("gpt-neox", lambda m: rotary(m, fraction=1.0)),
    "branches in sequence": ("gpt-neox", lambda m: layers(m, lambda x: replace(x, residual="sequential"))),
    "frequencies of the whole head": ("phi2", lambda m: rotary(m, theta=100.0)),
    "attention score cap dropped": ("gemma2", lambda m: attention(m, softcap=None)),
    "logit cap dropped": ("gemma2", lambda m: rebuilt(m, logit_softcap=None)),
    "norms exchanged": ("gemma2", swap_norms),
    "scale from the head": ("gemma2", lambda m: attention(m, scale=None)),
    "embedding not scaled": ("gemma", lambda m: rebuilt(m, embed_scale=1.0)),
    "norm offset dropped": ("gemma", lambda m: norms(m, offset=0.0)),
    "one rope base for all": ("gemma3", first_layer_everywhere),
    "long divisors for short": ("phi3-longrope", lambda m: scaled(m, original_max_tokens=512)),
    "attention factor dropped": ("phi3-longrope", lambda m: scaled(m, attention_factor=1.0)),
    "yarn's attention factor dropped": ("llama-yarn", lambda m: scaled(m, attention_factor=1.0)),
    "yarn's ramp rounded": ("llama-yarn", lambda m: scaled(m, truncate=True)),
    "experts not renormalised": ("mixtral", lambda m: experts(m, renormalise=False)),
    "experts renormalised": ("qwen3-moe", lambda m: experts(m, renormalise=True)),
    "one expert only": ("mixtral", lambda m: experts(m, per_token=1)),
    "sinks dropped": ("gpt-oss", lambda m: attention(m, sinks=False)),
    "gate limit dropped": ("gpt-oss", lambda m: mlp(m, limit=None)),
    "up offset dropped": ("gpt-oss", lambda m: mlp(m, up_offset=0.0)),
    "router bias dropped": ("gpt-oss", without_router_bias),
    "silu for the clamped gate": ("gpt-oss", activation("silu")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake: str, checkpoints: Any) -> None:
    name, wrong = MISTAKES[mistake]
    path, reference = checkpoints(name)
    with torch.no_grad():
        model = wrong(load_model(path))
        assert difference(model.logits(model(tokens())), reference) > 3 * BAR


def test_partial_rotation_is_noticed(checkpoints: Any) -> None:
    path, reference = checkpoints("llama")
    model = load_model(path)
    with torch.no_grad():
        model(tokens())
        (freq,) = model.rotations.frequencies.values()
        freq[-1] = 0.0  # one pair stands still
        assert difference(model.logits(model(tokens())), reference) > 3 * BAR


def test_angles_stay_exact_in_bf16(checkpoints: Any) -> None:
    """A model turned to bf16 and back still computes with unrounded frequencies: they are no buffer."""
    model = load_model(checkpoints("llama3")[0])
    with torch.no_grad():
        model(tokens())
        (before,) = (freq.clone() for freq in model.rotations.frequencies.values())
        model.to(torch.bfloat16).float()(tokens())
    (after,) = model.rotations.frequencies.values()
    assert torch.equal(after, before)
