"""Model families: what a config.json means, and what the tensors of its checkpoint are called.

A family reads a Hugging Face config into a `DecoderConfig`, writes it back, and lists the tensors of its files. Each
entry of that list says how one stored tensor is made of ours (joined along the output dimension, turned around), so one
table serves reading and writing. Both config schemas are read: transformers 5 (`rope_parameters`) and the hub's
(`rope_theta` beside `rope_scaling`). A value that would change what is computed and that we don't compute is refused,
never ignored.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ownlm.errors import UserError
from ownlm.models.blocks import (
    ACTIVATIONS,
    Activation,
    Attention,
    FeedForward,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Norm,
    Rotary,
)
from ownlm.models.decoder import DecoderConfig


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint file: `ours` joined along dimension 0, then transposed if it is kept as [in, out]."""

    name: str
    ours: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`prefix` is left out in files of the bare model; `derived` matches stored tensors that are no weights."""

    architecture: str
    read: "Callable[[Fields], DecoderConfig]"
    write: Callable[[DecoderConfig], dict[str, Any]]
    tensors: Callable[[DecoderConfig], Iterable[Stored]]
    prefix: str = ""
    derived: str = r"(?!)"


def from_hf(config: Mapping[str, Any], *, where: str = "config.json") -> tuple[DecoderConfig, Family]:
    """What this config.json describes. UserError: unknown family (naming the nearest), or every value we can't take."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1, cutoff=0.4)
        raise UserError(
            f"model_type {kind!r} is not a family ownlm knows.",
            where=where,
            cure=f"{f'Did you mean {near[0]!r}? ' if near else ''}Known: {', '.join(FAMILIES)}.",
        )
    family, fields = FAMILIES[kind], Fields(config)
    decoder = family.read(fields)
    if not fields.faults:
        fields.faults += _contradictions(decoder)
    if fields.faults:
        raise UserError("; ".join(fields.faults) + ".", where=where)
    return decoder, family


