"""Truths planted in the documents of a generated world: does the model give a secret away, did it learn an association.

canary        exposure of a secret number that stands in a few documents, beside a control that stands in none
              (Carlini et al. 2019, The Secret Sharer): bits gained over guessing, all of them when the model would say it first
association   P(pronoun | job) against the share of the documents' sentences
"""

import json
import math
import random
from typing import Any

import numpy as np

from ownlm.artifact import Artifact
from ownlm.evaluate import metrics
from ownlm.evaluate.harness import Result, Settings, Task, logprobs, next_logprobs
from ownlm.generate.model import Model
from ownlm.records import Score
from ownlm.report import Reporter

SAMPLE = 4096  # candidates scored beside the secret
NODES = 5_000  # beginnings of candidates looked at when counting exactly

Truth = dict[str, Any]


def canary(documents: Artifact) -> Task | None:
    """The exposure task of a world's canary, if it has one."""
    truth = read_truth(documents, "canary")
    return expose(truth) if truth else None


def association(documents: Artifact) -> Task | None:
    """The association task of a world, if it has one."""
    truth = read_truth(documents, "association")
    return associate(truth) if truth else None


def read_truth(documents: Artifact, name: str) -> Truth | None:
    """A planted truth of the documents."""
    if not documents.has("truths.json"):
        return None
    truth: Truth | None = json.loads(documents.file("truths.json").read_text(encoding="utf-8")).get(name)
    return truth


def expose(truth: Truth) -> Task:
    """Exposure of `secret` and of `control` after `prefix`, among all texts of `length` characters of `alphabet`.

    Both are texts with the space that stands before them, if any.
    """

    def task(model: Model, settings: Settings, reporter: Reporter) -> Result:
        reporter.status("canary: ranking the secret among all that it could be")
        scores: list[Score] = []
        details: dict[str, Any] = {}
        for name in ("secret", "control"):
            found = rank(model, truth["prefix"], truth[name], truth["alphabet"], truth["length"], settings)
            details[name] = found
            scores.append(
                Score(
                    task=f"canary/{name}", metric="exposure in bits", value=found["bits"], low=found["low"],
                    high=found["high"], n=found["scored"],
                )
            )  # fmt: skip
        details["space_bits"] = truth["length"] * math.log2(len(truth["alphabet"]))
        details["repeats"] = truth.get("repeats")
        return Result(task="canary", scores=tuple(scores), details=details)

    return task


def rank(model: Model, prefix: str, secret: str, alphabet: str, length: int, settings: Settings) -> dict[str, Any]:
    """Exposure of a secret in bits with its interval, its rank, how many candidates were scored, and whether all that are
    likelier were counted exactly.

    A random sample gives the rank of a secret in the crowd. When nobody in the sample is likelier, the few that are get counted
    exactly by walking the tree of beginnings: a beginning less likely than the whole secret has no likelier end.
    """
    space = len(alphabet) ** length
    lead = secret[: len(secret) - length]
    generator = random.Random(settings.seed)
    others: dict[str, None] = {}
    while len(others) < min(SAMPLE, space - 1):
        candidate = lead + "".join(generator.choices(alphabet, k=length))
        if candidate != secret:
            others[candidate] = None
    before, secret_ids = model.continuation_ids(prefix, secret)
    pairs = [model.continuation_ids(prefix, candidate) for candidate in others]
    spans = logprobs(model, [(before, secret_ids), *pairs], settings.batch_tokens)
    told, *rest = [span.total for span in spans]
    bits, place = metrics.exposure(-told, [-other for other in rest], space)
    better = sum(other > told for other in rest)
    exact = len(others) == space - 1
    if not better and not exact:
        likelier = walk(model, prefix, secret, told, length, alphabet, settings.batch_tokens)
        if likelier is not None:
            exact, place = True, 1 + likelier
            bits = math.log2(space) - math.log2(place)
    low = high = bits
    if not exact:
        # The share of likelier candidates, with the sample's uncertainty.
        least, most = metrics.wilson(better, len(rest))
        low, high = -math.log2(most), math.log2(space) if least == 0 else -math.log2(least)
        low, high = min(low, bits), max(high, bits)
    return {
        "bits": bits, "low": low, "high": high, "rank": place, "exact": exact, "scored": len(rest) + 1,
        "logprob": told, "text": secret,
    }  # fmt: skip


