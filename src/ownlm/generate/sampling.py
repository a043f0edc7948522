"""How the next token is chosen.

    logits ── log-softmax ──────────────────────────────────► the log-probabilities that are reported (unmodified, float32)
       │
       └── bias, penalties ── / temperature ── softmax ── top-k ── top-p ── min-p ── typical
                                            └─► one uniform number of the request's own generator picks a token

Every row draws exactly one number per token from its own `torch.Generator` and inverts its own cumulative distribution in
token order. Nothing of a row's choice depends on its neighbours, so a seed gives the same text alone or in any batch.

Shapes: B rows, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ownlm.errors import UserError
from ownlm.generate.grammar import Form
from ownlm.kernels import choose

MAX_TOP_LOGPROBS = 20
MAX_BEAMS = 64
MAX_ANSWERS = 4096  # to one prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a request asks of the sampler. Raises UserError with every fault at once.

    max_tokens   new tokens at most; None: until the context is full; 0 only together with `echo`
    temperature  0 is greedy
    top_k        keep the k likeliest tokens; None keeps all
    top_p        keep the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020, nucleus sampling)
    min_p        keep tokens at least min_p times as likely as the likeliest (arXiv:2407.01082)
    typical_p    keep the tokens nearest to the distribution's entropy until they hold typical_p (arXiv:2202.00666)
    repetition_penalty   logits of tokens of the prompt or the answer are divided by it, or multiplied where negative (CTRL,
                 arXiv:1909.05858)
    presence_penalty     taken from the logits of tokens of the answer
    frequency_penalty    taken from them once for every time they were written
    logit_bias   (token, what is added to its logit) pairs
    seed         same seed, same text; None draws a fresh one
    stop         strings that end the answer and are not part of it
    stop_ids     tokens that end the answer; None: the tokenizer's own
    logprobs     how many alternatives to report per token (0 reports the sampled token's log-probability only)
    echo         also report the log-probabilities of the prompt's tokens
    n            how many answers to the same prompt
    best_of      so many are written, and the n of them with the highest mean log-probability are given, best first; None: n
    form         the answer is of this form: JSON of a schema, a regular expression, a grammar
    beams        answers kept side by side while the likeliest is searched, and the n best given (without temperature, stop strings,
                 penalties, forms; not over HTTP)
    length_penalty   of beams: an answer is worth the sum of its log-probabilities / its length ** length_penalty
    early_stopping   of beams: true: when `beams` answers are complete; false: when no open one, were it to end now, could still
                     beat them; "never": when none could at its best possible length
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] | None = None
    logprobs: int = 0
    echo: bool = False
    n: int = 1
    best_of: int | None = None
    form: Form | None = None
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
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "typical_p": (0 < self.typical_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            "presence_penalty": (-100 <= self.presence_penalty <= 100, "between -100 and 100"),
            "frequency_penalty": (-100 <= self.frequency_penalty <= 100, "between -100 and 100"),
            "logit_bias": (all(math.isfinite(bias) for _, bias in self.logit_bias), "finite numbers"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            "stop": (all(self.stop), "strings of at least one character"),
            "logprobs": (0 <= self.logprobs <= MAX_TOP_LOGPROBS, f"between 0 and {MAX_TOP_LOGPROBS}"),
            "n": (1 <= self.n <= MAX_ANSWERS, f"between 1 and {MAX_ANSWERS:,}"),
            "best_of": (
                self.best_of is None or self.n <= self.best_of <= MAX_ANSWERS,
                f"at least n and at most {MAX_ANSWERS:,}",
            ),
            "beams": (1 <= self.beams <= MAX_BEAMS, f"between 1 and {MAX_BEAMS}"),
            "early_stopping": (self.early_stopping in (True, False, "never"), 'true, false or "never"'),
        }
        faults = [
            f"{name} must be {rule}, not {getattr(self, name)!r}." for name, (fine, rule) in rules.items() if not fine
        ]
        if self.beams == 1 and (self.length_penalty != 1.0 or self.early_stopping is not False):
            faults.append("length_penalty and early_stopping are for several beams.")
        if self.beams > 1 and (self.temperature > 0 or self.stop or self.adjusts or self.form or self.best_of):
            faults.append(
                "A search over beams takes neither temperature nor stop strings, penalties, logit_bias, form or best_of."
            )
        if self.beams > 1 and self.n > self.beams:
            faults.append(f"n must be at most beams, {self.beams}: the best of those that were searched are given.")
        if faults:
            raise UserError(" ".join(faults), where="sampling")

    @property
    def answers(self) -> int:
        """How many answers to a prompt are written."""
        return self.best_of or self.n

    @property
    def shapes(self) -> bool:
        """True where the distribution is cut after it was tempered."""
        cut = self.top_k is not None or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1
        return self.temperature > 0 and cut

    @property
    def adjusts(self) -> bool:
        """True where logits are changed before anything else."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(self.logit_bias or penalties)

    def stops(self, own: Iterable[int]) -> frozenset[int]:
        """The tokens that end an answer; `own`: the tokenizer's."""
        return frozenset(own) if self.stop_ids is None else self.stop_ids

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


