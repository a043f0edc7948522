"""transformers' encoders with loud random weights and a head of every kind."""

from pathlib import Path
from typing import Any

import torch
import transformers
from references import make_loud
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

BASE: dict[str, Any] = {"vocab_size": 97, "max_position_embeddings": 200}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LABELS = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **BASE, **SHAPE},
    "bert-relu": {"model_type": "bert", **BASE, **SHAPE, "hidden_act": "relu", "type_vocab_size": 3, "layer_norm_eps": 1e-5},
    "roberta": {"model_type": "roberta", **BASE, **SHAPE, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1},
    "roberta-tanh": {"model_type": "roberta", **BASE, **SHAPE, "hidden_act": "gelu_new", "pad_token_id": 0},
    "xlm-roberta": {"model_type": "xlm-roberta", **BASE, **SHAPE, "type_vocab_size": 1},
    "camembert": {"model_type": "camembert", **BASE, **SHAPE, "type_vocab_size": 1},
    "distilbert": {"model_type": "distilbert", **BASE, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "distilbert-relu": {
        "model_type": "distilbert", **BASE, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "activation": "relu",
        "sinusoidal_pos_embds": True,
    },
}  # fmt: skip
CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
}
KINDS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
CASES = [(name, kind) for name in ENCODERS for kind in KINDS] + [
    ("bert", "ForPreTraining"), ("bert", "ForNextSentencePrediction"),
]  # fmt: skip


def save_encoder(name: str, kind: str, directory: Path, **changes: Any) -> PreTrainedModel:
    config = ENCODERS[name] | changes
    if kind in ("ForSequenceClassification", "ForTokenClassification"):
        config = LABELS | config
    cls = getattr(transformers, CLASSES[config["model_type"]] + kind)
    model = make_loud(cls._from_config(AutoConfig.for_model(**config), attn_implementation="eager"))
    model.save_pretrained(directory)
    return model


def batch(model_type: str, rows: int = 3, length: int = 160) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right with the padding id; types where the family has them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 97, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([length, length // 3, 7])[:, None]
    given = {"input_ids": ids, "attention_mask": mask}
    if model_type == "bert":
        given["token_type_ids"] = (torch.arange(length) >= 5).long().expand(rows, -1)
    return given


def answer(reference: PreTrainedModel, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that a transformers model says, by our names, real tokens only."""
    ids = given["input_ids"].masked_fill(~given["attention_mask"], reference.config.pad_token_id)
    with torch.no_grad():
        out = reference(**given | {"input_ids": ids, "attention_mask": given["attention_mask"].long()})
    keys = {
        "last_hidden_state": "hidden", "pooler_output": "pooled", "logits": "logits", "prediction_logits": "logits",
        "seq_relationship_logits": "follows", "start_logits": "start", "end_logits": "end",
    }  # fmt: skip
    found = {ours: out[theirs] for theirs, ours in keys.items() if theirs in out}
    if type(reference).__name__.endswith("NextSentencePrediction"):
        found = {"follows": found["logits"]}
    return {key: real(value, given["attention_mask"]) for key, value in found.items()}


def real(value: Tensor, mask_BT: Tensor) -> Tensor:
    return value[mask_BT] if value.shape[:2] == mask_BT.shape else value
