"""The encoder families: BERT, RoBERTa (with XLM-RoBERTa and CamemBERT) and DistilBERT.

Their files differ in names and in what stands between the hidden states and the last layer of a head. Which head a file
has is told by its config's architecture; whether the masked-LM head, the pooler and the next-sentence head are there, by its tensors.
"""

from dataclasses import replace
from typing import Any, Literal

from ownlm.models.encoder import EncoderConfig
from ownlm.models.families.fields import Fields
from ownlm.models.families.heads import TASKS, kind_of, task_head
from ownlm.models.families.layers import gpt_layer, repeated
from ownlm.models.names import Table, block, nested
from ownlm.models.specs import Activation, Head, Task


def encoder(
    fields: Fields,
    *,
    masked_lm: str,
    lm_activation: Activation | None = None,
    dense: Activation | Literal["tanh"] = "tanh",
    pooler: bool = True,
    first_position: int = 0,
    **others: Any,
) -> EncoderConfig:
    """The shape of BERT. `masked_lm` is a tensor that files with such a head have, and `lm_activation` that of its dense
    layer if not the model's own; `dense` is that of a sequence head; `pooler`: bare models of the family have one."""
    fields.only(
        position_embedding_type="absolute", is_decoder=False, add_cross_attention=False, quantization_config=None
    )
    layer = gpt_layer(fields, norms="after")
    kind = kind_of(fields.config)
    if kind and kind not in TASKS:
        fields.faults.append(f"a model for {kind} is not supported (supported: {', '.join(TASKS)})")
    task = TASKS.get(kind)
    head = task_head(fields, task, activation=dense if task == "sequence" else None)
    if task in (None, "masked_lm") and fields.holds(masked_lm, task == "masked_lm"):
        fields.only(tie_word_embeddings=True)
        head = Head(task="masked_lm", activation=lm_activation or layer.mlp.activation)
    pretraining = kind in ("PreTraining", "NextSentencePrediction")
    rows = fields.count("max_position_embeddings", 512)
    if rows <= first_position:
        fields.faults.append(f"max_position_embeddings {rows} leaves no position beside that of padding")
    return EncoderConfig(
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        max_tokens=max(1, rows - first_position),
        layers=repeated(fields, layer),
        norm=layer.norm,
        pooler=fields.holds("pooler.dense.weight", pooler and (pretraining or not kind)),
        next_sentence=fields.holds("cls.seq_relationship.weight", pretraining),
        head=head,
        first_position=first_position,
        **others,
    )


def read_bert(fields: Fields) -> EncoderConfig:
    types = fields.count("type_vocab_size", 2, at_least=0)
    config = encoder(fields, masked_lm="cls.predictions.transform.dense.weight", token_types=types)
    # Of a sequence head, the pooler is the dense layer.
    return replace(config, pooler=False) if config.head and config.head.task == "sequence" else config


def read_roberta(fields: Fields) -> EncoderConfig:
    return encoder(
        fields,
        masked_lm="lm_head.dense.weight",
        lm_activation="gelu",
        first_position=1 + fields.count("pad_token_id", 1, at_least=0, at_most=2**20 - 1),
        token_types=fields.count("type_vocab_size", 2),
    )


def read_distilbert(fields: Fields) -> EncoderConfig:
    """Half of BERT's layers, no token types, no pooler. Sinusoidal positions lie in the files like learned ones."""
    return encoder(fields, masked_lm="vocab_transform.weight", dense="relu", pooler=False)


# Its files have no field for eps, and what stands there under BERT's name counts for nothing.
DISTILBERT_FIELDS = {
    "hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers", "intermediate_size": "hidden_dim",
    "hidden_act": "activation", "layer_norm_eps": "",
}  # fmt: skip

# ── Names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

EMBEDDINGS: Table = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "embed_norm": "embeddings.LayerNorm",
}
BERT = EMBEDDINGS | {
    "embed_types": "embeddings.token_type_embeddings",
    "pooler": "pooler",
    **block(
        "encoder.layer.{}",
        attention="attention.self.query attention.self.key attention.self.value attention.output.dense",
        after="attention.output.LayerNorm output.LayerNorm",
        mlp="intermediate.dense output.dense",
    ),
}
DISTILBERT = EMBEDDINGS | block(
    "transformer.layer.{}",
    attention="attention.q_lin attention.k_lin attention.v_lin attention.out_lin",
    after="sa_layer_norm output_layer_norm",
    mlp="ffn.lin1 ffn.lin2",
)
Heads = dict[Task, Table]
LABELS: Heads = {"token": {"head.out": "classifier"}, "span": {"head.out": "qa_outputs"}}


def heads(dense: str, norm: str, bias: str, sequence: tuple[str, str]) -> Heads:
    """What the layers of the masked-LM head and of that for a whole text are called."""
    masked_lm: Table = {"head.dense": dense, "head.norm": norm, "head.bias": bias}
    return LABELS | {"masked_lm": masked_lm, "sequence": {"head.dense": sequence[0], "head.out": sequence[1]}}


BERT_HEADS = heads(
    "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
    ("bert.pooler.dense", "classifier"),
)  # fmt: skip
ROBERTA_HEADS = heads(
    "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", ("classifier.dense", "classifier.out_proj")
)
DISTILBERT_HEADS = heads(
    "vocab_transform", "vocab_layer_norm", "vocab_projector.bias", ("pre_classifier", "classifier")
)


def names(config: EncoderConfig, prefix: str, body: Table, heads: Heads) -> Table:
    """The table of a file: `body` under its prefix, which files of the bare model leave out, and the head's."""
    begin = prefix if config.head is not None or config.next_sentence else ""
    head = {} if config.head is None else heads[config.head.task]
    return {**nested(body, "", begin), **head, "next_sentence": "cls.seq_relationship"}
