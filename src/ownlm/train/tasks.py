"""Fine-tuning on a task: the model with the head for it, and batches of labelled examples.

task             examples     head, objective                          families
classification   Labelled     sequence    sequence_classification      encoders, decoders
tokens           Tagged       token       token_classification         encoders, decoders
answer           Asked        span        span_answer                  encoders, and decoders as transformers has them
seq2seq          Rewritten    the model's own: seq2seq, or causal_lm   encoder-decoders, decoders
text             documents    the model's own, as it was pretrained    all
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ownlm.adapters.tuning import with_head
from ownlm.artifact import Artifact
from ownlm.documents.examples import FILES
from ownlm.errors import UserError
from ownlm.models.decoder import Decoder
from ownlm.models.encoder import Encoder
from ownlm.models.encoder_decoder import EncoderDecoder
from ownlm.models.two_stream import TwoStream
from ownlm.records import EXAMPLES, ExampleTask, Labelled, Tagged, read_jsonl
from ownlm.report import Reporter
from ownlm.tokens.batches import Batches, Micro
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.corrupt import MaskedLM, PermutationLM, SpanCorruption
from ownlm.tokens.examples import Made
from ownlm.tokens.shards import Shard
from ownlm.tokens.tasks import Examples, Reader, answer, classification, rewriting, tokens
from ownlm.train.pretraining import CausalLM, Learning, data

TaskName = Literal["chat", "text", "classification", "tokens", "answer", "seq2seq"]
HEADS: dict[ExampleTask, Any] = {"classification": "sequence", "tokens": "token", "answer": "span"}
OUTSIDE = "O"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run trains, on what, and by which objective."""

    model: Any
    objective: str
    batches: Batches | Made[Micro]
    everything: Callable[[], Iterable[Micro]] | None
    held_out: Shard | None = None
    fresh_head: bool = False


def task_of(source: Artifact) -> str:
    """The task that a documents artifact has examples of. UserError: none."""
    task = source.facts.get("task")
    if task not in EXAMPLES:
        raise UserError(
            "these documents hold no labelled examples.",
            where=source.ref,
            cure='Collect some: source = { kind = "examples", task = …, train = … }, or leave out finetune.task.',
        )
    return str(task)


def read_split(source: Artifact, split: str) -> list[Any]:
    """The examples of a part; none where it has none."""
    name = f"{FILES[split]}.jsonl"
    cls = EXAMPLES[source.facts["task"]]
    return list(read_jsonl(source.file(name), cls)) if source.has(name) else []


def prepare(
    task: ExampleTask, model: Any, source: Artifact, tokenizer: Tokenizer, reporter: Reporter, *,
    context: int, rows: int, micro_rows: int, prefix: str, seed: int,
) -> Prepared:  # fmt: skip
    """A run on labelled examples. The head stays where it has the same labels already.

    Raises UserError: the examples are of another task, or the family has no such head.
    """
    if (held := task_of(source)) != task:
        raise UserError(f"these are examples of {held}, not of {task}.", where=source.ref, cure=f'Set task = "{held}".')
    examples = {split: read_split(source, split) for split in ("train", "validation")}
    fresh = False
    labels: tuple[str, ...] = ()
    if task == "seq2seq":
        if not isinstance(model, Decoder | EncoderDecoder) or getattr(model, "task", None) is not None:
            raise UserError(
                "this model writes nothing.", where="task", cure="seq2seq is for encoder-decoders (T5) and decoders."
            )
    else:
        if not isinstance(model, Decoder | Encoder):
            raise UserError(
                f"a {type(model).__name__} takes no head for {task}.",
                where="task",
                cure="Give an encoder or a decoder.",
            )
        labels = labels_of(examples["train"])
        head = model.config.head
        if head is None or head.task != HEADS[task] or set(head.labels) != set(labels):
            model, fresh = with_head(model, HEADS[task], labels, seed=seed).train(), True
        else:
            labels = head.labels
    reader = Reader(
        tokenizer=tokenizer, context=context, encoder=isinstance(model, Encoder),
        types=isinstance(model, Encoder) and model.config.token_types > 1,
        start_id=model.config.start_token if isinstance(model, EncoderDecoder) else None,
    )  # fmt: skip
    train, held_out = (encode(task, examples[split], labels, reader, prefix) for split in ("train", "validation"))
    if not train.rows:
        raise UserError(f"no example fits into {context} tokens.", where=source.ref, cure="Raise context.")
    for split, found in (("training", train), ("held-out", held_out)):
        if found.left_out:
            reporter.line(
                f"{found.left_out} {split} examples are left out: too long, or of a label that training never shows."
            )
    return Prepared(
        model=model,
        objective={"classification": "sequence_classification", "tokens": "token_classification", "answer": "span_answer"}.get(
            task, "causal_lm" if isinstance(model, Decoder) else "seq2seq"
        ),
        batches=train.batches(rows=rows, micro_rows=micro_rows, seed=seed),
        everything=(lambda: held_out.everything(micro_rows)) if held_out.rows else None,
        fresh_head=fresh,
    )  # fmt: skip


def encode(
    task: ExampleTask, examples: Sequence[Any], labels: Sequence[str], reader: Reader, prefix: str
) -> Examples[Any]:
    """Examples as rows of token ids."""
    if task == "classification":
        return classification(examples, labels, reader)
    if task == "tokens":
        return tokens(examples, labels, reader)
    return answer(examples, reader) if task == "answer" else rewriting(examples, reader, prefix)


def labels_of(examples: Sequence[Any]) -> tuple[str, ...]:
    """Every label of the training examples, "O" first and the rest by the alphabet; none where the task has no labels."""
    found: set[str] = set()
    for one in examples:
        found |= set(one.tags) if isinstance(one, Tagged) else {one.label} if isinstance(one, Labelled) else set()
    return tuple(sorted(found, key=lambda label: (label != OUTSIDE, label)))


def prepare_text(
    model: Any, tokens: Artifact, tokenizer: Tokenizer, *, context: int, rows: int, micro_rows: int, seed: int
) -> Prepared:
    """A run on plain documents: a model reads on as it was pretrained."""
    objectives: dict[type, Learning] = {
        Decoder: CausalLM(), Encoder: MaskedLM(), EncoderDecoder: SpanCorruption(), TwoStream: PermutationLM(),
    }  # fmt: skip
    objective = objectives.get(type(model))
    if objective is None or getattr(model, "task", None) not in (None, "masked_lm"):
        raise UserError(
            "this model doesn't read plain text.", where="task", cure="Give a model with its pretraining head."
        )
    if isinstance(model, Encoder) and model.task is None:
        model = with_head(model, "masked_lm", seed=seed).train()
    found = data(
        objective, tokens, tokenizer, model, context=context, rows=rows, micro_rows=micro_rows, document_mask=False, seed=seed,
    )  # fmt: skip
    return Prepared(
        model=model,
        objective=objective.kind,
        batches=found.batches,
        everything=found.everything,
        held_out=found.held_out,
    )
