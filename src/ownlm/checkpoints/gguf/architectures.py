"""GGUF's architectures: what the keys of a file mean.

    keys ─► read ─► config.json ─► FAMILIES ─► our config ─► names.py: our tensors <-> the file's
    keys ◄─────────── keys.py ◄─────────────────────┘

An architecture reads its keys into the config.json of the family it stands for, so that one place says what a config
computes. Whether an architecture can hold a config is not listed anywhere: write it, read it back, compare
(`write.py`). Source: llama.cpp, src/models/*.cpp and conversion/.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ownlm import gguf
from ownlm.checkpoints.gguf import names
from ownlm.checkpoints.gguf.keys import DIVISORS, LONG, POOLINGS, SHORT, divisors_of
from ownlm.errors import ArtifactError
from ownlm.formats.ggml import Blocks
from ownlm.models.families import FAMILIES, Family, from_hf
from ownlm.models.heads import Pooling
from ownlm.models.names import Table, fixed
from ownlm.models.specs import Llama3Scaling, Rotary

LARGEST = 2**31
PARTIAL = ("gptneox", "phi2", "phi3")  # where llama.cpp turns a part of each head
# Tensors that say how positions turn, and are read with the keys.
DERIVED = r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd\.weight"


class Keys:
    """The keys of one file under its architecture's name, checked one by one. ArtifactError names the key."""

    def __init__(self, file: gguf.File, small: Mapping[str, Tensor] | None = None) -> None:
        """`small` stands in for tensors that aren't in the file yet."""
        self.file, self.small = file, small or {}
        found = file.metadata.get("general.architecture")
        self.architecture = found if isinstance(found, str) else ""

    def holds(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def rows(self, tensor: str) -> int:
        if tensor not in self.file.tensors:
            self.fail(f"tensor {tensor} is missing.")
        return self.file.tensors[tensor].shape[0]

    def value(self, key: str) -> Any:
        """A plain Python value, or None. Where a list says the same of every layer, that."""
        value = self.file.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, np.ndarray) and len(value):
            if (value != value[0]).any():
                self.fail(f"{self.architecture}.{key} differs between layers, which ownlm doesn't compute.")
            value = value[0]
        if isinstance(value, list | np.ndarray):
            self.fail(f"{self.architecture}.{key} must not be a list.")
        if isinstance(value, np.floating):
            return float(str(value))  # the shortest number that it stands for: 1e-5, not 9.999999747e-06
        return value.item() if isinstance(value, np.generic) else value

    def count(self, key: str, default: int | None = None, *, at_least: int = 1) -> int:
        value = self.value(key)
        value = default if value is None else value
        if type(value) is not int or not at_least <= value <= LARGEST:
            self.fail(f"{self.architecture}.{key} must be a whole number from {at_least}, got {value!r:.60}.")
        return value

    def layers(self, stack: str = "blk.", key: str = "block_count") -> int:
        """How many there are: as many as the file says and holds, so that a claim costs no more than its tensors."""
        claimed = self.count(key)
        held = {name.removeprefix(stack).split(".")[0] for name in self.file.tensors if name.startswith(stack)}
        if claimed != len(held):
            self.fail(f"{self.architecture}.{key} is {claimed}, but there are tensors of {len(held)} layers.")
        return claimed

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.fail(f"{self.architecture}.{key} must be a number, got {value!r:.60}.")
        return float(value)

    def flags(self, key: str) -> list[bool] | None:
        """For each layer one, or None where the file doesn't say."""
        value = self.file.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, np.ndarray):
            return None
        if value.dtype.kind not in "bui" or len(value) != self.layers():
            self.fail(f"{self.architecture}.{key} must say yes or no for each layer.")
        return [bool(flag) for flag in value]

    def numbers(self, tensor: str) -> list[float]:
        """The numbers of a small tensor."""
        if tensor in self.small:
            return [float(number) for number in self.small[tensor]]
        info = self.file.tensors[tensor]
        if info.type != "F32" or len(info.shape) != 1 or info.shape[0] > 2**14:
            self.fail(f"tensor {tensor} must be a short list of F32.")
        _, raw, _ = next(gguf.stream(gguf.File(self.file.path, {}, {tensor: info})))
        return [float(number) for number in Blocks("F32", torch.from_numpy(raw), info.shape).tensor()]

    def fail(self, what: str) -> NoReturn:
        raise ArtifactError(what, where=str(self.file.path))


