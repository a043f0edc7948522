"""How the next token is chosen.

    logits ── log-softmax ───────────────────────────────► the log-probabilities that are reported (unmodified, float32)
       │
       └── / temperature ── softmax ── top-k ── top-p ──► one uniform number of the request's own generator picks a token

Every row draws exactly one number per token from its own `torch.Generator` and inverts its own cumulative distribution in
token order. Nothing of a row's choice depends on its neighbours, so a seed gives the same text alone or in any batch.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ownlm.errors import UserError

MAX_TOP_LOGPROBS = 20
MAX_BEAMS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a request asks of the sampler. Raises UserError with every fault at once.

    max_tokens   new tokens at most; None: until the context is full; 0 only together with `echo`
    temperature  0 is greedy
    top_k        keep the k likeliest tokens; None keeps all
    top_p        keep the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020, nucleus sampling)
    seed         same seed, same text; None draws a fresh one
    stop         strings that end the answer and are not part of it
    stop_ids     tokens that end the answer; None: the tokenizer's own
    logprobs     how many alternatives to report per token (0 reports the sampled token's log-probability only)
    echo         also report the log-probabilities of the prompt's tokens
    n            how many answers to the same prompt
    beams        answers kept side by side while the likeliest is searched (encoder-decoders only; without temperature or stop)
    length_penalty   of beams: an answer is worth the sum of its log-probabilities / its length ** length_penalty
    early_stopping   of beams: true: when `beams` answers are complete; false: when no open one, were it to end now, could still
                     beat them; "never": when none could at its best possible length
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] | None = None
    logprobs: int = 0
    echo: bool = False
    n: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        least = 0 if self.echo else 1
        rules = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= least, f"at least {least}"),
            "temperature": (0 <= self.temperature <= 100, "between 0 and 100"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            "stop": (all(self.stop), "strings of at least one character"),
            "logprobs": (0 <= self.logprobs <= MAX_TOP_LOGPROBS, f"between 0 and {MAX_TOP_LOGPROBS}"),
            "n": (self.n >= 1, "at least 1"),
            "beams": (1 <= self.beams <= MAX_BEAMS, f"between 1 and {MAX_BEAMS}"),
            "early_stopping": (self.early_stopping in (True, False, "never"), 'true, false or "never"'),
        }
        faults = [
            f"{name} must be {rule}, not {getattr(self, name)!r}." for name, (fine, rule) in rules.items() if not fine
        ]
        if self.beams == 1 and (self.length_penalty != 1.0 or self.early_stopping is not False):
            faults.append("length_penalty and early_stopping are for several beams.")
        if self.beams > 1 and (self.temperature > 0 or self.stop):
            faults.append("A search over beams takes neither temperature nor stop strings.")
        if faults:
            raise UserError(" ".join(faults), where="sampling")

    def generator(self, index: int) -> torch.Generator:
        """The random numbers of answer `index` of `n`: a function of the seed and the index only."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            # A large odd stride keeps answer 1 of seed s apart from answer 0 of seed s + 1.
            generator.manual_seed((self.seed + index * 0x9E3779B97F4A7C15) % 2**63)
        return generator


@dataclass(frozen=True, slots=True)
class Token:
    """A token, its log-probability under the unmodified distribution, and the likeliest (id, logprob) pairs there.

    `logprob` is None for the first token of a prompt, which nothing predicts.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits_BV: Tensor, requests: Sequence[Sampling], generators: Sequence[torch.Generator]) -> list[Token]:
    """The next token of each row. `logits_BV` are float32, the model's own; row b is drawn by `generators[b]`."""
    ids_B = logits_BV.argmax(-1)
    rows = [row for row, request in enumerate(requests) if request.temperature > 0]
    if rows:
        uniform = torch.cat([torch.rand(1, generator=generators[row], dtype=torch.float64) for row in rows])
        chosen = [requests[row] for row in rows]
        ids_B[rows] = draw(probabilities(logits_BV[rows], chosen), uniform.to(logits_BV.device))
    return report(logits_BV, ids_B, [request.logprobs for request in requests])


def probabilities(logits_BV: Tensor, requests: Sequence[Sampling]) -> Tensor:
    """The distribution each row is drawn from (float64, not normalised after the cuts); temperatures must be above 0."""
    temperature = torch.tensor([request.temperature for request in requests], dtype=torch.float64)
    p_BV = (logits_BV.double() / temperature[:, None].to(logits_BV.device)).softmax(-1)
    rows = [row for row, request in enumerate(requests) if request.top_k is not None or request.top_p < 1]
    if not rows:
        return p_BV
    vocab_size = logits_BV.shape[-1]
    top_k = torch.tensor([min(requests[row].top_k or vocab_size, vocab_size) for row in rows], device=p_BV.device)
    top_p = torch.tensor([requests[row].top_p for row in rows], dtype=torch.float64, device=p_BV.device)
    sorted_BV, order_BV = p_BV[rows].sort(dim=-1, descending=True, stable=True)
    sorted_BV[torch.arange(vocab_size, device=p_BV.device) >= top_k[:, None]] = 0
    # top-p counts the mass that top-k left, and a token stays while the mass before it is below top_p.
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    sorted_BV[before_BV >= (top_p * sorted_BV.sum(-1))[:, None]] = 0
    p_BV[rows] = torch.zeros_like(sorted_BV).scatter(-1, order_BV, sorted_BV)
    return p_BV


def draw(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the running sum of the probabilities passes uniform * total, uniform in [0, 1)."""
    sums_BV = p_BV.cumsum(-1)
    # The clamp keeps rounding from pushing the threshold onto the total, past the last token.
    threshold_B1 = uniform_B.clamp(max=1 - 1e-12)[:, None] * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, threshold_B1, right=True)[:, 0]


def report(logits_BV: Tensor, ids_B: Tensor, num_top: Sequence[int]) -> list[Token]:
    """Each row's token with its log-probability and the `num_top[b]` likeliest alternatives."""
    logprobs_BV = logits_BV.float().log_softmax(-1)
    ids: list[int] = ids_B.tolist()
    logprobs: list[float] = logprobs_BV.gather(-1, ids_B[:, None])[:, 0].tolist()
    widest = min(max(num_top, default=0), logits_BV.shape[-1])
    if not widest:
        return [Token(id, logprob) for id, logprob in zip(ids, logprobs, strict=True)]
    best = logprobs_BV.topk(widest, dim=-1)
    pairs = [
        tuple(zip(ids_row[:k], values_row[:k], strict=True))
        for ids_row, values_row, k in zip(best.indices.tolist(), best.values.tolist(), num_top, strict=True)
    ]
    return [Token(*fields) for fields in zip(ids, logprobs, pairs, strict=True)]
