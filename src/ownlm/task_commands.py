"""The commands that let a model read texts, or rewrite them: classify, embed, answer, translate, summarize.

TEXT    the text itself        @FILE   from a file        -   from standard input
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ownlm.artifact import Workspace
from ownlm.errors import UserError
from ownlm.report import Reporter

Arguments = argparse.Namespace


def classify(args: Arguments, reporter: Reporter) -> None:
    """Say what each text (or image) is: labels with probabilities, or names with their characters, by the model's head."""
    from dataclasses import asdict

    from ownlm.generate.model import Model
    from ownlm.generate.opening import load
    from ownlm.generate.vision import ImageClassifier, ImageText

    model = load(args.ref, adapter=args.adapter, workspace=Workspace.at_home(reporter))
    inputs = _lines(args.text)
    labels = [label.strip() for label in (args.labels or "").split(",") if label.strip()]
    if isinstance(model, ImageText):
        if not labels:
            raise UserError(
                "this model needs labels to choose from.", where=args.ref, cure='Add --labels "a cat,a dog".'
            )
        found: list[Any] = model.classify_images(inputs, labels)
    elif labels:
        raise UserError("--labels is for CLIP; other models bring their own.", where=args.ref, cure="Leave it out.")
    elif isinstance(model, ImageClassifier):
        found = model.classify_images(inputs)
    elif not isinstance(model, Model):
        raise UserError(
            "an encoder-decoder has no labels.", where=args.ref, cure="Use `ownlm generate`, translate or summarize."
        )
    elif model.headed.model.task == "token":
        for text, entities in zip(inputs, model.entities(inputs), strict=True):
            reporter.event("entities", text=text, entities=[asdict(entity) for entity in entities])
            rows = [[one.text, one.label, f"{one.start}-{one.end}", f"{one.probability:.3f}"] for one in entities]
            reporter.table(["found", "label", "characters", "probability"], rows)
        return
    else:
        found = model.classify(inputs)
    for text, values in zip(inputs, found, strict=True):
        reporter.event("labels", text=text, labels=values)
        reporter.line(f"{text}\n  " + "  ".join(f"{label} {value:.3f}" for label, value in list(values.items())[:5]))


def embed(args: Arguments, reporter: Reporter) -> None:
    """Turn each text into a vector; print the vectors as JSON lines, or write them to a .npy or .jsonl file."""
    import json

    import numpy as np

    from ownlm.generate.model import Model
    from ownlm.generate.opening import load
    from ownlm.generate.vision import ImageText

    out = None if args.out is None else Path(args.out)
    if out is not None and out.suffix not in (".npy", ".jsonl"):
        raise UserError(
            f"{out.name} is neither .npy nor .jsonl.", where="--out", cure="Write for example --out vectors.npy."
        )
    model = load(args.ref, adapter=args.adapter, workspace=Workspace.at_home(reporter))
    if not isinstance(model, Model | ImageText):
        raise UserError(
            "this model makes no vectors of texts.", where=args.ref, cure="Give an encoder, a decoder or CLIP."
        )
    texts = _lines(args.text)
    vectors = model.embed(texts).numpy()
    if out is not None and out.suffix == ".npy":
        np.save(out, vectors)
    rows = [{"text": text, "vector": vector.tolist()} for text, vector in zip(texts, vectors, strict=True)]
    if out is not None and out.suffix == ".jsonl":
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if out is not None:
        reporter.line(f"{len(rows)} vectors of {vectors.shape[1]} numbers are in {out}")
    for row in rows:
        reporter.event("embedding", **row)
        if out is None:
            reporter.line(json.dumps(row["vector"]))


def answer(args: Arguments, reporter: Reporter) -> None:
    """Answer a question from a text: by a span head where the model has one, else in its own words."""
    from dataclasses import asdict

    context, fields = _text(args.context), _settings(args.settings)
    found = _writer(args, reporter).answer(args.question, context, **fields)
    reporter.event("answer", question=args.question, **asdict(found))
    reporter.line(found.text.strip())


def translate(args: Arguments, reporter: Reporter) -> None:
    """Translate each text with an encoder-decoder, a chat model or a base decoder."""
    texts, fields = _lines(args.text), _settings(args.settings)
    found = _writer(args, reporter).translate(texts, source=args.source, target=args.target, **fields)
    _written("translation", texts, found, reporter)


def summarize(args: Arguments, reporter: Reporter) -> None:
    """Put each text in short; a file is one text."""
    texts, fields = [_text(word) for word in args.text], _settings(args.settings)
    _written("summary", texts, _writer(args, reporter).summarize(texts, **fields), reporter)


def _writer(args: Arguments, reporter: Reporter) -> Any:
    from ownlm.generate.opening import load_writer

    return load_writer(args.ref, adapter=args.adapter, workspace=Workspace.at_home(reporter))


def _settings(words: Sequence[str]) -> dict[str, Any]:
    """The fields of `Sampling` that were set, checked; a task has defaults of its own for the others."""
    from ownlm import recipe
    from ownlm.generate.sampling import Sampling

    read = recipe.read(Sampling, None, words)
    return {name: getattr(read, name) for name in (re.split(r"[.=]", word)[0].strip() for word in words)}


def _written(kind: str, texts: Sequence[str], completions: Sequence[Any], reporter: Reporter) -> None:
    for text, completion in zip(texts, completions, strict=True):
        reporter.event(kind, source=text, text=completion.text.strip(), finish_reason=completion.finish_reason)
        reporter.line(completion.text.strip())


def _lines(words: Sequence[str]) -> list[str]:
    """The texts of the command line; "-" stands for the lines of standard input, @FILE for those of a file."""
    texts: list[str] = []
    for word in words:
        if word == "-" or word.startswith("@"):
            whole = sys.stdin.read() if word == "-" else _read(Path(word[1:]))
            texts += [line for line in whole.splitlines() if line.strip()]
        else:
            texts.append(word)
    if not texts:
        raise UserError("there is no text.", cure='Give a text, "-" or @FILE.')
    return texts


def _text(word: str) -> str:
    """A text of the command line; "-" stands for standard input, @FILE for a file. UserError for a word that may be meant as a file."""
    if word == "-":
        return sys.stdin.read()
    if word.startswith("@"):
        return _read(Path(word[1:]))
    one = word.isascii() and len(word.split()) == 1  # not all scripts put spaces between words
    if one or _is_file(word):
        what = "a file" if _is_file(word) else "one word"
        raise UserError(
            f"{word!r} is {what}, and is it the text?",
            cure=f'Write @{word} for the file of that name; give a text of one word on standard input, with "-".',
        )
    return word


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except OSError:  # too long for a name
        return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"this can't be read as text: {fault}.", where=str(path)) from None