# ── Keys -> config.json ──────────────────────────────────────────────────────────────────────────────────────────────


MULTI_HEAD = ("head_dim", "num_key_value_heads")  # fields that families of plain heads don't have


def decoder(
    keys: Keys, model_type: str, *, without: tuple[str, ...] = (), stack: str = "blk.", **others: Any
) -> dict[str, Any]:
    """What the config.json of most decoders says, as the family spells it. `stack` begins the names of its layers."""
    hidden_size, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", max(1, hidden_size // heads))
    if keys.count("attention.value_length", head_dim) != head_dim:
        keys.fail("keys and values of different width are not supported.")
    rms = "_rms" if keys.value("attention.layer_norm_rms_epsilon") is not None else ""
    told = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "vocab_size": keys.rows("token_embd.weight"),
        "hidden_size": hidden_size,
        "num_hidden_layers": keys.layers(stack),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": keys.count("feed_forward_length"),
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps" if rms else "layer_norm_eps": keys.number(f"attention.layer_norm{rms}_epsilon"),
        "tie_word_embeddings": not keys.holds("output.weight"),
        "rope_parameters": None if "rope_parameters" in without else rope(keys, head_dim),
    } | others
    spelled = FAMILIES[model_type].spelled
    return {spelled.get(name, name): value for name, value in told.items() if name not in without}


