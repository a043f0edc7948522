"""The encoder families: BERT, RoBERTa (with XLM-RoBERTa and CamemBERT) and DistilBERT.

Their files differ in names and in what stands between the hidden states and the last layer of a head. Which head a file
has is told by its config's architecture; whether the masked-LM head, the pooler and the next-sentence head are there, by its tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from ownlm.models.encoder import EncoderConfig
from ownlm.models.families.fields import Fields
from ownlm.models.families.heads import TASKS, kind_of, task_head
from ownlm.models.names import Table
from ownlm.models.specs import Activation, Attention, FeedForward, Head, Layer, Norm, Task

HEADS, LAYERS, WIDTH = 2**14, 4096, 2**26  # no checkpoint comes near these


def encoder(
    fields: Fields,
    *,
    eps: float,
    activation: str = "hidden_act",
    sizes: tuple[str, str, str, str] = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"),
    masked_lm: str,
    lm_activation: Activation | None = None,
    dense: Activation | Literal["tanh"] = "tanh",
    pooler: bool = True,
    **others: Any,
) -> EncoderConfig:
    """The shape of BERT. `masked_lm` is a tensor that files with such a head have, and `lm_activation` that of its dense
    layer if not the model's own; `dense` is that of a sequence head; `pooler`: bare models of the family have one."""
    fields.only(
        position_embedding_type="absolute", is_decoder=False, add_cross_attention=False, quantization_config=None
    )
    hidden_size, heads = fields.count(sizes[0]), fields.count(sizes[1], at_most=HEADS)
    if hidden_size % heads:
        fields.faults.append(f"{sizes[0]} {hidden_size} is not divisible by {sizes[1]} {heads}")
    norm, act = Norm(kind="layer", eps=eps), fields.activation(activation, "gelu")
    attention = Attention(
        num_heads=heads, num_kv_heads=heads, head_dim=max(1, hidden_size // heads), bias=True, output_bias=True
    )
    mlp = FeedForward(size=fields.count(sizes[3], at_most=WIDTH), activation=act, gated=False, bias=True)
    layer = Layer(attention=attention, mlp=mlp, norm=norm, norms="after")

    kind = kind_of(fields.config)
    if kind and kind not in TASKS:
        fields.faults.append(f"a model for {kind} is not supported (supported: {', '.join(TASKS)})")
    task = TASKS.get(kind)
    head = task_head(fields, task, activation=dense if task == "sequence" else None)
    if task in (None, "masked_lm") and fields.holds(masked_lm, task == "masked_lm"):
        fields.only(tie_word_embeddings=True)
        head = Head(task="masked_lm", activation=lm_activation or act)
    pretraining = kind in ("PreTraining", "NextSentencePrediction")

    first = others.get("first_position", 0)
    rows = fields.count("max_position_embeddings", 512)
    if rows <= first:
        fields.faults.append(f"max_position_embeddings {rows} leaves no position beside that of padding")
    return EncoderConfig(
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        max_tokens=max(1, rows - first),
        layers=(layer,) * fields.count(sizes[2], at_most=LAYERS),
        norm=norm,
        pooler=fields.holds("pooler.dense.weight", pooler and (pretraining or not kind)),
        next_sentence=fields.holds("cls.seq_relationship.weight", pretraining),
        head=head,
        **others,
    )


def names(config: EncoderConfig, prefix: str, body: Mapping[str, str], heads: Mapping[Task, Table]) -> Table:
    """The table of a file: `body` under its prefix, which files of the bare model leave out, and the head's."""
    begin = prefix if config.head is not None or config.next_sentence else ""
    return {
        **{ours: f"{begin}{stored}" for ours, stored in body.items()},
        **(heads[config.head.task] if config.head is not None else {}),
    }


# ── BERT and RoBERTa ─────────────────────────────────────────────────────────────────────────────────────────────────

BODY = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "embed_types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "layers.{}.self_attn.q_proj": "encoder.layer.{}.attention.self.query",
    "layers.{}.self_attn.k_proj": "encoder.layer.{}.attention.self.key",
    "layers.{}.self_attn.v_proj": "encoder.layer.{}.attention.self.value",
    "layers.{}.self_attn.o_proj": "encoder.layer.{}.attention.output.dense",
    "layers.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.mlp.up_proj": "encoder.layer.{}.intermediate.dense",
    "layers.{}.mlp.down_proj": "encoder.layer.{}.output.dense",
    "layers.{}.mlp_norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler",
}
BERT_HEADS: dict[Task, Table] = {
    "masked_lm": {
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head.bias": "cls.predictions.bias",
    },
    "sequence": {"head.dense": "bert.pooler.dense", "head.out": "classifier"},
    "token": {"head.out": "classifier"},
    "span": {"head.out": "qa_outputs"},
}
ROBERTA_HEADS: dict[Task, Table] = {
    "masked_lm": {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head.bias": "lm_head.bias"},
    "sequence": {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"},
    "token": {"head.out": "classifier"},
    "span": {"head.out": "qa_outputs"},
}


def read_bert(fields: Fields) -> EncoderConfig:
    config = encoder(
        fields,
        eps=fields.number("layer_norm_eps", 1e-12),
        masked_lm="cls.predictions.transform.dense.weight",
        token_types=fields.count("type_vocab_size", 2),
    )
    # Of a sequence head, the pooler is the dense layer.
    return replace(config, pooler=False) if config.head and config.head.task == "sequence" else config


def read_roberta(fields: Fields) -> EncoderConfig:
    return encoder(
        fields,
        eps=fields.number("layer_norm_eps", 1e-12),
        masked_lm="lm_head.dense.weight",
        lm_activation="gelu",
        first_position=1 + fields.index("pad_token_id", 1, below=2**20),
        token_types=fields.count("type_vocab_size", 2),
    )


def bert_names(config: EncoderConfig) -> Table:
    return {**names(config, "bert.", BODY, BERT_HEADS), "next_sentence": "cls.seq_relationship"}


def roberta_names(config: EncoderConfig) -> Table:
    return names(config, "roberta.", BODY, ROBERTA_HEADS)


# ── DistilBERT ───────────────────────────────────────────────────────────────────────────────────────────────────────

DISTILBERT_BODY = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "layers.{}.self_attn.q_proj": "transformer.layer.{}.attention.q_lin",
    "layers.{}.self_attn.k_proj": "transformer.layer.{}.attention.k_lin",
    "layers.{}.self_attn.v_proj": "transformer.layer.{}.attention.v_lin",
    "layers.{}.self_attn.o_proj": "transformer.layer.{}.attention.out_lin",
    "layers.{}.attention_norm": "transformer.layer.{}.sa_layer_norm",
    "layers.{}.mlp.up_proj": "transformer.layer.{}.ffn.lin1",
    "layers.{}.mlp.down_proj": "transformer.layer.{}.ffn.lin2",
    "layers.{}.mlp_norm": "transformer.layer.{}.output_layer_norm",
}
DISTILBERT_HEADS: dict[Task, Table] = {
    "masked_lm": {
        "head.dense": "vocab_transform", "head.norm": "vocab_layer_norm", "head.bias": "vocab_projector.bias",
    },
    "sequence": {"head.dense": "pre_classifier", "head.out": "classifier"},
    "token": {"head.out": "classifier"},
    "span": {"head.out": "qa_outputs"},
}  # fmt: skip


def read_distilbert(fields: Fields) -> EncoderConfig:
    """Half of BERT's layers, no token types, no pooler. Sinusoidal positions lie in the files like learned ones."""
    return encoder(
        fields,
        eps=1e-12,
        activation="activation",
        sizes=("dim", "n_heads", "n_layers", "hidden_dim"),
        masked_lm="vocab_transform.weight",
        dense="relu",
        pooler=False,
    )


def distilbert_names(config: EncoderConfig) -> Table:
    return names(config, "distilbert.", DISTILBERT_BODY, DISTILBERT_HEADS)
