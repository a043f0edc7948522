"""A random model of a few thousand parameters with a byte-level tokenizer, for tests of what needs any model at all."""

import copy
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from ownlm.adapters.lora import LoRA, add_lora, merge, wrappers
from ownlm.adapters.peft import load_adapter, save_adapter
from ownlm.generate.model import Model
from ownlm.models.decoder import Decoder, uniform
from ownlm.models.specs import Attention, FeedForward, Rotary
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.template import CHATML

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer() -> Tokenizer:
    """One token per byte and the special tokens of our own checkpoints."""
    alphabet = sorted(ByteLevel.alphabet())
    backend = Backend(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    return Tokenizer(backend, config)


def tiny_model(*, context: int = 128, seed: int = 0, gain: float = 1.0, slots: int = 8) -> Model:
    """A model with loud random weights, so that every token matters to the next; `gain` above 1 makes it surer of itself."""
    tokenizer = tiny_tokenizer()
    config = uniform(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=2,
        max_tokens=context,
        attention=Attention(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True),
        mlp=FeedForward(size=48),
        rotary=Rotary(),
    )
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5 * 1.5)
        decoder.head_weight.mul_(gain)
    return Model(decoder, tokenizer, name="tiny", ref="tiny@1", digest="0" * 64, slots=slots)


def tiny_adapter(model: Model, folder: Path, *, seed: int, rank: int = 4, train_also: tuple[str, ...] = ()) -> Path:
    """A loud adapter of every layer in PEFT's files; what is trained whole is changed a little."""
    decoder = copy.deepcopy(model.writer())
    add_lora(decoder, LoRA(rank=rank, alpha=2 * rank, targets="all-linear", train_also=train_also), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in wrappers(decoder):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_adapter(decoder, folder)
    return folder


def tiny_merged(model: Model, folder: Path) -> Model:
    """The model with the adapter in its weights."""
    decoder = copy.deepcopy(model.writer())
    load_adapter(decoder, folder)
    merge(decoder)
    return Model(decoder, model.tokenizer, name=f"{model.name}-merged", slots=model.slots)