def sample(
    logits_BV: Tensor,
    requests: Sequence[Sampling],
    generators: Sequence[torch.Generator],
    texts: Sequence[tuple[Sequence[int], int]] = (),
    allowed: Sequence[Tensor | None] = (),
    places: Sequence[int] | None = None,
) -> list[Token]:
    """The next token of each request. `logits_BV` are float32, the model's own; request b is drawn by `generators[b]`.

    texts: for each request the tokens so far and how many of them are the prompt's; only penalties read them.
    allowed: for each request the tokens that may be chosen, (V,) bool, or None for all.
    places: for each request its row of `logits_BV`; None: the first row is the first request's, and so on.
    """
    places = range(len(logits_BV)) if places is None else places
    uniform = [
        float(torch.rand(1, generator=generator, dtype=torch.float64)) if request.temperature > 0 else 0.0
        for request, generator in zip(requests, generators, strict=True)
    ]
    native = choose.able(logits_BV)
    # How a row is chosen depends on nothing but the row.
    masks = list(allowed) or [None] * len(requests)
    plain = [
        row
        for row, each in enumerate(requests)
        if native and masks[row] is None and not (each.shapes or each.adjusts or each.logprobs)
    ]
    tokens: dict[int, Token] = {}
    if plain:
        picked = choose.choose(
            logits_BV,
            [places[row] for row in plain],
            [requests[row].temperature for row in plain],
            [uniform[row] for row in plain],
        )
        tokens = {row: Token(*pair) for row, pair in zip(plain, zip(*picked, strict=True), strict=True)}
    others = [row for row in range(len(requests)) if row not in tokens]
    if others:
        theirs = [places[row] for row in others]
        chosen = _sample_shaped(
            logits_BV if theirs == list(range(len(logits_BV))) else logits_BV[theirs],
            [requests[row] for row in others],
            [uniform[row] for row in others],
            [texts[row] for row in others] if texts else [],
            [masks[row] for row in others],
        )
        tokens.update(zip(others, chosen, strict=True))
    return [tokens[row] for row in range(len(requests))]


def _sample_shaped(
    logits_BV: Tensor,
    requests: Sequence[Sampling],
    uniform: Sequence[float],
    texts: Sequence[tuple[Sequence[int], int]],
    masks: Sequence[Tensor | None],
) -> list[Token]:
    changed_BV = adjust(logits_BV, requests, texts)
    if any(mask is not None for mask in masks):
        changed_BV = changed_BV.clone()
        for row, mask in enumerate(masks):
            if mask is not None:
                changed_BV[row, ~mask.to(changed_BV.device)] = -torch.inf
    ids_B = changed_BV.argmax(-1)
    rows = [row for row, request in enumerate(requests) if request.temperature > 0]
    if rows:
        p_BV = probabilities(changed_BV[rows], [requests[row] for row in rows])
        ids_B[rows] = draw(p_BV, torch.tensor([uniform[row] for row in rows], dtype=torch.float64, device=p_BV.device))
    return report(logits_BV, ids_B, [request.logprobs for request in requests])