def rope(keys: Keys, head_dim: int) -> dict[str, Any]:
    dims = min(keys.count("rope.dimension_count", head_dim), head_dim)
    if dims < head_dim and keys.architecture not in PARTIAL:
        keys.fail(f"{keys.architecture} models turn whole heads, not {dims} of {head_dim} dimensions.")
    fraction = dims / head_dim
    while int(head_dim * fraction) < dims:  # as transformers counts them
        fraction = math.nextafter(fraction, 2.0)
    told: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10_000.0)}
    told |= {} if fraction == 1.0 else {"partial_rotary_factor": fraction}
    kind, context = keys.value("rope.scaling.type"), keys.count("context_length")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    original = keys.count("rope.scaling.original_context_length", context)
    if keys.holds(DIVISORS):
        return told | _divided(keys.numbers(DIVISORS), told["rope_theta"], dims, context)
    if kind == "yarn":
        attention = keys.number("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(max(factor, 1.0)) + 1.0)
        told |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return told | {"attention_factor": attention, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    if keys.holds(LONG):
        told |= {"rope_type": "longrope", "long_factor": keys.numbers(LONG), "short_factor": keys.numbers(SHORT)}
        return told | {
            "original_max_position_embeddings": original,
            "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
        }
    if kind not in (None, "none", "linear"):
        keys.fail(f"rope.scaling.type {kind!r:.60} is not supported.")
    return told | ({} if factor == 1.0 or kind == "none" else {"rope_type": "linear", "factor": factor})


def _divided(divisors: list[float], theta: float, dims: int, context: int) -> dict[str, Any]:
    """Llama 3's scaling if these are its divisors, as Meta's models have it; LongRope with the same for any length if not."""
    scaling = Llama3Scaling(factor=max(divisors), low_freq_factor=1.0, high_freq_factor=4.0, original_max_tokens=8192)
    wanted = divisors_of(Rotary(theta=theta, scaling=scaling), dims)
    if len(divisors) == dims // 2 and all(map(lambda a, b: math.isclose(a, b, rel_tol=1e-5), divisors, wanted)):
        told = {"rope_type": "llama3", "factor": scaling.factor, "original_max_position_embeddings": 8192}
        return told | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    told = {"rope_type": "longrope", "long_factor": divisors, "short_factor": divisors}
    return told | {"attention_factor": 1.0, "original_max_position_embeddings": context}


def read_llama(keys: Keys) -> dict[str, Any]:
    biased = keys.holds("blk.0.attn_q.bias")
    if keys.value("expert_count"):
        return decoder(keys, "mixtral", **experts(keys))
    return decoder(keys, "llama", attention_bias=biased, mlp_bias=keys.holds("blk.0.ffn_gate.bias"))


def experts(keys: Keys) -> dict[str, Any]:
    count, chosen = keys.count("expert_count"), keys.count("expert_used_count")
    return {"num_local_experts": count, "num_experts_per_tok": chosen}


def read_qwen3_moe(keys: Keys) -> dict[str, Any]:
    size = keys.count("expert_feed_forward_length")
    return decoder(keys, "qwen3_moe", moe_intermediate_size=size, norm_topk_prob=True, **experts(keys))


def read_gpt2(keys: Keys) -> dict[str, Any]:
    return decoder(keys, "gpt2", without=(*MULTI_HEAD, "rope_parameters"), hidden_act="gelu_new")


def read_gpt_neox(keys: Keys) -> dict[str, Any]:
    parallel = keys.value("use_parallel_residual") is True
    told = decoder(keys, "gpt_neox", without=MULTI_HEAD, use_parallel_residual=parallel, hidden_act="gelu")
    told["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return told


def read_phi(keys: Keys) -> dict[str, Any]:
    told = decoder(keys, "phi", hidden_act="gelu_new")
    told["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return told


def read_phi3(keys: Keys) -> dict[str, Any]:
    return decoder(keys, "phi3", sliding_window=keys.value("attention.sliding_window") or None, pad_token_id=None)


def read_gemma(keys: Keys) -> dict[str, Any]:
    return decoder(keys, "gemma", hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)


def read_gemma2(keys: Keys) -> dict[str, Any]:
    return decoder(
        keys,
        "gemma2",
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        query_pre_attn_scalar=_query_scalar(keys, 46),
        attn_logit_softcapping=keys.number("attn_logit_softcapping", 50.0) or None,
        final_logit_softcapping=keys.number("final_logit_softcapping", 30.0) or None,
        **windows(keys, 2, 4096),
    )


def read_gemma3(keys: Keys) -> dict[str, Any]:
    told = decoder(
        keys,
        "gemma3_text",
        hidden_act="gelu_pytorch_tanh",
        query_pre_attn_scalar=_query_scalar(keys, 62),
        attn_logit_softcapping=None,
        final_logit_softcapping=keys.number("final_logit_softcapping", 0.0) or None,
        **windows(keys, 6),
    )
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)}
    return told | {"rope_parameters": {"full_attention": told["rope_parameters"], "sliding_attention": local}}


def _query_scalar(keys: Keys, largest: int) -> float:
    """Scores are divided by the root of this: the head's width, but in the largest model, known by its layers."""
    hidden_size, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    wide = keys.layers() == largest
    return hidden_size // heads if wide else keys.count("attention.key_length", max(1, hidden_size // heads))


def windows(keys: Keys, every: int, default: int | None = None) -> dict[str, Any]:
    """Windows in all layers but every `every`-th, unless the file says in which."""
    window = keys.value("attention.sliding_window")
    window = default if window is None else window
    local = keys.flags("attention.sliding_window_pattern")
    if local is None:
        every = keys.count("attention.sliding_window_pattern", every)
        local = [bool((layer + 1) % every) for layer in range(keys.layers())]
    kinds = ["sliding_attention" if flag and window else "full_attention" for flag in local]
    return {"sliding_window": window or 4096, "layer_types": kinds}


def read_gpt_oss(keys: Keys) -> dict[str, Any]:
    told = decoder(keys, "gpt_oss", **experts(keys), **windows(keys, 2, 128), attention_bias=True)
    told["intermediate_size"] = keys.count("expert_feed_forward_length")
    if told["rope_parameters"]["rope_type"] == "yarn":
        told["rope_parameters"]["truncate"] = False  # as these models were trained; llama.cpp rounds
    return told


def read_grok(keys: Keys) -> dict[str, Any]:
    return decoder(
        keys,
        "grok-1",
        **experts(keys),
        max_attn_value=keys.number("attn_logit_softcapping", 30.0),
        attn_output_multiplier=keys.number("attention.output_scale", 0.08838834764831845),
        embedding_multiplier_scale=keys.number("embedding_scale", 78.38367176906169),
        output_multiplier_scale=keys.number("logit_scale", 0.5773502691896257),
    )


def read_bert(keys: Keys) -> dict[str, Any]:
    without = (*MULTI_HEAD, "rope_parameters", "tie_word_embeddings")
    types = keys.rows("token_types.weight") if keys.holds("token_types.weight") else 0  # DistilBERT has none
    told = decoder(keys, "bert", without=without, hidden_act="gelu", type_vocab_size=types)
    return told | {"architectures": ["BertModel"]}


def read_t5(keys: Keys) -> dict[str, Any]:
    """T5 and mT5. llama.cpp never scales what the head multiplies: where T5 1.0 does, the norm before has it (`write.py`)."""
    own = keys.value("decoder_block_count") is not None
    return decoder(
        keys,
        "t5",
        stack="enc.blk.",
        without=("rope_parameters", "num_key_value_heads"),
        num_decoder_layers=keys.layers("dec.blk.", "decoder_block_count" if own else "block_count"),
        relative_attention_num_buckets=keys.count("attention.relative_buckets_count"),
        relative_attention_max_distance=128,  # llama.cpp's only one
        feed_forward_proj="gated-gelu" if keys.holds("enc.blk.0.ffn_gate.weight") else "relu",
        scale_decoder_outputs=False,
        decoder_start_token_id=keys.count("decoder_start_token_id", 0, at_least=0),
    )


def pooling(keys: Keys) -> Pooling | None:
    """How a text's vector is made, where the file says."""
    told = keys.value("pooling_type")
    return next((Pooling(kind=kind) for kind, number in POOLINGS.items() if number == told), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """`head`: llama.cpp wants an output tensor, even if it equals the embedding. `square`: the heads together must be as wide as the
    model. `windows`: it applies them. `differs`: what it computes in its own way, told to whoever exports."""

    read: Callable[[Keys], dict[str, Any]]
    names: Callable[[Any], Table] = lambda config: names.COMMON
    head: bool = False
    square: bool = False
    windows: bool = False
    differs: str = ""


def meaning(keys: Keys, where: str = "config.json") -> tuple[dict[str, Any], Any, Family]:
    """(config.json, our config, family): what a file means. A family looks for a head under Hugging Face's name."""
    hf = ARCHITECTURES[keys.architecture].read(keys)
    stored = frozenset("lm_head.weight" if name == "output.weight" else name for name in keys.file.tensors)
    return hf, *from_hf(hf, where=where, stored=stored)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(read=read_llama, names=names.llama),
    "qwen3": Architecture(read=lambda keys: decoder(keys, "qwen3")),
    "gpt2": Architecture(read=read_gpt2, names=fixed(names.GPT2), square=True),
    "qwen2": Architecture(read=lambda keys: decoder(keys, "qwen2"), square=True),
    "qwen3moe": Architecture(read=read_qwen3_moe),
    "gptneox": Architecture(
        read=read_gpt_neox, names=fixed(names.FUSED), head=True, square=True, differs="GELU in its tanh form"
    ),
    "phi2": Architecture(read=read_phi, names=fixed(names.PHI), head=True, square=True),
    "phi3": Architecture(read=read_phi3, names=fixed(names.PHI3), square=True),
    "gemma": Architecture(read=read_gemma, names=fixed(names.GEMMA)),
    "gemma2": Architecture(read=read_gemma2, names=fixed(names.GEMMA), windows=True),
    "gemma3": Architecture(read=read_gemma3, names=fixed(names.GEMMA), windows=True),
    "gpt-oss": Architecture(
        read=read_gpt_oss,
        names=fixed(names.GPT_OSS),
        head=True,
        windows=True,
        differs="YaRN, where there is it, with rounded ends",
    ),
    "grok": Architecture(read=read_grok, names=fixed(names.GROK), square=True),
    "bert": Architecture(read=read_bert, names=fixed(names.BERT), differs="GELU in its tanh form"),
    "t5": Architecture(read=read_t5, names=fixed(names.T5)),
}
