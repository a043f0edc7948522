"""What a batch teaches: pure functions (model, batch) -> Loss, one entry each in OBJECTIVES.

    pretraining   causal_lm  masked_lm  seq2seq (span corruption)  permutation_lm  contrastive  distillation
    tasks         chat  seq2seq  sequence_classification  token_classification  span_answer

All sum over the trained targets and leave the division to the loop, so that accumulation does not change the loss; and where
there is a vocabulary, no logits are ever held whole. Distillation takes a teacher too: `partial` makes an objective of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ownlm.models.decoder import Decoder
from ownlm.tokens.batches import UNTRAINED, Batch
from ownlm.tokens.corrupt import MaskedLM
from ownlm.tokens.examples import ClassBatch, MaskedBatch, PairBatch, PermutedBatch, Seq2SeqBatch, SpanBatch, TagBatch
from ownlm.train.cross_entropy import linear_cross_entropy
from ownlm.train.divergence import Output, linear_divergence


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loss:
    """`sum` (nats, scalar) over `num_trained` targets, and any further sums worth a column in the metrics."""

    sum: Tensor
    num_trained: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


Objective = Callable[[Any, Any], Loss]  # (model, batch): each takes the batches of its own kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """Learn from a larger model, the checkpoint `teacher`: soft * KL of its predictions at `temperature` + hard * cross-entropy
    of the text + hidden * (1 - cosine of the last hidden states), all at the trained tokens.

    `mask` makes it DistilBERT's (arXiv:1910.01108: soft 5, hard 2, hidden 1): encoders that restore hidden tokens; without, decoders
    that predict the next one. `initialise` begins with every second or third … layer of the teacher.
    """

    kind: Literal["distillation"] = "distillation"
    teacher: str
    temperature: float = 2.0
    soft: float = 1.0
    hard: float = 1.0
    hidden: float = 0.0
    initialise: bool = False
    mask: MaskedLM | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0 or min(self.soft, self.hard, self.hidden) < 0 or self.soft + self.hidden == 0:
            raise ValueError("temperature is above 0, weights are 0 or more, and soft or hidden is above 0")


def causal_lm(model: Decoder, batch: Batch) -> Loss:
    """Predict the next token of every trained position."""
    hidden_BTD = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
    return Loss(sum=vocabulary_loss(model, hidden_BTD, batch.targets_BT), num_trained=batch.num_trained)


def chat(model: Decoder, batch: Batch) -> Loss:
    """Predict the assistant's tokens. Conversations packed into a row must not see each other, so the mask is required."""
    assert batch.documents_BT is not None, "packed conversations need their mask"
    return causal_lm(model, batch)


def masked_lm(model: Any, batch: MaskedBatch) -> Loss:
    """Restore the hidden tokens (arXiv:1810.04805, 3.1)."""
    hidden_BTD = model(batch.tokens_BT, mask_BT=batch.mask_BT, types_BT=batch.types_BT)
    return Loss(sum=vocabulary_loss(model, hidden_BTD, batch.targets_BT), num_trained=batch.num_trained)


def seq2seq(model: Any, batch: Seq2SeqBatch) -> Loss:
    """Write the targets after reading the inputs: translation, summaries, or the spans that were cut out (arXiv:1910.10683)."""
    hidden_BTD = model(batch.tokens_BS, batch.decoder_tokens_BT, mask_BS=batch.mask_BS)
    return Loss(sum=vocabulary_loss(model, hidden_BTD, batch.targets_BT), num_trained=batch.num_trained)


def permutation_lm(model: Any, batch: PermutedBatch) -> Loss:
    """Predict the last tokens of a random factorisation order, each from those before it (arXiv:1906.08237, 2.3)."""
    dtype = model.head_weight.dtype
    targets_BKT = F.one_hot(batch.places_BK, batch.tokens_BT.shape[1]).to(dtype)
    hidden_BKD = model(batch.tokens_BT, perm_mask_BTT=batch.unseen_BTT, targets_BKT=targets_BKT)
    return Loss(sum=vocabulary_loss(model, hidden_BKD, batch.targets_BK), num_trained=batch.num_trained)


def contrastive(model: Any, batch: PairBatch) -> Loss:
    """Tell each text's image from the others of the batch, and each image's text (arXiv:2103.00020, figure 3): the mean of both
    cross-entropies, summed over pairs. Its size depends on how many pairs stand side by side."""
    texts_BP = F.normalize(model.text_features(batch.tokens_BT).float(), dim=-1)
    images_BP = F.normalize(model.image_features(batch.pixels_BCHW).float(), dim=-1)
    logits_BB = model.logit_scale.float().exp() * texts_BP @ images_BP.mT
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    both = F.cross_entropy(logits_BB, own_B, reduction="sum") + F.cross_entropy(logits_BB.mT, own_B, reduction="sum")
    return Loss(sum=both / 2, num_trained=batch.num_trained)


