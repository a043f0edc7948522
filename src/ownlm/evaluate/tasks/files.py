"""Tasks from a file with one JSON object per line, .gz or not. What a line has decides how it is asked:

    {query, choices, gold}                  multiple choice: which of the choices is the likeliest continuation
    {context_options, continuation, gold}   the same turned round: after which context is the continuation the likeliest
    {context, continuation}                 loglikelihood: is the continuation what the model would write, and at how many bits
    {context, answer, aliases}              generation: continued as text to the end of the line, exact match
    {prompt, answer}                        generation: asked as a user's message, exact match (Question records too)

The first four are the shapes of the CORE suite (Li et al. 2024, DataComp-LM; files of MosaicML's Evaluation Gauntlet).
No examples are put before a question. A choice follows its query after one space.
"""

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ownlm.errors import NotFound, UserError
from ownlm.evaluate import metrics
from ownlm.evaluate.harness import Answer, Prompt, Result, Settings, Span, Task, complete, draw, logprobs, require
from ownlm.generate.model import Model
from ownlm.records import Message, Score
from ownlm.report import Reporter

Row = dict[str, Any]


def file_task(path: Path, name: str) -> Task:
    """The task in a file. Raises NotFound, or UserError that names the line nobody can ask."""
    rows = read_rows(path)
    shape = next((shape for shape in SHAPES if set(shape) <= set(rows[0])), None) if rows else None
    if shape is None:
        shapes = " or ".join("{" + ", ".join(shape) + "}" for shape in SHAPES)
        raise UserError("this is not a file of questions.", where=str(path), cure=f"Each line is {shapes}.")
    for number, row in enumerate(rows, start=1):
        fault = f"{', '.join(sorted(set(shape) - set(row)))} is missing" if not set(shape) <= set(row) else check(row)
        if fault:
            raise UserError(f"{fault}.", where=f"{path}:{number}")
    ask = SHAPES[shape]
    return lambda model, settings, reporter: ask(
        name, draw(rows, settings.limit, settings.seed), model, settings, reporter
    )


def read_rows(path: Path) -> list[Row]:
    """The JSON objects of a file."""
    if not path.is_file():
        raise NotFound(f"there is no file {path}.")
    rows: list[Row] = []
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        for line in text.split("\n"):
            if line.strip():
                rows.append(dict(json.loads(line)))
    except (ValueError, TypeError, EOFError, gzip.BadGzipFile) as fault:
        raise UserError(f"not a JSON object: {fault}.", where=f"{path}:{len(rows) + 1}") from None
    return rows


def check(row: Row) -> str | None:
    """What is wrong with the values of a row, if anything."""
    options = row.get("choices", row.get("context_options"))
    if "gold" in row and options is not None:
        if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
            return "choices must be texts that are not empty"
        if not isinstance(row["gold"], int) or not 0 <= row["gold"] < len(options):
            return f"gold must be a number from 0 to {len(options) - 1}"
    texts = [
        key for key in ("query", "context", "continuation", "prompt", "answer") if not isinstance(row.get(key, ""), str)
    ]
    return f"{', '.join(texts)} must be text" if texts else None


def multiple_choice(name: str, rows: Sequence[Row], model: Model, settings: Settings, reporter: Reporter) -> Result:
    """Accuracy of the likeliest choice: by its whole log-probability, and by that per byte, which long choices need."""
    options = [[(row["query"], spaced(row["query"], choice)) for choice in row["choices"]] for row in rows]
    kept, spans = score_options(name, options, model, settings, reporter)
    answers, right, right_per_byte, guessed = [], [], [], []
    for index, found in zip(kept, spans, strict=True):
        row = rows[index]
        totals = [span.total for span in found]
        per_byte = [total / len(choice.encode()) for total, choice in zip(totals, row["choices"], strict=True)]
        right.append(best(totals) == row["gold"])
        right_per_byte.append(best(per_byte) == row["gold"])
        guessed.append(row["gold"])
        answers.append(choice_answer(name, row, row["query"], row["choices"], totals))
    baseline = majority_position(guessed)
    scores = (
        accuracy(name, "accuracy", right, baseline, settings.seed),
        accuracy(name, "accuracy per byte", right_per_byte, baseline, settings.seed),
    )
    return Result(task=name, scores=scores, answers=tuple(answers), skipped=len(rows) - len(kept))


def schema(name: str, rows: Sequence[Row], model: Model, settings: Settings, reporter: Reporter) -> Result:
    """Accuracy of the context after which the continuation is the likeliest (Winograd schemas)."""
    options = [[(context, spaced(context, row["continuation"])) for context in row["context_options"]] for row in rows]
    kept, spans = score_options(name, options, model, settings, reporter)
    totals = [[span.total for span in found] for found in spans]
    right = [best(found) == rows[index]["gold"] for index, found in zip(kept, totals, strict=True)]
    answers = [
        choice_answer(name, rows[index], rows[index]["continuation"], rows[index]["context_options"], found)
        for index, found in zip(kept, totals, strict=True)
    ]
    baseline = majority_position([rows[index]["gold"] for index in kept])
    scores = (accuracy(name, "accuracy", right, baseline, settings.seed),)
    return Result(task=name, scores=scores, answers=tuple(answers), skipped=len(rows) - len(kept))


