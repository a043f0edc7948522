"""Cleaning: one text -> normalised text with a language, or the reason why it is dropped.

Rules for prose follow Gopher (Rae et al. 2021, table A1 and section A.1.1) and C4 (Raffel et al. 2020, section 2.2); rules for
source code follow Codex (Chen et al. 2021, section 3.1). Where a threshold differs from the paper the comment says so.
"""

import hashlib
import re
import unicodedata
from collections import Counter

# Everything in Unicode's Cc but tab and line feed, and the byte order mark.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ufeff]")
TRAILING_SPACE = re.compile(r"[^\S\n]+$", re.MULTILINE)
BULLETS = ("-", "*", "•", "‣", "◦", "·")
LANGUAGE_SAMPLE = 300  # characters, 0.2-0.3 ms of one core: 600 take twice as long
RULES_FROM_WORDS = 50  # statistics of a shorter text say nothing about it


def well_formed(text: str) -> str:
    """The text with U+FFFD for each lone surrogate: JSON can spell one ("\\ud800"), UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def normalise(text: str) -> str:
    """NFC, "\\n" line ends, no control characters, no space at line ends, no empty lines around the text."""
    text = well_formed(text).replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return TRAILING_SPACE.sub("", CONTROL.sub("", text)).strip("\n")


def fault_of(text: str, *, code: bool) -> str | None:
    """The rule a normalised text breaks, or None."""
    return _code_fault(text) if code else _prose_fault(text)


def _prose_fault(text: str) -> str | None:
    words = text.split()
    if len(words) < RULES_FROM_WORDS:
        return None
    # Gopher asks for 3 to 10; simple stories have shorter words, and scripts without spaces are not judged.
    mean = sum(map(len, words)) / len(words)
    if mean < 2 or (mean > 10 and text.isascii()):
        return "word length"
    # Gopher: a letter in at least 80 % of the words. Tables of numbers fail this.
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "few letters"
    if text.count("#") + text.count("…") + text.count("...") > 0.1 * len(words):
        return "symbols"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines):
        return "bullet list"
    if sum(line.endswith(("…", "...")) for line in lines) > 0.3 * len(lines):
        return "cut lines"
    # Gopher: at most 20 % of the characters in lines that stood before.
    counts = Counter(lines)
    if sum(len(line) * (count - 1) for line, count in counts.items() if count > 1) > 0.2 * len(text):
        return "repeated lines"
    if "lorem ipsum" in text[:100_000].lower():  # C4
        return "placeholder text"
    return None


def _code_fault(text: str) -> str | None:
    lines = text.split("\n")
    # Codex: averages above 100 or a line above 1000 characters mark minified or generated files.
    if len(text) > 100 * len(lines) or max(map(len, lines)) > 1000:
        return "long lines"
    # "a small percentage of alphanumeric characters"; the number is The Stack's (Kocetkov et al. 2022).
    if sum(map(str.isalnum, text)) < 0.25 * len(text):
        return "few letters"
    return None


def language_of(text: str) -> str:
    """The ISO 639-1 code of the language, told from a sample in the middle; "und" when there are no letters."""
    from py3langid import classify

    middle = max(0, (len(text) - LANGUAGE_SAMPLE) // 2)
    sample = text[middle : middle + LANGUAGE_SAMPLE]
    if not any(map(str.isalpha, sample)):
        return "und"
    language: str = classify(sample)[0]
    return language


def content_hash(text: str) -> bytes:
    """16 bytes that two texts share when they differ in case and white space only."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()
