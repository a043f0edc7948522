"""Answers of a given form: only tokens that can still lead to a text of it may be chosen (llguidance, docs/decisions).

    Form("json_schema", source) ── Grammars.matcher ──► Matcher ── allowed() ─► sample ─► accept(token) ─► … ended

A form comes from whoever asks, so it is bounded before anything is built from it: its size, how deep it nests, how large the
numbers are that it counts to; the engine's own limits bound what is left, in building and in every step.
"""

import json
import re
import threading
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ownlm.errors import UserError
from ownlm.tokens.codec import Tokenizer

Kind = Literal["json_schema", "regex", "grammar"]
MAX_CHARACTERS, MAX_DEPTH, MAX_COUNT = 65_536, 48, 10_000
FORMS_KEPT = 32  # built forms: a client asks for the same one again and again
ANY_OBJECT = '{"type": "object"}'
OPEN, CLOSE = "([{", ")]}"


@dataclass(frozen=True, slots=True)
class Form:
    """json_schema: a JSON schema as text; regex: a regular expression; grammar: a Lark grammar. The whole answer must match."""

    kind: Kind
    source: str

    def __post_init__(self) -> None:
        """Raises UserError for a form that is too large, nests too deep or counts too far."""
        if len(self.source) > MAX_CHARACTERS:
            raise UserError(
                f"it has {len(self.source):,} characters, at most {MAX_CHARACTERS:,} are read.", where=self.kind
            )
        if _depth(self.source) > MAX_DEPTH:
            raise UserError(f"it nests deeper than {MAX_DEPTH} levels.", where=self.kind)
        if any(len(digits) > 9 or int(digits) > MAX_COUNT for digits in _counts(self.kind, self.source)):
            raise UserError(f"it counts beyond {MAX_COUNT:,}.", where=self.kind)
        if self.kind == "json_schema":
            try:
                json.loads(self.source)
            except ValueError as fault:
                raise UserError(f"it is no JSON ({fault}).", where=self.kind) from None


def _depth(source: str) -> int:
    """How deep brackets nest at most; brackets within strings count too, which errs on the safe side."""
    depth = deepest = 0
    for character in source:
        if character in OPEN:
            depth += 1
            deepest = max(deepest, depth)
        elif character in CLOSE:
            depth = max(0, depth - 1)
    return deepest


def _counts(kind: Kind, source: str) -> list[str]:
    """The numbers that say how often something may repeat."""
    if kind == "json_schema":
        return re.findall(r'"(?:max|min)(?:Items|Length|Properties|Contains)"\s*:\s*(\d+)', source) + re.findall(
            r"[{,]\s*(\d+)\s*[,}]", source
        )
    return re.findall(r"[{,~.]\s*(\d+)\s*[,}]?", source)


class Matcher:
    """Where one answer stands in its form. Changes with every token."""

    def __init__(self, state: Any, vocab_size: int) -> None:
        self._state = state
        self._mask = np.zeros(-(-vocab_size // 32), np.int32)
        self.vocab_size = vocab_size

    def copy(self) -> "Matcher":
        """Another one at the same place."""
        return Matcher(self._state.deep_copy(), self.vocab_size)

    def allowed(self) -> Tensor:
        """(vocab_size,) bool: the tokens that may come next. Raises UserError where the form turns out too complex."""
        self._state.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self.vocab_size]
        return torch.from_numpy(bits.astype(bool))

    def accept(self, token: int) -> bool:
        """Go on by a token; True when nothing may follow."""
        self._state.consume_token(token)
        self._check()
        return bool(self._state.is_stopped())

    def _check(self) -> None:
        if self._state.is_error():
            raise UserError(f"the form asks for too much: {_first_line(self._state.get_error())}", where="form")


class Grammars:
    """Builds matchers for one vocabulary. The matcher of a form that was built before is a copy."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: of the model, which may have more places than the tokenizer has tokens."""
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._built: dict[Form, Any] = {}
        self._vocabulary: Any = None
        self._lock = threading.Lock()  # a server builds beside the engine's thread

    def matcher(self, form: Form) -> Matcher:
        """Raises UserError for a form that can't be read or is too complex."""
        with self._lock:
            state = self._built.pop(form, None)
            if state is None:
                state = self._build(form)
            self._built[form] = state
            while len(self._built) > FORMS_KEPT:
                del self._built[next(iter(self._built))]
            return Matcher(state.deep_copy(), self.vocab_size)

    def _build(self, form: Form) -> Any:
        import llguidance

        if self._vocabulary is None:
            self._vocabulary = llguidance.LLTokenizer(
                self.tokenizer.backend.to_str(), n_vocab=self.vocab_size, eos_token=sorted(self.tokenizer.stop_ids)
            )
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=500_000,
            step_lexer_fuel=100_000,
            step_max_items=20_000,
            max_lexer_states=50_000,
            max_grammar_size=100_000,
        )
        try:
            if form.kind == "json_schema":
                grammar = llguidance.LLMatcher.grammar_from_json_schema(form.source)
            elif form.kind == "regex":
                grammar = llguidance.LLMatcher.grammar_from_regex(form.source)
            else:
                grammar = llguidance.LLMatcher.grammar_from_lark(form.source)
            state = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        except ValueError as fault:
            raise UserError(_first_line(str(fault)), where=form.kind) from None
        if state.is_error():
            raise UserError(_first_line(state.get_error()), where=form.kind)
        return state


def _first_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else "it can't be read"
