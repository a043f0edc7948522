"""Models: shapes of computation, and the families of checkpoints that are settings of them. An afternoon's reading, in this order:

    specs                        a layer as frozen data
    rotary, attention, blocks    what a layer computes, and `cache`, where it leaves keys and values
    skeleton                     what shapes that read tokens have in common
    decoder                      GPT, Llama, Mistral, Mixtral, Phi, Gemma, Qwen, GPT-OSS, Grok
    encoder, encoder_decoder     BERT, RoBERTa, DistilBERT; T5
    two_stream                   XLNet
    vision, dual, vision_language  ViT; CLIP; LLaVA, Pixtral, Mistral 3
    heads                        what reads hidden states
    names                        a stored tensor, made of which of ours
    families/                    config.json -> one of the shapes, and its names: `fields`, `layers`, then the rows in `__init__`

To the right of it stand what is done to a model's weights: `quantization`, `adapters`, and `checkpoints`, which brings them in and out.
"""
