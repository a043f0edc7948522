"""What families of checkpoints mean by the files of their tokenizers: by class, by `model_type`, by the number of ranks."""

from ownlm.tokens.patterns import GPT2, LLAMA3, O200K, QWEN2

# model_type in config.json -> tokenizer_class, for the directories that name no class.
CLASS_OF = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_neox", "gptj"), "GPT2"),
    **dict.fromkeys(("phi", "codegen"), "CodeGen"),
    **dict.fromkeys(("llama", "mistral", "mixtral", "mistral3", "phi3"), "Llama"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "Gemma"),
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), "Qwen2"),
    **dict.fromkeys(("clip", "clip_text_model"), "CLIP"),
    **{"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "bert": "Bert", "distilbert": "DistilBert"},
    **{"electra": "Electra", "t5": "T5", "mt5": "MT5", "xlnet": "XLNet", "albert": "Albert"},
}
# tokenizer_class without "Tokenizer" and "Fast" -> what vocab.json and merges.txt need beside them.
GPT2_LIKE = ("GPT2", "CodeGen", "GPTNeoX", "")
ROBERTA_LIKE = ("Roberta", "Bart", "Longformer", "LED")
BERT_LIKE = ("Bert", "DistilBert", "Electra", "MobileBert", "SqueezeBert", "ConvBert", "LayoutLM", "Lxmert", "DPR", "")
# These move SentencePiece's ids around and add languages: only their tokenizer.json says how.
SHIFTED = frozenset(
    "XLMRoberta Camembert MBart MBart50 Nllb Barthez XGLM Pegasus BigBird DebertaV2 FNet SeamlessM4T RemBert Reformer LayoutXLM "
    "M2M100 Marian Speech2Text PLBart".split()
)
# How many ranks -> (split, names of the special tokens by id).
RANKED: dict[int, tuple[str, dict[str, int]]] = {
    50256: (GPT2, {"<|endoftext|>": 50256}),
    100256: (
        LLAMA3,
        {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
        | {"<|endofprompt|>": 100276},
    ),
    199998: (O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    128000: (
        LLAMA3,
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004}
        | {"<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009}
        | {"<|python_tag|>": 128010}
        | {
            f"<|reserved_special_token_{at}|>": id
            for at, id in enumerate((128002, 128003, 128005, *range(128011, 128256)))
        },
    ),
    151643: (
        QWEN2,
        {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
        | {f"<|extra_{at}|>": 151646 + at for at in range(205)},
    ),
}