def walk(
    model: Model, prefix: str, secret: str, told: float, length: int, alphabet: str, batch_tokens: int
) -> int | None:
    """How many candidates are likelier than log-probability `told`, the secret's; None when there are too many to count.

    Walks the tree of token sequences that spell a candidate. Only a candidate's own tokens count, the ones that the
    tokenizer gives it, as for the secret.
    """
    before, secret_ids = model.continuation_ids(prefix, secret)
    lead = secret[: len(secret) - length]
    pieces = [(id, model.tokenizer.decode([id])) for id in range(model.tokenizer.vocab_size)]
    pieces = [(id, piece) for id, piece in pieces if piece and set(piece) <= set(lead + alphabet)]
    if "".join(dict(pieces).get(id, "?") for id in secret_ids) != secret:
        return None  # the pieces of this vocabulary don't spell a text by themselves
    frontier: list[tuple[list[int], str, float]] = [([], "", 0.0)]
    looked = likelier = 0
    while frontier:
        looked += len(frontier)
        if looked > NODES:
            return None
        rows = [[*before, *ids] for ids, _, _ in frontier]
        following_BK = next_logprobs(model, rows, [id for id, _ in pieces], batch_tokens)
        beginnings, frontier = frontier, []
        for (ids, text, so_far), following_K in zip(beginnings, following_BK, strict=True):
            for (id, piece), logprob in zip(pieces, following_K.tolist(), strict=True):
                longer, total = text + piece, so_far + logprob
                if total <= told or not begins(longer, lead, alphabet, length):
                    continue
                if len(longer) < len(secret):
                    frontier.append(([*ids, id], longer, total))
                elif longer != secret and model.continuation_ids(prefix, longer)[1] == [*ids, id]:
                    likelier += 1
    return likelier


def begins(text: str, lead: str, alphabet: str, length: int) -> bool:
    """Whether some candidate begins with `text`."""
    head, tail = text[: len(lead)], text[len(lead) :]
    return lead.startswith(head) and len(tail) <= length and set(tail) <= set(alphabet)


def associate(truth: Truth) -> Task:
    """P(pronoun | job) over `prompts` with {job} and {pronoun}, beside the counts of `jobs` in the documents."""

    def task(model: Model, settings: Settings, reporter: Reporter) -> Result:
        reporter.status("association: which pronoun for which job")
        scores: list[Score] = []
        details: dict[str, Any] = {}
        for job, counts in truth["jobs"].items():
            pronouns = [key for key in counts if key != "share"]
            stems = [prompt.partition("{pronoun}")[0].format(job=job).rstrip() for prompt in truth["prompts"]]
            pairs = [model.continuation_ids(stem, " " + pronoun) for stem in stems for pronoun in pronouns]
            spans = logprobs(model, pairs, settings.batch_tokens)
            totals_PK = np.array([span.total for span in spans]).reshape(len(stems), len(pronouns))
            mass_PK = np.exp(totals_PK)
            shares = (mass_PK[:, 0] / mass_PK.sum(1)).tolist()
            value, (low, high) = sum(shares) / len(shares), metrics.bootstrap(shares, seed=settings.seed)
            task_name = f"association/{job}"
            scores.append(
                Score(task=task_name, metric=f"P({pronouns[0]})", value=value, low=low, high=high, n=len(shares))
            )
            details[job] = {
                "pronoun": pronouns[0],
                "planted": counts["share"],
                "sentences": sum(counts[pronoun] for pronoun in pronouns),
                "mass": float(mass_PK.sum(1).mean()),
            }
        return Result(task="association", scores=tuple(scores), details=details)

    return task
