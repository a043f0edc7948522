"""The report: what the model is, what it can do and what it can't, each number with its interval, n and baseline."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ownlm.artifact import Artifact
from ownlm.evaluate import plots
from ownlm.evaluate.harness import Answer, Result, Settings
from ownlm.evaluate.metrics import Bin
from ownlm.evaluate.page import Block, Figure, Heading, Table, Text
from ownlm.lineage import Ancestor
from ownlm.records import Score
from ownlm.report import duration, quantity, size

SAMPLES = 3  # wrong answers shown per skill, and right ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The evaluated checkpoint and the circumstances of its evaluation."""

    checkpoint: Artifact
    lineage: Sequence[Ancestor]
    curves: Sequence[plots.Curve]
    num_parameters: int
    context: int
    vocab_size: int
    settings: Settings
    machine: Mapping[str, Any]
    seconds: float
    peak_memory_bytes: int


def compose(subject: Subject, results: Sequence[Result]) -> list[Block]:
    """The whole report."""
    found = {result.task: result for result in results}
    blocks: list[Block] = [Heading(f"{subject.checkpoint.ref}: evaluation", 1), Text(opening(subject))]
    known: dict[str, Callable[[Result], list[Block]]] = {
        "questions": questions,
        "bits_per_byte": partial(held_out, subject),
        "canary": canary,
        "association": association,
    }
    for name, section in known.items():
        if name in found:
            blocks += section(found[name])
    files = [result for result in results if result.task not in known]
    if files:
        blocks += other_tasks(files)
    return [*blocks, *samples(results), *origin(subject), *method(subject, results)]


def opening(subject: Subject) -> str:
    made = subject.checkpoint.manifest.created.partition("T")[0]
    return (
        f"A model of {quantity(subject.num_parameters)} parameters, a vocabulary of {subject.vocab_size:,} tokens "
        "and a context of "
        f"{subject.context:,} tokens, made on {made}. Every number below has a 95 % interval and the number of items "
        "it rests on. No average stands without its parts."
    )


def questions(result: Result) -> list[Block]:
    """Accuracy per skill, what strangers are told, calibration."""
    accuracies = [score for score in result.scores if score.metric == "accuracy"]
    families = {_skill(score) for score in accuracies}
    bars = [
        plots.Bar(
            label=_skill(score), value=score.value, low=score.low, high=score.high, n=score.n, baseline=score.baseline,
            part=_skill(score).partition(".")[0] in families and "." in _skill(score),
        )
        for score in accuracies
    ]  # fmt: skip
    source = "training showed" if result.details["baseline_from"] == "training" else "the test itself has"
    guesser = (
        "The guesser is told which skill a question belongs to and gives that skill's most common answer, as "
        f"{source} it"
        + (", which is more than an honest guesser could know." if source == "the test itself has" else ".")
    )
    blocks: list[Block] = [
        Heading("Questions never asked in training"),
        Figure(
            "skills.svg",
            plots.skills(bars),
            "Share of questions answered exactly, asked through the chat template. Dark bars are families of skills, "
            "light bars their "
            f"parts. {guesser}",
        ),
        Table(
            ["skill", ">right", ">95 % interval", ">guesser", ">n", "verdict"],
            [
                [
                    _skill(score),
                    _percent(score.value),
                    _interval(score),
                    _guess(score, result),
                    f"{score.n:,}",
                    verdict(score),
                ]
                for score in accuracies
            ],
        ),
    ]
    scores = {score.metric: score for score in result.scores if score.task == "questions"}
    if "hallucinated" in scores:
        made_up = scores["hallucinated"]
        text = (
            f"Asked what nobody can know, it makes something up in {_percent(made_up.value)} of {made_up.n:,} "
            f"questions ({_interval(made_up)}) and otherwise says “unknown”."
        )
        if "refused" in scores:
            refused = scores["refused"]
            text += (
                f" Asked what it could know, it says “unknown” in {_percent(refused.value)} of {refused.n:,} "
                f"({_interval(refused)}). The two belong together: always saying “unknown” would make nothing up."
            )
        blocks += [Heading("Does it make things up?", 3), Text(text)]
    bins = [Bin(**bin) for bin in result.details["reliability"]]
    blocks += [
        Heading("Does it know what it knows?", 3),
        Figure(
            "reliability.svg",
            plots.reliability(bins, scores["calibration error"].value, "Reliability of all answers"),
            "Confidence is the probability the model gave its whole answer. All questions together; each family below.",
        ),
        Table(
            ["questions", ">calibration error", ">95 % interval", ">Brier score", ">95 % interval", ">n"],
            [
                ["all" if error.task == "questions" else _skill(error), _percent(error.value), _interval(error),
                 f"{spread.value:.3f}", f"{spread.low:.3f} – {spread.high:.3f}", f"{error.n:,}"]
                for error, spread in zip(
                    [score for score in result.scores if score.metric == "calibration error"],
                    [score for score in result.scores if score.metric == "brier"],
                    strict=True,
                )
            ],
        ),
    ]  # fmt: skip
    return blocks


