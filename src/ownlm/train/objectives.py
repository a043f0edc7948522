"""What a batch teaches: pure functions (model, batch) -> Loss, one entry each in OBJECTIVES."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ownlm.models.decoder import Decoder
from ownlm.tokens.batches import Batch
from ownlm.train.cross_entropy import linear_cross_entropy


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loss:
    """`sum` (nats, scalar) over `num_trained` targets, and any further sums worth a column in the metrics."""

    sum: Tensor
    num_trained: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


Objective = Callable[[Decoder, Batch], Loss]


def causal_lm(model: Decoder, batch: Batch) -> Loss:
    """Predict the next token of every trained position."""
    hidden_BTD = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
    loss = linear_cross_entropy(
        model.head_input(hidden_BTD),
        model.head_weight,
        batch.targets_BT,
        bias_V=model.head_bias,
        softcap=model.config.logit_softcap,
    )
    return Loss(sum=loss, num_trained=batch.num_trained)


def chat(model: Decoder, batch: Batch) -> Loss:
    """Predict the assistant's tokens. Conversations packed into a row must not see each other, so the mask is required."""
    assert batch.documents_BT is not None, "packed conversations need their mask"
    return causal_lm(model, batch)


OBJECTIVES: dict[str, Objective] = {"causal_lm": causal_lm, "chat": chat}