def loglikelihood(name: str, rows: Sequence[Row], model: Model, settings: Settings, reporter: Reporter) -> Result:
    """How often greedy decoding would write the continuation, and what it costs in bits per byte."""
    options = [[(row["context"], spaced(row["context"], row["continuation"]))] for row in rows]
    kept, spans = score_options(name, options, model, settings, reporter)
    bits = [-found[0].total / math.log(2) for found in spans]
    sizes = [len(options[index][0][1].encode()) for index in kept]
    low, high = metrics.bootstrap(bits, sizes, seed=settings.seed)
    scores = (
        accuracy(name, "greedy match", [found[0].greedy for found in spans], None, settings.seed),
        Score(
            task=name, metric="bits per byte", value=sum(bits) / sum(sizes), low=low, high=high, n=len(kept)
        ),
    )  # fmt: skip
    return Result(task=name, scores=scores, skipped=len(rows) - len(kept))


def continuation(name: str, rows: Sequence[Row], model: Model, settings: Settings, reporter: Reporter) -> Result:
    """Exact match of the rest of the line that the model writes after a context."""
    return _generation(name, rows, [row["context"] for row in rows], ("\n",), model, settings, reporter)


def message(name: str, rows: Sequence[Row], model: Model, settings: Settings, reporter: Reporter) -> Result:
    """Exact match of the model's reply to a user's message."""
    prompts: list[Prompt] = [[Message(role="user", content=row["prompt"])] for row in rows]
    return _generation(name, rows, prompts, (), model, settings, reporter)


def _generation(
    name: str, rows: Sequence[Row], prompts: Sequence[Prompt], stop: tuple[str, ...], model: Model, settings: Settings,
    reporter: Reporter,
) -> Result:  # fmt: skip
    completions = complete(model, prompts, settings, reporter, task=name, stop=stop)
    answers = [
        Answer(
            task=name,
            skill=name,
            prompt=row["prompt"] if "prompt" in row else row["context"],
            expected=row["answer"],
            given=completion.text,
            ok=metrics.exact_match(completion.text, row["answer"], *row.get("aliases", ())),
            confidence=math.exp(min(0.0, sum(completion.logprobs))),
        )
        for row, completion in zip(rows, completions, strict=True)
        if completion is not None
    ]
    baseline = metrics.majority([answer.expected for answer in answers])[1]
    scores = (accuracy(name, "exact match", [answer.ok for answer in answers], baseline, settings.seed),)
    return Result(task=name, scores=scores, answers=tuple(answers), skipped=len(rows) - len(answers))


def score_options(
    name: str, options: Sequence[Sequence[tuple[str, str]]], model: Model, settings: Settings, reporter: Reporter
) -> tuple[list[int], list[list[Span]]]:
    """The items all of whose (context, continuation) pairs fit into the model's context, and the Span of each of those pairs."""
    encoded = [[model.continuation_ids(*pair) for pair in item] for item in options]
    kept = [
        index
        for index, item in enumerate(encoded)
        if all(len(before) + len(scored) - 1 <= model.context for before, scored in item)
    ]
    require(kept, options, name, model)
    reporter.status(f"{name}: {len(kept)} questions")
    flat = logprobs(model, [pair for index in kept for pair in encoded[index]], settings.batch_tokens)
    found, start = [], 0
    for index in kept:
        found.append(flat[start : start + len(encoded[index])])
        start += len(encoded[index])
    return kept, found


def spaced(context: str, text: str) -> str:
    """The text with the space that stands between it and its context, unless one of them brings its own."""
    return text if not context or context[-1].isspace() or text[:1].isspace() else " " + text


def best(values: Sequence[float]) -> int:
    """The position of the largest value, the first of equals."""
    return max(range(len(values)), key=lambda index: values[index])


def majority_position(gold: Sequence[int]) -> float:
    """How often the position that is right most often is right: what a guesser who always says "B" gets."""
    return max(Counter(gold).values()) / len(gold)


def choice_answer(name: str, row: Row, prompt: str, options: Sequence[str], totals: Sequence[float]) -> Answer:
    """The likeliest option as an answer; its confidence is its share of the probability of all options."""
    picked = best(totals)
    share = 1 / sum(math.exp(min(700.0, total - totals[picked])) for total in totals)
    return Answer(
        task=name, skill=name, prompt=prompt, expected=options[row["gold"]], given=options[picked], ok=picked == row["gold"],
        confidence=share,
    )  # fmt: skip


def accuracy(name: str, metric: str, right: Sequence[bool], baseline: float | None, seed: int) -> Score:
    """The share of right answers as a Score."""
    value, low, high = metrics.proportion(right, seed=seed)
    return Score(task=name, metric=metric, value=value, low=low, high=high, n=len(right), baseline=baseline)


SHAPES: dict[tuple[str, ...], Callable[[str, Sequence[Row], Model, Settings, Reporter], Result]] = {
    ("query", "choices", "gold"): multiple_choice,
    ("context_options", "continuation", "gold"): schema,
    ("context", "continuation"): loglikelihood,
    ("context", "answer"): continuation,
    ("prompt", "answer"): message,
}