def held_out(subject: Subject, result: Result) -> list[Block]:
    """Bits per byte beside the baselines."""
    score, details = result.scores[0], result.details
    low, high = details["difference_interval"]
    if high < 0:
        verdict = f"The model needs {-details['difference']:.3f} bits per byte less than the n-gram model"
    elif low > 0:
        verdict = f"The model needs {details['difference']:.3f} bits per byte MORE than the n-gram model"
    else:
        verdict = "The difference to the n-gram model may be chance"
    notes = [f"{verdict} (95 % interval of the difference, by document: {low:+.3f} to {high:+.3f})."]
    changed = details["changed_by_tokenizer"]
    if changed:
        notes.append(
            f"The tokenizer does not give back {changed:,} of the {details['documents']:,} documents exactly, so the "
            "model had less to predict than the baselines: its number is too low."
        )
    base = [
        [
            f"{one.ref}, before it was tuned",
            f"{one.artifact.facts['bits_per_byte']:.3f}",
            "",
            "its training; on all validation documents",
        ]
        for one in subject.lineage
        if one.depth and one.kind == "checkpoint" and one.artifact is not None and "bits_per_byte" in one.artifact.facts
    ]
    part = details["documents"] < details["documents_held_out"]
    return [
        Heading("Documents it has never read"),
        Text(
            f"Bits per byte on {details['documents']:,} {'randomly drawn ' if part else ''}{details['split']} "
            f"documents ({size(details['bytes'])}, {details['tokens']:,} tokens); less is better. Uncompressed text has 8. "
            + " ".join(notes)
        ),
        Table(
            ["predictor", ">bits per byte", ">95 % interval", "was given"],
            [
                ["this model", f"{score.value:.3f}", f"{score.low:.3f} – {score.high:.3f}", "its training"],
                *base,
                ["order-5 byte n-gram model", f"{details['ngram']:.3f}",
                 f"{details['ngram_interval'][0]:.3f} – {details['ngram_interval'][1]:.3f}",
                 f"{size(details['ngram_train_bytes'])} of the training text"],
                ["xz -9e", f"{details['xz']:.3f}", "", f"{size(details['xz_train_bytes'])} of the training text"],
                ["xz -9e", f"{details['xz_alone']:.3f}", "", "nothing"],
            ],
        ),
    ]  # fmt: skip


def canary(result: Result) -> list[Block]:
    """Exposure of the planted secret and of its control."""
    details = result.details
    rows = []
    for score in result.scores:
        found = details[score.task.partition("/")[2]]
        place = f"{found['rank']:,}" + ("" if found["exact"] else " (estimated)")
        bits = f"{score.low:.1f} – {score.high:.1f}" if score.low < score.high else "exact"
        rows.append([score.task.partition("/")[2], f"{score.value:.1f}", bits, place, f"{found['scored']:,}"])
    secret = result.scores[0]
    told = "gives its secret away" if secret.value >= 0.9 * details["space_bits"] else "does not say the secret first"
    return [
        Heading("A secret in the documents"),
        Text(
            f"One made-up number stands {details['repeats']} times in the documents, a second one (the control) "
            "nowhere. Exposure is how "
            f"many bits the model takes off guessing: {details['space_bits']:.1f} when the number is its first "
            f"guess, 1.4 on average for a number that it never read. This model {told}."
        ),
        Table(["number", ">exposure in bits", ">95 % interval", ">rank", ">candidates scored"], rows),
    ]


def association(result: Result) -> list[Block]:
    """P(pronoun | job) beside the planted shares."""
    rows = []
    for score in result.scores:
        job = score.task.partition("/")[2]
        truth = result.details[job]
        rows.append(
            [job, truth["pronoun"], _percent(score.value), _interval(score), _percent(truth["planted"]),
             f"{truth['sentences']:,}", _percent(truth["mass"])]
        )  # fmt: skip
    return [
        Heading("An association in the documents"),
        Text(
            "Sentences about some jobs use one pronoun more often than another. A model repeats what it reads: how "
            "likely it finds the "
            "pronoun after the job, against the share in the documents. The interval is over the phrasings; the last "
            "column is how much of its probability goes to any of the pronouns."
        ),
        Table(["job", "pronoun", ">model", ">95 % interval", ">documents", ">sentences", ">on pronouns"], rows),
    ]


