"""What a pretraining run is made of: a fresh model of any family, batches for its objective, and what it learns from.

objective       model                batches
causal_lm       decoder              packed documents, the next token
masked_lm       encoder              rows with hidden tokens
span_corruption encoder-decoder      texts with holes, and the holes
permutation_lm  two streams (XLNet)  rows with an order
distillation    decoder or encoder   as causal_lm, or as masked_lm where `mask` is given; and a teacher
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ownlm import device
from ownlm.artifact import Artifact
from ownlm.checkpoints.weights import load_model
from ownlm.errors import UserError
from ownlm.models.decoder import Decoder, DecoderConfig
from ownlm.models.encoder import Encoder
from ownlm.models.encoder_decoder import EncoderDecoder
from ownlm.models.families import FAMILIES, from_hf
from ownlm.models.two_stream import TwoStream
from ownlm.report import Reporter
from ownlm.tokens.batches import Batches, DocumentRows, Micro, validation_documents
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.corrupt import MaskedLM, PermutationLM, SpanCorruption, marks
from ownlm.tokens.examples import Corruption, Made, corrupted, text_length, validation_corrupted
from ownlm.tokens.gguf import tokenizer_of
from ownlm.tokens.shards import Shard, open_shard
from ownlm.train.fresh import init_weights
from ownlm.train.objectives import OBJECTIVES, Distillation, Objective, distillation, start_from_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalLM:
    """Predict the next token of packed documents."""

    kind: Literal["causal_lm"] = "causal_lm"


Learning = CausalLM | MaskedLM | SpanCorruption | PermutationLM | Distillation
SKELETONS: dict[str, tuple[type, str, str]] = {
    "causal_lm": (Decoder, "a decoder", "llama"),
    "masked_lm": (Encoder, "an encoder", "bert"),
    "span_corruption": (EncoderDecoder, "an encoder-decoder", "t5"),
    "permutation_lm": (TwoStream, "a model of two streams", "xlnet"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Batches to train on, the same held-out ones each time `everything` is called, and the shard of these if its tokens are each
    a target once."""

    batches: Batches | Made[Micro]
    everything: Callable[[], Iterable[Micro]] | None
    held_out: Shard | None = None


def corruption_of(objective: Learning) -> Corruption | None:
    """What is hidden from the text; None where the next token is predicted."""
    if isinstance(objective, Distillation):
        return objective.mask
    return None if isinstance(objective, CausalLM) else objective


def new_model(
    objective: Learning, *, hf: Mapping[str, Any] | None, shape: DecoderConfig, tokenizer: Tokenizer, context: int, seed: int, where: str
) -> Any:  # fmt: skip
    """A fresh model: of `shape`, or of the Hugging Face config `hf`, whose vocabulary and special ids the tokenizer fills in.

    Raises UserError: unknown family, all values of the config that we can't take, a kind of model that the objective doesn't
    train, or one too small for the vocabulary or the context.
    """
    model: nn.Module = Decoder(shape) if hf is None else _of_family(hf, tokenizer, where)
    hides = corruption_of(objective)
    needed, called, example = SKELETONS["causal_lm" if hides is None else hides.kind]
    if not isinstance(model, needed):
        raise UserError(
            f"the objective {objective.kind} trains {called} here, and this is {_called(model)}.",
            where=where,
            cure=f'Set hf.model_type = "{example}" or another of that kind, or choose the objective for this model.',
        )
    # T5 and XLNet tell distances, not places, and have no longest text.
    if isinstance(model, Decoder | Encoder) and model.config.max_tokens < context:
        raise UserError(
            f"the context of {context} tokens is longer than the {model.config.max_tokens} that the shape allows.",
            where=where,
            cure="Raise max_position_embeddings in pretrain.hf or lower the context.",
        )
    return init_weights(model, seed=seed)


