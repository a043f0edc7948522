"""transformers' T5, mT5 and XLNet with loud random weights, to compare ours with."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

T5: dict[str, Any] = {
    "model_type": "t5", "vocab_size": 97, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 12, "relative_attention_max_distance": 40, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
XLNET: dict[str, Any] = {
    "model_type": "xlnet",
    "vocab_size": 97,
    "d_model": 32,
    "n_head": 4,
    "d_inner": 48,
    "n_layer": 3,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "t5-1.0": T5,
    "t5-1.1": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5-silu": T5 | {"feed_forward_proj": "gated-silu"},
    "mt5": T5 | {"model_type": "mt5", "feed_forward_proj": "gated-gelu"},
    "xlnet": XLNET,
    "xlnet-uni": XLNET | {"attn_type": "uni", "clamp_len": 7, "mem_len": 9, "reuse_len": 8, "ff_activation": "relu"},
}
T5S = [name for name in CONFIGS if "t5" in name]
XLNETS = [name for name in CONFIGS if "xlnet" in name]
CLASSES = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration", "xlnet": "XLNetLMHeadModel"}
UNTIED = ("t5-1.1", "mt5")  # their head is a matrix of its own, though transformers calls them tied


def loud(config: dict[str, Any], *, untied: bool = False, kind: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A model in fp32 whose every weight matters."""
    made = AutoConfig.for_model(**config)
    made._attn_implementation = "eager"
    model = getattr(transformers, kind or CLASSES[config["model_type"]])(made).float()
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + 1.0 if parameter.ndim == 1 and name.endswith("weight") else noise)
            if name.endswith("Attention.q.weight"):
                # T5's trained queries are small, for nothing divides the scores: larger ones choose a single key.
                parameter.mul_(config["d_kv"] ** -0.5)
    return model.eval()


def save(name: str, directory: Path, *, kind: str | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    model = loud(CONFIGS[name] | changes, untied=name in UNTIED and kind is None, kind=kind, seed=seed)
    model.save_pretrained(directory)
    return model
