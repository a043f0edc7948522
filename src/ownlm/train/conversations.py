"""Tuning on conversations: which of their tokens are trained, and how that is shown."""

from typing import Any

import torch

from ownlm.artifact import Artifact
from ownlm.errors import UserError
from ownlm.records import Conversation, read_jsonl
from ownlm.report import Reporter
from ownlm.tokens.batches import UNTRAINED, Batches, ConversationRows, DocumentRows, validation_conversations
from ownlm.tokens.codec import Tokenizer
from ownlm.train.tasks import Prepared


def prepare_chat(
    model: Any,
    source: Artifact,
    tokenizer: Tokenizer,
    documents: DocumentRows | None,
    reporter: Reporter,
    *,
    context: int,
    rows: int,
    micro_rows: int,
    document_share: float,
    seed: int,
) -> tuple[Prepared, str]:
    """A run on conversations, and its first one with what is trained in it."""
    conversations = _conversations(source, "conversations.jsonl", tokenizer, context, seed)
    left_out = conversations.too_long + conversations.untrained
    if left_out:
        reporter.line(
            f"{left_out} conversations are left out: {conversations.too_long} are longer than {context} tokens (the longest "
            f"has {conversations.longest}), {conversations.untrained} have no assistant turn."
        )
    batches = Batches(
        conversations, rows=rows, micro_rows=micro_rows, documents=documents, document_share=document_share
    )
    everything = None
    if source.has("conversations_validation.jsonl"):
        held_out = _conversations(source, "conversations_validation.jsonl", tokenizer, context, seed)
        everything = lambda: validation_conversations(held_out, rows=micro_rows)
    shown = show_mask(tokenizer, conversations)
    reporter.line(f"What is trained in the first conversation, between [ ]:\n{shown}")
    return Prepared(model=model, objective="chat", batches=batches, everything=everything), shown


def show_mask(tokenizer: Tokenizer, conversations: ConversationRows) -> str:
    """The first packed row's first conversation as text, with what is trained between [ and ]."""
    rows = conversations.packed(torch.zeros(1, dtype=torch.int64).numpy())
    first = rows.documents[0] == 0
    tokens, targets = rows.tokens[0][first], rows.targets[0][first]
    pieces = [tokenizer.decode([int(tokens[0])], special=True)]
    open_ = False
    for at, target in enumerate(targets.tolist()):
        trained = target != UNTRAINED
        id = target if trained else int(tokens[at + 1]) if at + 1 < len(tokens) else None
        if trained != open_:
            pieces.append("[" if trained else "]")
            open_ = trained
        if id is not None:
            pieces.append(tokenizer.decode([id], special=True))
    return "".join(pieces) + ("]" if open_ else "")


def _conversations(source: Artifact, file: str, tokenizer: Tokenizer, context: int, seed: int) -> ConversationRows:
    if not source.has(file):
        raise UserError(
            "these documents have no conversations to learn from.",
            where=source.ref,
            cure="Add jsonl files with `messages`, or finetune on other documents.",
        )
    return ConversationRows(read_jsonl(source.file(file), Conversation), tokenizer, context, seed=seed)
