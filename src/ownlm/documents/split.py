"""Splitting by content: a document's hash alone decides where it goes, whatever else is in the folder and in which order."""

from typing import Literal

Split = Literal["train", "validation", "test"]


def split_of(digest: bytes, *, validation_share: float, test_share: float) -> Split:
    """The split of the document with this content hash."""
    place = int.from_bytes(digest[:8]) / 2**64
    if place < validation_share:
        return "validation"
    return "test" if place < validation_share + test_share else "train"


def cut_tail(text: str, share: float) -> tuple[str, str]:
    """(head, tail) with about `share` of the text in the tail, cut at the nearest paragraph, line or word before it.

    For a folder with too few documents to hold one out. The tail may come out empty when there is nowhere to cut.
    """
    target = int(len(text) * (1 - share))
    for border in ("\n\n", "\n", " "):
        at = text.rfind(border, target // 2, target)
        if at > 0:
            return text[:at].rstrip(), text[at:].strip("\n")
    return text, ""
