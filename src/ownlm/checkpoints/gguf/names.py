"""What llama.cpp calls our tensors, and how it lays them out: one table for each of its architectures.

Source: llama.cpp, gguf-py/gguf/constants.py (the names), conversion/ (what is turned around on the way).
"""

from ownlm.models.decoder import DecoderConfig
from ownlm.models.names import Table, To, block

QKV = ("layers.{}.self_attn.q_proj", "layers.{}.self_attn.k_proj", "layers.{}.self_attn.v_proj")
GATE_UP = ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj")
COMMON: Table = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    **block(
        "blk.{}",
        norms="attn_norm ffn_norm",
        attention="attn_q attn_k attn_v attn_output",
        qk_norms="attn_q_norm attn_k_norm",
        gated="ffn_gate ffn_up ffn_down",
        router="ffn_gate_inp",
        experts="ffn_gate_exps.weight ffn_up_exps.weight ffn_down_exps.weight",
        biases="ffn_gate_exps.bias ffn_up_exps.bias ffn_down_exps.bias",
    ),
}


def joined(table: Table, ours: tuple[str, ...], stored: str) -> Table:
    """The same with several of ours in one tensor."""
    return {key: value for key, value in table.items() if key not in ours} | {ours: stored}


def llama(config: DecoderConfig) -> Table:
    a = config.layers[0].attention
    q, k = To("blk.{}.attn_q", "pairs", a.num_heads), To("blk.{}.attn_k", "pairs", a.num_kv_heads)
    return COMMON | dict(zip(QKV, (q, k), strict=False))


FUSED = joined(COMMON, QKV, "blk.{}.attn_qkv")
GPT2 = FUSED | {"embed_positions": "position_embd"}
PHI = COMMON | {"lm_head_bias": "output.bias"}
PHI3 = joined(FUSED, GATE_UP, "blk.{}.ffn_up")
# Norms as they multiply; ours are kept as weight - 1.
GEMMA = (
    COMMON
    | {"norm": To("output_norm", "plus_one")}
    | block(
        "blk.{}",
        layout="plus_one",
        norms="attn_norm ffn_norm",
        after="post_attention_norm post_ffw_norm",
        qk_norms="attn_q_norm attn_k_norm",
    )
)
GPT_OSS = COMMON | block("blk.{}", norms="attn_norm post_attention_norm", sinks="attn_sinks.weight")
GROK = COMMON | block("blk.{}", after="attn_output_norm layer_output_norm")
# The body of an encoder: llama.cpp has no place for its pooler and heads.
BERT: Table = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "embed_types": "token_types",
    "embed_norm": "token_embd_norm",
    **block(
        "blk.{}",
        attention="attn_q attn_k attn_v attn_output",
        after="attn_output_norm layer_output_norm",
        mlp="ffn_up ffn_down",
    ),
}


def t5() -> Table:
    table: Table = {"embed_tokens": "token_embd", "lm_head": "output"}
    for stack, norm, ours in (("enc", "encoder_norm", "encoder"), ("dec", "norm", "decoder")):
        stored = f"{stack}.blk.{{}}"
        table |= {norm: f"{stack}.output_norm", f"{ours}_bias": f"{stack}.blk.0.attn_rel_b"}
        table |= block(stored, f"{ours}.{{}}", norms="attn_norm ffn_norm", gated="ffn_gate ffn_up ffn_down")
        table |= block(stored, f"{ours}.{{}}", attention="attn_q attn_k attn_v attn_o")
        table[f"{ours}.{{}}.cross_layernorm"] = f"{stored}.cross_attn_norm"
        table |= {f"{ours}.{{}}.cross_attn.{part}_proj": f"{stored}.cross_attn_{part}" for part in "qkvo"}
    return table


T5 = t5()