def distillation(model: Any, batch: Batch | MaskedBatch, teacher: Any, settings: Distillation) -> Loss:
    """Predict as the teacher does and have its hidden states, at every trained token; see `Distillation`."""
    trained = batch.targets_BT != UNTRAINED
    student_ND, targets_N = _read(model, batch)[trained], batch.targets_BT[trained]
    with torch.no_grad():
        teacher_ND = _read(teacher, batch)[trained]
    student, truth = _output(model, student_ND), _output(teacher, teacher_ND)
    parts: dict[str, Tensor] = {}
    if settings.soft:
        parts["soft"] = settings.soft * linear_divergence(student, truth, temperature=settings.temperature)
    if settings.hard:
        parts["hard"] = settings.hard * vocabulary_loss(model, student_ND, targets_N)
    if settings.hidden:
        apart_N = 1 - F.cosine_similarity(student_ND.float(), teacher_ND.float(), dim=-1)
        parts["hidden"] = settings.hidden * apart_N.sum()
    return Loss(
        sum=torch.stack([*parts.values()]).sum(),
        num_trained=batch.num_trained,
        metrics={name: part.detach() for name, part in parts.items()},
    )


def sequence_classification(model: Any, batch: ClassBatch) -> Loss:
    """Name the class of each text; where the head says so, each of several labels by itself, or numbers (mean squared error)."""
    logits_BL = model.head(_read_text(model, batch), batch.mask_BT)
    problem = model.config.head.problem
    if problem == "single":
        loss = _classes(logits_BL, batch.labels_B)
    else:
        apart = F.binary_cross_entropy_with_logits if problem == "multi" else F.mse_loss
        labels_BL = batch.labels_B.float().view_as(logits_BL)
        loss = apart(logits_BL, labels_BL, reduction="none").mean(-1).sum()
    return Loss(sum=loss, num_trained=batch.num_trained)


def token_classification(model: Any, batch: TagBatch) -> Loss:
    """Name the class of each labelled token."""
    logits_BTL = model.head(_read_text(model, batch), batch.mask_BT)
    return Loss(sum=_classes(logits_BTL, batch.labels_BT), num_trained=batch.num_trained)


def span_answer(model: Any, batch: SpanBatch) -> Loss:
    """Find where the answer starts and where it ends (arXiv:1810.04805, 4.2): the mean of both cross-entropies."""
    start_BT, end_BT = model.head(_read_text(model, batch), batch.mask_BT)
    both = _classes(start_BT, batch.starts_B) + _classes(end_BT, batch.ends_B)
    return Loss(sum=both / 2, num_trained=batch.num_trained)


def vocabulary_loss(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of the trained targets by the model's own head; the head computes nothing for the others."""
    trained = targets != UNTRAINED
    if not bool(trained.all()):
        hidden, targets = hidden[trained], targets[trained]
    return linear_cross_entropy(
        model.head_input(hidden), model.head_weight, targets, bias_V=model.head_bias, softcap=_softcap(model)
    )


def evenly_spaced(count: int, total: int) -> list[int]:
    """Which `count` of `total` layers a student begins with: evenly_spaced(6, 12) == [0, 2, 4, 6, 8, 10], as DistilBERT."""
    return [layer * total // count for layer in range(count)]


def start_from_teacher(model: nn.Module, teacher: nn.Module) -> list[int]:
    """Copy every weight of the teacher that the student has in the same shape, its layers evenly spaced; their numbers."""
    chosen = evenly_spaced(len(model.layers), len(teacher.layers))  # type: ignore[arg-type]
    theirs = dict(teacher.named_parameters())
    copied = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            first, _, rest = name.partition(".")
            if first == "layers":
                number, _, rest = rest.partition(".")
                name = f"layers.{chosen[int(number)]}.{rest}"
            if name in theirs and theirs[name].shape == parameter.shape:
                parameter.copy_(theirs[name])
                copied += first == "layers"
    return chosen if copied else []


def _read(model: Any, batch: Batch | MaskedBatch) -> Tensor:
    """The last hidden states of a decoder or an encoder."""
    if isinstance(batch, MaskedBatch):
        hidden_BTD: Tensor = model(batch.tokens_BT, mask_BT=batch.mask_BT, types_BT=batch.types_BT)
    else:
        hidden_BTD = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
    return hidden_BTD


def _read_text(model: Any, batch: ClassBatch | TagBatch | SpanBatch) -> Tensor:
    """The hidden states of padded texts; decoders count places instead of hiding padding, and tell no texts apart."""
    if isinstance(model, Decoder):
        mask = batch.mask_BT
        places = None if mask is None else (mask.cumsum(1) - 1).masked_fill(~mask, -1)
        hidden_BTD: Tensor = model(batch.tokens_BT, positions_BT=places)
    else:
        hidden_BTD = model(batch.tokens_BT, mask_BT=batch.mask_BT, types_BT=batch.types_BT)
    return hidden_BTD


def _output(model: Any, hidden_ND: Tensor) -> Output:
    return Output(model.head_input(hidden_ND), model.head_weight, model.head_bias, _softcap(model))


def _softcap(model: Any) -> float | None:
    """Only decoders bend their logits."""
    return model.config.logit_softcap if isinstance(model, Decoder) else None


def _classes(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=UNTRAINED, reduction="sum")


OBJECTIVES: dict[str, Objective] = {
    "causal_lm": causal_lm,
    "masked_lm": masked_lm,
    "span_corruption": seq2seq,
    "permutation_lm": permutation_lm,
    "contrastive": contrastive,
    "chat": chat,
    "seq2seq": seq2seq,
    "sequence_classification": sequence_classification,
    "token_classification": token_classification,
    "span_answer": span_answer,
}
