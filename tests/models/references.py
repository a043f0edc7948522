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

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-untied-gelu": {
        "model_type": "gpt2", **GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40,
        "scale_attn_weights": False,
    },
    "llama": {"model_type": "llama", **SMALL},
    "llama-biased": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True, "hidden_act": "relu2"},
    "llama3": {"model_type": "llama", **SMALL, "head_dim": 32, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama-linear": {
        "model_type": "llama", **SMALL, "head_dim": 16,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    },
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 16},
    "qwen3-tied": {"model_type": "qwen3", **SMALL, "head_dim": 8, "tie_word_embeddings": True, "attention_bias": True},
}  # fmt: skip


def loud(config: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A transformers model in fp32 whose every weight matters."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager").float()
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
