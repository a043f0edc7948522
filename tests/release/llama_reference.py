"""llama.cpp as a reference: a child in an environment of its own (tests/llama_cpp_child.py), and models that don't leave it a choice.

Two programs that sum in another order differ in the last digits, so greedy texts can be compared only where no choice is close:
`decided` looks for a prompt after which our own model never is in two minds, and which isn't an idle repetition either.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ownlm.models.cache import KVCache
from ownlm.models.decoder import Decoder
from ownlm.models.encoder_decoder import EncoderDecoder

CHILD = Path(__file__).parents[1] / "llama_cpp_child.py"
MARGIN = 0.05  # between the largest and the second largest logit
DISTINCT = 8  # tokens at least


class LlamaCpp:
    """One process that answers requests; it is started again when llama.cpp ended it."""

    def __init__(self, python: str) -> None:
        self.python, self.child = python, self._start(python)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            self.close()
            self.child = self._start(self.python)
            return {"error": "llama.cpp ended its process"}
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.close()
        self.child.wait()
        self.child.stdout.close()

    @staticmethod
    def _start(python: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [python, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )


@dataclass(frozen=True)
class Greedy:
    tokens: list[int]
    margin: float


@torch.inference_mode()
def greedy(model: Decoder | EncoderDecoder, prompt: list[int], count: int) -> Greedy:
    """The tokens our model chooses through its cache, and how close the closest choice was. An encoder-decoder's prompt is its source."""
    cache = KVCache(model.config, slots=1, max_tokens=len(prompt) + count)
    step, start = torch.tensor([prompt]), 0
    if isinstance(model, EncoderDecoder):
        source, step = model.source(model.encode(step)), torch.tensor([[model.config.start_token]])
    tokens, margin = [], float("inf")
    for _ in range(count):
        if isinstance(model, EncoderDecoder):
            hidden = model.decode(step, source, cache=cache, start=start)
        else:
            hidden = model(step, place=cache.address(torch.arange(start, start + step.shape[1])[None]))
        logits_V = model.logits(hidden[:, -1])[0]
        first, second = logits_V.topk(2).values.tolist()
        margin = min(margin, first - second)
        tokens.append(int(logits_V.argmax()))
        start, step = start + step.shape[1], torch.tensor([tokens[-1:]])
    return Greedy(tokens, margin)


def decided(
    model: Decoder | EncoderDecoder, *, length: int, count: int, vocabulary: int, tries: int = 60
) -> tuple[list[int], Greedy]:
    """(a prompt, what follows it): the first of some random prompts after which no choice is close."""
    best: tuple[list[int], Greedy] | None = None
    for seed in range(tries):
        prompt = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        found = greedy(model, prompt, count)
        if len(set(found.tokens)) >= DISTINCT and (best is None or found.margin > best[1].margin):
            best = prompt, found
            if found.margin >= MARGIN:
                break
    assert best is not None, "the model repeats itself after every prompt"
    return best


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max|Δ| in units of max(1, max|ours|)"""
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0))