def adjust(logits_BV: Tensor, requests: Sequence[Sampling], texts: Sequence[tuple[Sequence[int], int]]) -> Tensor:
    """The logits with each row's bias and penalties; the same tensor where no row has any."""
    if not any(request.adjusts for request in requests):
        return logits_BV
    changed_BV = logits_BV.clone()
    for row, request in enumerate(requests):
        logits_V = changed_BV[row]
        for token, bias in request.logit_bias:
            logits_V[token] += bias
        if not texts:
            continue
        known, prompt = texts[row]
        if request.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(known)), device=logits_V.device)
            here = logits_V[seen]
            logits_V[seen] = torch.where(here > 0, here / request.repetition_penalty, here * request.repetition_penalty)
        if request.presence_penalty or request.frequency_penalty:
            written = Counter(known[prompt:])
            ids = torch.tensor(list(written), dtype=torch.int64, device=logits_V.device)
            times = torch.tensor(list(written.values()), dtype=logits_V.dtype, device=logits_V.device)
            logits_V[ids] -= request.presence_penalty + request.frequency_penalty * times
    return changed_BV


def probabilities(logits_BV: Tensor, requests: Sequence[Sampling]) -> Tensor:
    """The distribution each row is drawn from (float64, not normalised after the cuts); temperatures must be above 0."""
    temperature = torch.tensor([request.temperature for request in requests], dtype=torch.float64)
    p_BV = (logits_BV.double() / temperature[:, None].to(logits_BV.device)).softmax(-1)
    rows = [row for row, request in enumerate(requests) if request.shapes]
    if rows:
        p_BV[rows] = _cut(p_BV[rows], [requests[row] for row in rows])
    return p_BV


def _cut(p_BV: Tensor, requests: Sequence[Sampling]) -> Tensor:
    """top-k, then top-p, min-p and typical of what is left, each kept token with the probability it had."""
    vocab_size = p_BV.shape[-1]

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64, device=p_BV.device)[:, None]

    top_k = column(min(request.top_k or vocab_size, vocab_size) for request in requests)
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    sorted_BV[torch.arange(vocab_size, device=p_BV.device) >= top_k] = 0
    # top-p counts the mass that top-k left, and a token stays while the mass before it is below top_p.
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    sorted_BV[before_BV >= column(request.top_p for request in requests) * sorted_BV.sum(-1, keepdim=True)] = 0
    sorted_BV[sorted_BV < column(request.min_p for request in requests) * sorted_BV[:, :1]] = 0
    kept_BV = torch.zeros_like(sorted_BV).scatter(-1, order_BV, sorted_BV)
    typical = [row for row, request in enumerate(requests) if request.typical_p < 1]
    if typical:
        share = column(requests[row].typical_p for row in typical)
        kept_BV[typical] = _typical(kept_BV[typical], share)
    return kept_BV


def _typical(p_BV: Tensor, share_B1: Tensor) -> Tensor:
    """The tokens whose surprise is nearest to the mean surprise, until they hold the share of the mass."""
    unit_BV = p_BV / p_BV.sum(-1, keepdim=True)
    surprise_BV = -unit_BV.log()
    entropy_B1 = torch.special.entr(unit_BV).sum(-1, keepdim=True)
    order_BV = (surprise_BV - entropy_B1).abs().argsort(dim=-1, stable=True)
    sorted_BV = unit_BV.gather(-1, order_BV)
    keep_BV = sorted_BV.cumsum(-1) - sorted_BV < share_B1
    return torch.zeros_like(p_BV).scatter(-1, order_BV, p_BV.gather(-1, order_BV) * keep_BV)


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