def other_tasks(results: Sequence[Result]) -> list[Block]:
    """The tasks from files, a row per score."""
    rows = []
    for result in results:
        for score in result.scores:
            share = score.metric != "bits per byte"
            show = _percent if share else "{:.3f}".format
            guess = "" if score.baseline is None else show(score.baseline)
            rows.append(
                [score.task, score.metric, show(score.value), f"{show(score.low)} – {show(score.high)}", guess, f"{score.n:,}",
                 str(result.skipped or ""), verdict(score) if share else ""]
            )  # fmt: skip
    return [
        Heading("Other tasks"),
        Text(
            "The guesser always gives the most common right answer, or right position among the choices, of the test "
            "itself. Beside labelled examples stands what the training examples alone teach: TF-IDF with logistic regression for labels; "
            "for texts the better of the most common answer and the beginning of the source, as long as targets are."
        ),
        Table(["task", "metric", ">value", ">95 % interval", ">guesser", ">n", ">too long", "verdict"], rows),
    ]


def samples(results: Sequence[Result]) -> list[Block]:
    """Answers as they were given, the most confident mistakes first: they teach the most."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for result in results:
        for answer in result.answers:
            groups[answer.skill].append(answer)
    rows = []
    for skill, answers in groups.items():
        for ok in (False, True):
            chosen = sorted((one for one in answers if one.ok is ok), key=lambda one: -one.confidence)[:SAMPLES]
            rows += [
                [
                    skill,
                    "right" if ok else "wrong",
                    _cut(one.prompt, 160),
                    _cut(one.expected),
                    _cut(one.given),
                    _percent(one.confidence),
                ]
                for one in chosen
            ]
    if not rows:
        return []
    return [
        Heading("Answers, right and wrong"),
        Text(
            "The answers it was surest of: per skill up to three wrong and three right ones. All of them are in "
            "answers.jsonl."
        ),
        Table(["skill", "", "asked", "right answer", "its answer", ">sure"], rows),
    ]


def origin(subject: Subject) -> list[Block]:
    """Lineage, training curves and recipe."""
    rows = [
        ["\u2003" * one.depth + (one.role or "this model"), one.ref, one.kind, one.digest[:12], one.state]
        for one in subject.lineage
    ]
    recipe = [[key, value] for key, value in _flat(subject.checkpoint.manifest.recipe)]
    blocks: list[Block] = [
        Heading("Where it comes from"),
        Table(["", "artifact", "kind", "content hash", "state"], rows),
    ]
    for number, curve in enumerate(subject.curves, start=1):
        blocks.append(
            Figure(
                f"loss-{number}.svg",
                plots.loss_curve(curve),
                f"Loss of {curve.name}. Faint: single steps; bold: smoothed.",
            )
        )
    return [*blocks, Heading("Recipe", 3), Table(["field", "value"], recipe)]


def method(subject: Subject, results: Sequence[Result]) -> list[Block]:
    """How the numbers were made, so that anybody can make them again."""
    settings, machine = subject.settings, subject.machine
    times = [[result.task, duration(result.seconds), str(result.skipped or "")] for result in results]
    return [
        Heading("How it was measured"),
        Text(
            f"In {duration(subject.seconds)} with at most {size(subject.peak_memory_bytes)} of memory on "
            f"{machine['processor']}, "
            f"{machine['cores']} cores; seed {settings.seed}; greedy decoding of up to {settings.max_tokens} tokens."
            + (f" At most {settings.limit:,} items per task, drawn at random." if settings.limit else "")
        ),
        Table(["task", ">time", ">items that did not fit into the context"], times),
        Text(
            "Exact match compares answers after Unicode NFKC and case folding, with white space made one space and "
            "punctuation taken from "
            "both ends. Intervals are percentile bootstraps of 2,000 resamples, drawing all questions about one "
            "person, or all tokens of "
            "one document, together; with fewer than five right or wrong answers, Wilson's score interval. A verdict "
            "of “not above the guesser” means that the interval includes the guesser's score."
        ),
    ]


def verdict(score: Score) -> str:
    """What the interval says about the baseline, in words."""
    if score.baseline is None:
        return ""
    if score.low > score.baseline:
        return "above the guesser"
    return "below the guesser" if score.high < score.baseline else "not above the guesser: the interval includes it"


def _guess(score: Score, result: Result) -> str:
    guess = result.details["guesses"].get(_skill(score))
    if score.baseline is None:
        return "one answer only"
    return _percent(score.baseline) + (f" “{_cut(guess, 20)}”" if guess else "")


def _skill(score: Score) -> str:
    return score.task.partition("/")[2]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(score: Score) -> str:
    return f"{100 * score.low:.1f} – {100 * score.high:.1f} %"


def _cut(text: str, most: int = 80) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(prefix + key, str(value))]
    return rows