def family_of(config: DecoderConfig) -> str:
    """The model_type under which this shape is saved: one that transformers knows if there is one, else "ownlm"."""
    a, mlp = config.attention, config.mlp
    plain = config.norm.kind == "rms" and isinstance(config.position, Rotary) and mlp.gated and a.scale is None
    if plain and a.bias == a.output_bias and a.qk_norm and not mlp.bias:
        return "qwen3"
    if plain and a.bias == a.output_bias and not a.qk_norm and config.hidden_size % a.num_heads == 0:
        return "llama"
    gpt2 = config.norm.kind == "layer" and isinstance(config.position, Learned) and not mlp.gated and not a.qk_norm
    multi_head = a.num_heads == a.num_kv_heads and a.num_heads * a.head_dim == config.hidden_size
    if gpt2 and multi_head and a.bias and a.output_bias and mlp.bias and a.scale in (None, 1.0):
        return "gpt2"
    return "ownlm"


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that describes this shape; transformers loads it unchanged unless its model_type is "ownlm"."""
    kind = family_of(config)
    family = FAMILIES[kind]
    return {"architectures": [family.architecture], "model_type": kind} | family.write(config)


class Fields:
    """A config.json read field by field, collecting every fault instead of stopping at the first."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.faults: list[str] = []

    def count(self, name: str, default: int | None = None, *, at_most: int = 2**24) -> int:
        """A whole number from 1 to `at_most`; `default` where the field is missing or null."""
        value = self.config.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= at_most:
            self.faults.append(f"{name} must be a whole number from 1 to {at_most}, got {value!r}")
            return 1
        return value

    def number(self, name: str, default: float | None = None, *, of: Mapping[str, Any] | None = None) -> float:
        """A number above zero."""
        value = (self.config if of is None else of).get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.faults.append(f"{name} must be a number above 0, got {value!r}")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            self.faults.append(f"{name} must be true or false, got {value!r}")
        return bool(value)

    def activation(self, name: str, default: str) -> Activation:
        value = self.config.get(name)
        value = default if value is None else value
        if value not in HF_ACTIVATIONS:
            self.faults.append(f"{name} {value!r} is not supported (supported: {', '.join(HF_ACTIVATIONS)})")
            return "silu"
        return HF_ACTIVATIONS[value]

    def only(self, **values: Any) -> None:
        """Refuse fields that are present with another value than the one whose computation we do."""
        for name, value in values.items():
            if self.config.get(name) not in (None, value):
                self.faults.append(f"{name} {self.config[name]!r} is not supported (only {value!r})")

    def rotary(self, default_theta: float) -> Rotary:
        """`rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (the hub)."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            self.faults.append(f"rope_parameters must be a table, got {rope!r}")
            return Rotary()
        theta = self.number("rope_theta", self.number("rope_theta", default_theta), of=rope)
        kind = rope.get("rope_type", rope.get("type", "default"))
        fraction = rope.get("partial_rotary_factor", self.config.get("partial_rotary_factor"))
        if fraction not in (None, 1, 1.0):
            self.faults.append(f"partial_rotary_factor {fraction!r} is not supported (only 1.0)")
        if kind == "default":
            return Rotary(theta=theta)
        if kind == "linear":
            return Rotary(theta=theta, scaling=LinearScaling(factor=self.number("factor", of=rope)))
        if kind == "llama3":
            scaling = Llama3Scaling(
                factor=self.number("factor", of=rope),
                low_freq_factor=self.number("low_freq_factor", of=rope),
                high_freq_factor=self.number("high_freq_factor", of=rope),
                original_max_tokens=int(self.number("original_max_position_embeddings", of=rope)),
            )
            return Rotary(theta=theta, scaling=scaling)
        self.faults.append(f"rope_type {kind!r} is not supported (supported: default, linear, llama3)")
        return Rotary(theta=theta)


def _contradictions(config: DecoderConfig) -> list[str]:
    a = config.attention
    faults = []
    if a.num_heads % a.num_kv_heads:
        faults.append(f"{a.num_heads} attention heads can't share {a.num_kv_heads} key/value heads")
    if isinstance(config.position, Rotary) and a.head_dim % 2:
        faults.append(f"head_dim {a.head_dim} is odd, and rotary positions turn pairs")
    return faults


# ── Llama and Qwen3 ──────────────────────────────────────────────────────────────────────────────────────────────────

HF_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
HF_NAMES: dict[Activation, str] = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def read_llama(fields: Fields) -> DecoderConfig:
    return _read_llama(fields, head_dim=None, theta=10_000.0, qk_norm=False)


def read_qwen3(fields: Fields) -> DecoderConfig:
    fields.only(use_sliding_window=False)
    kinds = fields.config.get("layer_types")
    if kinds is not None and set(kinds) != {"full_attention"}:
        fields.faults.append(f"layer_types {sorted(set(kinds))} are not supported (only full_attention)")
    return _read_llama(fields, head_dim=128, theta=10_000.0, qk_norm=True)


def _read_llama(fields: Fields, *, head_dim: int | None, theta: float, qk_norm: bool) -> DecoderConfig:
    fields.only(quantization_config=None)
    hidden_size, heads = fields.count("hidden_size"), fields.count("num_attention_heads", at_most=2**14)
    bias = fields.flag("attention_bias", False)
    return DecoderConfig(
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        num_layers=fields.count("num_hidden_layers", at_most=4096),
        max_tokens=fields.count("max_position_embeddings", 2048),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", heads, at_most=2**14),
            head_dim=fields.count("head_dim", head_dim or max(1, hidden_size // heads), at_most=2**14),
            bias=bias,
            output_bias=bias,
            qk_norm=qk_norm,
        ),
        mlp=FeedForward(
            size=fields.count("intermediate_size"),
            activation=fields.activation("hidden_act", "silu"),
            bias=False if qk_norm else fields.flag("mlp_bias", False),
        ),
        norm=Norm(eps=fields.number("rms_norm_eps", 1e-6)),
        position=fields.rotary(theta),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    a, position = config.attention, config.position
    assert isinstance(position, Rotary)
    rope: dict[str, Any] = {"rope_theta": position.theta, "rope_type": "default"}
    if isinstance(position.scaling, LinearScaling):
        rope |= {"rope_type": "linear", "factor": position.scaling.factor}
    if isinstance(position.scaling, Llama3Scaling):
        scaling = asdict(position.scaling)
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_tokens")
        rope |= {"rope_type": "llama3"} | scaling
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp.size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": HF_NAMES[config.mlp.activation],
        "max_position_embeddings": config.max_tokens,
        "rms_norm_eps": config.norm.eps,
        "attention_bias": a.bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope,
        # The older schema beside it: llama.cpp, vLLM and transformers 4 read these.
        "rope_theta": position.theta,
        "rope_scaling": None if position.scaling is None else old,
    } | ({} if a.qk_norm else {"mlp_bias": config.mlp.bias})


def llama_tensors(config: DecoderConfig) -> list[Stored]:
    """Our own names, under "model."."""
    names = _own_names(config)
    return [Stored(name if name.startswith("lm_head.") else f"model.{name}", (name,)) for name in names]


def _own_names(config: DecoderConfig) -> list[str]:
    a, mlp = config.attention, config.mlp
    weights = ("weight",) if config.norm.kind == "rms" else ("weight", "bias")

    def linear(name: str, bias: bool) -> list[str]:
        return [f"{name}.weight", f"{name}.bias"] if bias else [f"{name}.weight"]

    names = ["embed_tokens.weight"]
    if isinstance(config.position, Learned):
        names.append("embed_positions.weight")
    for layer in range(config.num_layers):
        at = f"layers.{layer}."
        names += [f"{at}input_layernorm.{w}" for w in weights]
        for part in ("q_proj", "k_proj", "v_proj"):
            names += linear(f"{at}self_attn.{part}", a.bias)
        names += linear(f"{at}self_attn.o_proj", a.output_bias)
        if a.qk_norm:
            names += [f"{at}self_attn.q_norm.weight", f"{at}self_attn.k_norm.weight"]
        names += [f"{at}post_attention_layernorm.{w}" for w in weights]
        for part in ("gate_proj", "up_proj", "down_proj") if mlp.gated else ("up_proj", "down_proj"):
            names += linear(f"{at}mlp.{part}", mlp.bias)
    names += [f"norm.{w}" for w in weights]
    return names if config.tie_embeddings else [*names, "lm_head.weight"]


# ── GPT-2 ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_gpt2(fields: Fields) -> DecoderConfig:
    fields.only(
        quantization_config=None,
        add_cross_attention=False,
        scale_attn_by_inverse_layer_idx=False,
    )
    hidden_size, heads = fields.count("n_embd", 768), fields.count("n_head", 12, at_most=2**14)
    if hidden_size % heads:
        fields.faults.append(f"n_embd {hidden_size} is not a multiple of n_head {heads}")
    return DecoderConfig(
        vocab_size=fields.count("vocab_size", 50_257),
        hidden_size=hidden_size,
        num_layers=fields.count("n_layer", 12, at_most=4096),
        max_tokens=fields.count("n_positions", 1024),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=max(1, hidden_size // heads),
            bias=True,
            output_bias=True,
            scale=None if fields.flag("scale_attn_weights", True) else 1.0,
        ),
        mlp=FeedForward(
            size=fields.count("n_inner", 4 * hidden_size, at_most=2**26),
            activation=fields.activation("activation_function", "gelu_new"),
            gated=False,
            bias=True,
        ),
        norm=Norm(kind="layer", eps=fields.number("layer_norm_epsilon", 1e-5)),
        position=Learned(),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_tokens,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.attention.num_heads,
        "n_inner": config.mlp.size,
        "activation_function": HF_NAMES[config.mlp.activation],
        "layer_norm_epsilon": config.norm.eps,
        "scale_attn_weights": config.attention.scale is None,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


GPT2_NAMES = {
    "embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip


def gpt2_tensors(config: DecoderConfig) -> list[Stored]:
    """Its linear layers are Conv1D: kept as [in, out], with q, k and v in one."""
    stored = []
    for name in _own_names(config):
        module, kind = name.rsplit(".", 1)
        if module == "lm_head":
            stored.append(Stored(name, (name,)))
            continue
        place, layer, module = ("h.", *module.split(".", 2)[1:]) if module.startswith("layers.") else ("", "", module)
        at = f"transformer.{place}{layer}{'.' if layer else ''}"
        transposed = kind == "weight" and "." in module
        if module == "self_attn.q_proj":
            parts = tuple(name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj"))
            stored.append(Stored(f"{at}attn.c_attn.{kind}", parts, transposed))
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            stored.append(Stored(f"{at}{GPT2_NAMES[module]}.{kind}", (name,), transposed))
    return stored


# ── Shapes of our own that no other library knows ────────────────────────────────────────────────────────────────────


def read_own(fields: Fields) -> DecoderConfig:
    """The fields of `DecoderConfig` themselves, under "decoder"."""
    raw = fields.config.get("decoder")
    try:
        config: DecoderConfig = TypeAdapter(DecoderConfig).validate_python(raw)
    except ValidationError as error:
        fields.faults += [f"decoder.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        return read_gpt2(Fields({}))
    if asdict(config) != raw:
        fields.faults.append("decoder has fields that this version of ownlm doesn't write")
    return config


def write_own(config: DecoderConfig) -> dict[str, Any]:
    return {"decoder": asdict(config)}


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel", read=read_gpt2, write=write_gpt2, tensors=gpt2_tensors,
        prefix="transformer.", derived=r"(.*\.)?h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "llama": Family(
        architecture="LlamaForCausalLM", read=read_llama, write=write_llama, tensors=llama_tensors,
        prefix="model.", derived=r".*rotary_emb\.inv_freq",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM", read=read_qwen3, write=write_llama, tensors=llama_tensors, prefix="model.",
    ),
    "ownlm": Family(architecture="Decoder", read=read_own, write=write_own, tensors=llama_tensors, prefix="model."),
}  # fmt: skip

assert set(HF_NAMES) == set(ACTIVATIONS)
