"""From settings to a Completion: what every kind of model that writes shares."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ownlm.errors import UserError
from ownlm.generate.grammar import Form, Kind
from ownlm.generate.sampling import Sampling
from ownlm.generate.sequence import Event
from ownlm.records import Completion, FinishReason

FORMS: tuple[Kind, ...] = ("json_schema", "regex", "grammar")


class Answer:
    """Gathers the events of one answer into a Completion."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason = "length"

    def add(self, event: Event) -> None:
        self.text.append(event.text)
        if event.token is not None:
            assert event.token.logprob is not None
            self.tokens.append(event.token.id)
            self.logprobs.append(event.token.logprob)
        self.finish_reason = event.finish_reason or self.finish_reason

    def completion(self, prompt_tokens: int) -> Completion:
        return Completion(
            text="".join(self.text),
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            prompt_tokens=prompt_tokens,
        )


def best(logprobs: Sequence[Sequence[float]], n: int) -> list[int]:
    """Which n answers have the highest mean log-probability per token, best first; one without tokens comes last."""
    means = [sum(each) / len(each) if each else -math.inf for each in logprobs]
    return sorted(range(len(means)), key=lambda index: -means[index])[:n]


def as_sampling(sampling: Sampling | None, fields: Mapping[str, Any]) -> Sampling:
    """`sampling` with `fields` changed; `stop` may be one string, `json_schema` (a dict, or text), `regex` and `grammar` stand for
    `form`. Raises UserError that names an unknown keyword."""
    unknown = sorted(set(fields) - set(Sampling.__slots__) - set(FORMS))
    if unknown:
        known = (*Sampling.__slots__, *FORMS)
        raise UserError(f"{', '.join(unknown)}: no such setting.", cure=f"There are: {', '.join(known)}.")
    changes = dict(fields)
    forms = {kind: changes.pop(kind) for kind in FORMS if kind in changes}
    if len(forms) > 1:
        raise UserError("an answer has one form.", where=", ".join(forms))
    for kind, source in forms.items():
        changes["form"] = Form(kind, source if isinstance(source, str) else json.dumps(source))
    if "logit_bias" in changes and isinstance(changes["logit_bias"], Mapping):
        changes["logit_bias"] = tuple(changes["logit_bias"].items())
    if "stop" in changes:
        stop = changes["stop"] or ()
        changes["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return replace(sampling or Sampling(), **changes)


def plain(sampling: Sampling) -> Sampling:
    """The same, if a Completion can hold all that it asks for. Raises UserError."""
    if sampling.n != 1:
        raise UserError("there is one answer per prompt here.", where="n", cure="Use `Model.answers` for more.")
    if sampling.echo or sampling.logprobs:
        raise UserError("a Completion holds neither.", where="echo, logprobs", cure="Use `Model.events`.")
    return sampling
