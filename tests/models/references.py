"""transformers models with loud random weights, to compare ours with.

Quiet weights hide mistakes: matrices are N(0, 0.3²), and norms and biases are random too.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}

NEO: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "max_position_embeddings": 256, "intermediate_size": 48,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GEMMA: dict[str, Any] = SMALL | {"head_dim": 16, "pad_token_id": None}
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 64, "truncate": False,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 8.0], "original_max_position_embeddings": 100,
}  # fmt: skip
PHI3: dict[str, Any] = SMALL | {"pad_token_id": 0, "max_position_embeddings": 512}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-untied-gelu": {
        "model_type": "gpt2", **GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40,
        "scale_attn_weights": False,
    },
    "gpt-neo": {
        "model_type": "gpt_neo", **NEO, "num_layers": 2, "num_heads": 4, "window_size": 24,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt-neox": {
        "model_type": "gpt_neox", **NEO, "num_hidden_layers": 2, "num_attention_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    },
    "gpt-neox-sequential": {
        "model_type": "gpt_neox", **NEO, "num_hidden_layers": 2, "num_attention_heads": 4, "use_parallel_residual": False,
        "attention_bias": False,
    },
    "llama": {"model_type": "llama", **SMALL},
    "llama-biased": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True, "hidden_act": "relu2"},
    "llama3": {"model_type": "llama", **SMALL, "head_dim": 32, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama-linear": {
        "model_type": "llama", **SMALL, "head_dim": 16,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    },
    "llama-yarn": {"model_type": "llama", **SMALL, "head_dim": 16, "rope_parameters": YARN},
    "mistral": {"model_type": "mistral", **SMALL, "sliding_window": 24, "head_dim": 16},
    "mixtral": {"model_type": "mixtral", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi2": {
        "model_type": "phi", **{k: v for k, v in SMALL.items() if k != "rms_norm_eps"}, "layer_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    "phi3": {"model_type": "phi3", **PHI3, "sliding_window": 24},
    "phi3-longrope": {
        "model_type": "phi3", **PHI3, "rope_parameters": LONG, "original_max_position_embeddings": 100,
    },
    "gemma": {"model_type": "gemma", **GEMMA},
    "gemma2": {"model_type": "gemma2", **GEMMA, "sliding_window": 24, "query_pre_attn_scalar": 20},
    "gemma3": {
        "model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 3, "sliding_window": 24, "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "qwen2": {"model_type": "qwen2", **SMALL},
    "qwen2-windows": {
        "model_type": "qwen2", **SMALL, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 16},
    "qwen3-tied": {"model_type": "qwen3", **SMALL, "head_dim": 8, "tie_word_embeddings": True, "attention_bias": True},
    "qwen3-moe": {
        "model_type": "qwen3_moe", **SMALL, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "norm_topk_prob": False,
    },
    "gpt-oss": {
        "model_type": "gpt_oss", **SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": 24, "rope_parameters": YARN, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


def loud(config: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A transformers model in fp32 whose every weight matters."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager").float()
    return make_loud(model, seed)


def make_loud(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(noise + 1.0 if norm else noise)
    return model.eval()


def save(config: dict[str, Any], directory: Path, seed: int = 0) -> PreTrainedModel:
    model = loud(config, seed)
    model.save_pretrained(directory)
    return model


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """max|Δ| in units of max(1, max|reference|); the bar is 1e-5."""
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1.0))
