"""Vocabularies and texts that nobody here wrote, beside the checkout; tests that need them skip when they are absent."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st

VECTORS = Path(__file__).parents[3] / "shared/vectors"
# What vocabularies disagree about: spaces, marks, special tokens and byte pieces spelled out, forms that are normalised.
PIECES = [
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "[CLS]",
        "[SEP]",
        "[BOS]",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|startoftext|>",
    ),
    *(" ", "  ", "\n", "\n\n\n", "\r\n", "\t", "\u3000", "\u00a0", "▁", "▁▁", "Ġ", "</w>"),
    *("<0x0A>", "<0x4", "1>", "<mark>", "<mark>x", "the", "aaa", "aa", "a", "=", "==", "'s", "'LL", "12345", "1,"),
    *(
        "ｶﾞ",
        "ﾊﾟ",
        "e\u0302\u0301",
        "Ａ\u0301",
        "①",
        "ﬁ",
        "é",
        "ß",
        "İ",
        "漢字",
        "中文",
        "한국어",
        "عربي",
        "हिन्दी",
        "😀",
        "👩‍👩‍👧",
        "\ue000",
    ),
]


def vector(name: str) -> Path:
    """A file of shared/vectors."""
    path = VECTORS / name
    if not path.exists():
        pytest.skip(f"{path} is absent: shared/vectors is not beside this checkout")
    return path


def wide_texts() -> st.SearchStrategy[str]:
    """Any text, and often the pieces above. U+10FFFF does the book-keeping in normalisers, and is no character."""
    anything = st.text(st.characters(exclude_characters="\U0010ffff", exclude_categories=["Cs"]), max_size=6)
    return st.lists(st.one_of(anything, st.sampled_from(PIECES)), max_size=10).map("".join)


@cache
def llama_cpp_texts() -> list[str]:
    """llama.cpp's own 47 test texts."""
    path = vector("llama.cpp-vocab/models/ggml-vocab-gpt-2.gguf.inp")
    return path.read_text().split("\n__ggml_vocab_test__\n")


@cache
def lines() -> list[str]:
    """Some hundred lines of English, German and Japanese names in them, and llama.cpp's test texts."""
    found = [*llama_cpp_texts()]
    for name in ("sentencepiece/botchan.txt", "cs336/corpus.en", "cs336/german.txt", "cs336/address.txt"):
        found += vector(name).read_text().split("\n")[:200]
    return found
