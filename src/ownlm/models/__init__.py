"""Models: shapes of computation, and the families of checkpoints that are settings of them. An afternoon's reading, in this order:

    specs                        a layer as frozen data
    rotary, attention, blocks    what a layer computes, and `cache`, what it leaves behind
    decoder                      GPT, Llama, Mistral, Mixtral, Phi, Gemma, Qwen, GPT-OSS, Grok
    encoder, encoder_decoder     BERT, RoBERTa, DistilBERT; T5
    two_stream                   XLNet
    vision, dual, vision_language  ViT; CLIP; LLaVA, Pixtral, Mistral 3
    heads, pooling, tuning       what reads hidden states, and a fresh head on a model that is there
    names                        a stored tensor, made of which of ours
    families/                    config.json -> one of the shapes, and its names: `fields`, `layers`, then the rows in `__init__`
    weights                      a checkpoint in and out

Beside them: gguf/ (llama.cpp's names for the same), adapters, peft and quantize.
"""
