"""The families that llama.cpp computes, as transformers configs with loud weights, and its name for each; and T5s, by their names in
seq2seq.py, with the one thing about them that llama.cpp takes for granted."""

from typing import Any

from references import CONFIGS, LONG, YARN

LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

SHORT = {"original_max_position_embeddings": 300}  # longer than what is read

# name -> (architecture, config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", CONFIGS["gpt2"]),
    "gpt-neox": ("gptneox", CONFIGS["gpt-neox"]),
    "llama": ("llama", CONFIGS["llama"]),
    "llama-biased": ("llama", CONFIGS["llama-biased"] | {"hidden_act": "silu"}),
    "llama3": ("llama", CONFIGS["llama3"]),
    "llama3.1": ("llama", CONFIGS["llama3"] | {"rope_parameters": LLAMA31, "head_dim": 64}),
    "llama-linear": ("llama", CONFIGS["llama-linear"]),
    "llama-yarn": ("llama", CONFIGS["llama-yarn"] | {"rope_parameters": YARN | {"truncate": True}}),
    "mistral": ("llama", CONFIGS["mistral"] | {"sliding_window": None}),
    "mixtral": ("llama", CONFIGS["mixtral"]),
    "phi2": ("phi2", CONFIGS["phi2"]),
    "phi3": ("phi3", CONFIGS["phi3"] | {"sliding_window": None}),
    "phi3-longrope": ("phi3", CONFIGS["phi3-longrope"] | SHORT | {"rope_parameters": LONG | SHORT}),
    "gemma": ("gemma", CONFIGS["gemma"]),
    "gemma2": ("gemma2", CONFIGS["gemma2"] | {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3", CONFIGS["gemma3"] | {"query_pre_attn_scalar": 16}),
    "qwen2": ("qwen2", CONFIGS["qwen2"]),
    "qwen3": ("qwen3", CONFIGS["qwen3"]),
    "qwen3-moe": ("qwen3moe", CONFIGS["qwen3-moe"] | {"norm_topk_prob": True}),
    "gpt-oss": ("gpt-oss", CONFIGS["gpt-oss"]),
}  # fmt: skip
T5S = ("t5-1.0", "t5-1.1", "mt5")
DISTANCE = {"relative_attention_max_distance": 128}