def _of_family(hf: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> Any:
    special = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "decoder_start_token_id": tokenizer.pad_id,
    }
    kind = hf.get("model_type")
    named = {"architectures": [FAMILIES[kind].architecture]} if kind in FAMILIES else {}
    filled = {**named, **special, "vocab_size": tokenizer.vocab_size, **hf}
    config, family = from_hf(filled, where=f"{where}: pretrain.hf")
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {config.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}.",
            where=f"{where}: pretrain.hf",
            cure="Leave vocab_size out: the tokenizer's is filled in.",
        )
    return family.build(config, filled)


def data(
    objective: Learning,
    tokens: Artifact,
    tokenizer: Tokenizer,
    model: Any,
    *,
    context: int,
    rows: int,
    micro_rows: int,
    document_mask: bool,
    seed: int,
) -> Data:
    """The batches of a run. Raises UserError where the vocabulary lacks a mask or sentinels, or the text is too short."""
    train = open_shard(tokens, "train")
    held_out = open_shard(tokens, "validation") if tokens.facts["splits"].get("validation", {}).get("tokens") else None
    hides = corruption_of(objective)
    if hides is None:
        source = DocumentRows(train, context, seed=seed, document_mask=document_mask)
        batches = Batches(source, rows=rows, micro_rows=micro_rows)
        if held_out is None:
            return Data(batches=batches, everything=None)
        everything = lambda: validation_documents(held_out, context, rows=micro_rows, document_mask=document_mask)
        return Data(batches=batches, everything=everything, held_out=held_out)
    known = marks(tokenizer, vocab_size=model.config.vocab_size)
    start_id = model.config.start_token if isinstance(model, EncoderDecoder) else None
    made = corrupted(
        train, hides, known, context=context, rows=rows, micro_rows=micro_rows, seed=seed, start_id=start_id
    )
    if held_out is None or len(held_out.ids) < text_length(hides, known, context):
        return Data(batches=made, everything=None)
    return Data(
        batches=made,
        everything=lambda: validation_corrupted(
            held_out, hides, known, context=context, rows=micro_rows, start_id=start_id
        ),
    )


def learning(
    objective: Learning, model: Any, teacher: Artifact | None, tokenizer: Tokenizer, reporter: Reporter
) -> tuple[Objective, Objective]:
    """(what is minimised, what scores held-out text): the same, unless there is a teacher, whose predictions are no score.

    Raises UserError when the teacher has another vocabulary, is another kind of model, or has hidden states of another size.
    """
    if not isinstance(objective, Distillation):
        found = OBJECTIVES[objective.kind]
        return found, found
    assert teacher is not None
    if tokenizer_of(teacher.path).digest != tokenizer.digest:
        raise UserError(
            "the teacher reads another vocabulary than the student.",
            where=teacher.ref,
            cure=f"Set pretrain.tokenizer to {teacher.ref}, whose tokenizer the student then shares.",
        )
    large = load_model(teacher.path, dtype=torch.float32).to(device.torch_device()).requires_grad_(False)
    if type(large) is not type(model):
        raise UserError(
            f"the teacher is {_called(large)} and the student is {_called(model)}.",
            where=teacher.ref,
            cure="Give student and teacher one kind: set hf.model_type.",
        )
    sizes = large.config.hidden_size, model.config.hidden_size
    if (objective.hidden or objective.initialise) and sizes[0] != sizes[1]:
        raise UserError(
            f"the teacher's hidden states have {sizes[0]} numbers and the student's {sizes[1]}.",
            where=teacher.ref,
            cure="Make them equal, or set objective.hidden = 0 and objective.initialise = false.",
        )
    if objective.initialise:
        chosen = start_from_teacher(model, large)
        reporter.line(f"The student begins with layers {', '.join(map(str, chosen))} of {teacher.ref}.")
    judge = OBJECTIVES["causal_lm" if objective.mask is None else "masked_lm"]
    return partial(distillation, teacher=large, settings=objective), judge


def _called(model: Any) -> str:
    return next(called for kind, called, _ in SKELETONS.values() if isinstance(model, kind))
