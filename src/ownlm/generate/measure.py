"""How fast a decoder generates: seconds of a prompt and of steps of many streams, through its bare step and through the engine.

    NativeStep, TorchStep   what computes, alone          Whole   the engine over it: scheduling, the step, choice, stops, events

Tokens are drawn by chance: the time of a step doesn't depend on them. What a step must read and multiply is counted by `Work`.
"""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike

from ownlm.generate.engine import Engine
from ownlm.generate.runners import Runner
from ownlm.generate.sampling import Sampling
from ownlm.kernels.native import PAGE, Batch, NativeDecoder
from ownlm.kernels.sources import Kind
from ownlm.models.blocks import MoE
from ownlm.models.cache import KVCache
from ownlm.models.decoder import Decoder
from ownlm.quantization.codes import linears
from ownlm.tokens.codec import Tokenizer

STEPS, SECONDS = 16, 4.0  # of streams: so many steps, or fewer that take so long
MOST_TOGETHER = 2048  # tokens of texts that are read in one step before streams are timed
BYTES: dict[Kind, float] = {
    "f32": 4,
    "bf16": 2,
    "int8": 1 + 2 / 32,
    "int4": 0.5 + 2 / 32,
    "uint4": 0.5 + 4 / 32,
    "fp8": 1,
}  # of a weight, its scale and minimum included where they aren't a whole row's


class Measured(Protocol):
    """What can be timed: tokens a second of a prompt of `length` tokens, or of `count` streams that hold some context each."""

    def prompt(self, length: int) -> float: ...
    def streams(self, count: int) -> float: ...


class NativeStep:
    """The kernels' step alone, with a cache of its own: streams hold `context` tokens when they begin."""

    def __init__(self, native: NativeDecoder, *, longest: int, streams: int, context: int) -> None:
        self.native, self.context = native, context
        each = -(-max(longest, context + STEPS) // PAGE)
        self.pages_SP = np.arange(streams * each, dtype=np.int32).reshape(streams, each)
        self.cache, self.random = native.cache(streams * each), np.random.default_rng(0)
        self.filled = 0

    def seconds(self, sequence_R: ArrayLike, position_R: ArrayLike, wanted_R: ArrayLike) -> float:
        """Of one step over these rows."""
        sequence, position, wanted = (
            np.ascontiguousarray(each, np.int32) for each in (sequence_R, position_R, wanted_R)
        )
        token_R = self.random.integers(self.native.config.vocab_size, size=len(sequence)).astype(np.int32)
        batch = Batch(
            token_R=token_R, sequence_R=sequence, position_R=position, wanted_R=wanted, long_R=np.zeros_like(token_R),
            pages_SP=self.pages_SP,
        )  # fmt: skip
        began = time.perf_counter()
        self.native.step(self.cache, batch)
        return time.perf_counter() - began

    def prompt(self, length: int) -> float:
        return length / self.seconds(np.zeros(length), np.arange(length), np.arange(length) == length - 1)

    def streams(self, count: int) -> float:
        while self.filled < count:  # once: what comes after is written over
            rows = np.full(self.context, self.filled), np.arange(self.context), np.zeros(self.context)
            self.seconds(*rows)
            self.filled += 1
        each, begun = [], time.perf_counter()
        for at in range(STEPS):
            each.append(self.seconds(np.arange(count), np.full(count, self.context + at), np.ones(count)))
            if time.perf_counter() - begun > SECONDS:
                break
        return count / statistics.median(each)


class TorchStep:
    """The modules' forward alone, where the kernels don't run."""

    def __init__(self, model: Decoder, *, longest: int, streams: int, context: int) -> None:
        self.model, self.context = model, context
        self.cache = KVCache(
            model.config,
            slots=streams,
            max_tokens=max(longest, context + STEPS),
            dtype=model.dtype,
            device=model.device,
        )
        self.generator = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def seconds(self, rows: int, first: int, count: int) -> float:
        """Of `count` tokens from place `first` on, in each of the first `rows` slots."""
        tokens_BT = torch.randint(self.model.config.vocab_size, (rows, count), generator=self.generator)
        positions_BT = torch.arange(first, first + count).expand(rows, -1)
        began = time.perf_counter()
        hidden_BTD = self.model(tokens_BT, place=self.cache.address(positions_BT))
        self.model.logits(hidden_BTD[:, -1])
        return time.perf_counter() - began

    def prompt(self, length: int) -> float:
        return length / self.seconds(1, 0, length)

    def streams(self, count: int) -> float:
        self.seconds(count, 0, self.context)
        each, begun = [], time.perf_counter()
        for at in range(STEPS):
            each.append(self.seconds(count, self.context + at, 1))
            if time.perf_counter() - begun > SECONDS:
                break
        return count / statistics.median(each)


class Whole:
    """The engine over a runner: what a server's streams get."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, runner: Runner, *, context: int) -> None:
        self.model, self.tokenizer, self.runner, self.context = model, tokenizer, runner, context
        self.random = np.random.default_rng(1)

    def engine(self, slots: int) -> Engine:
        # All texts are read in one step as long as that is no burden: those read first would be longer when the last begins. Drafts are
        # off: what random tokens repeat says nothing of texts.
        together = max(self.runner.prefill_tokens, min(slots * self.context, MOST_TOGETHER))
        return Engine(
            self.model, self.tokenizer, slots=slots, runner=self.runner, prefill_tokens=together, speculate=False
        )

    def ask(self, engine: Engine, length: int, tokens: int) -> None:
        prompt = self.random.integers(self.model.config.vocab_size, size=length).tolist()
        engine.add(prompt, Sampling(max_tokens=tokens, temperature=0, stop_ids=frozenset()))

    def prompt(self, length: int) -> float:
        engine = self.engine(1)
        self.ask(engine, length, 1)
        began = time.perf_counter()
        while not engine.idle:
            engine.step()
        return length / (time.perf_counter() - began)

    def streams(self, count: int) -> float:
        """Of the steps in which most of them write: all, where the cache has room for them."""
        engine = self.engine(count)
        for _ in range(count):
            self.ask(engine, self.context, engine.context - self.context)
        seconds: dict[int, list[float]] = {}
        begun = float("inf")
        while not engine.idle and len(seconds.get(count, ())) <= STEPS and time.perf_counter() - begun < SECONDS:
            began = time.perf_counter()
            written = len(engine.step())
            seconds.setdefault(written, []).append(time.perf_counter() - began)
            if written == count:
                begun = min(begun, began)
        most = max(seconds)
        return most / statistics.median(seconds[most][1:] or seconds[most])


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step has to do, counted in weights: `shared` are met by every token, `routed` are all experts', of whose `experts` each
    token meets `per_token`. A lookup in the table of embeddings costs nothing."""

    shared: int
    head: int
    routed: int
    experts: int
    per_token: int
    attention: int  # operations of a token with each one before it
    kept: int  # numbers in the cache of each token
    weight_bytes: float
    kept_bytes: int

    def operations(self, tokens: int, wanted: int, context: int) -> float:
        """Of a step over `tokens`, of which `wanted` get logits, each with `context` tokens before it on average."""
        active = self.shared + (self.routed * self.per_token / self.experts if self.experts else 0)
        return tokens * (2 * active + self.attention * context) + 2 * wanted * self.head

    def bytes(self, tokens: int, sequences: int, context: int) -> float:
        """Read by that step: the weights once, of the experts those that chance leads somebody to, and what the cache holds."""
        met = 1 - (1 - self.per_token / self.experts) ** tokens if self.experts else 0.0
        weights = self.shared + self.head + met * self.routed
        return weights * self.weight_bytes + sequences * context * self.kept * self.kept_bytes


def work(model: Decoder, kind: Kind) -> Work:
    """Of a model whose weights are read as `kind`."""
    config = model.config
    shared = sum(_size(module) for module in linears(model).values())
    stacks = [block.mlp for block in model.layers if isinstance(block.mlp, MoE)]
    spec = stacks[0].experts_spec if stacks else None
    mlp = config.layers[0].mlp.size
    routed = sum(3 * stack.experts_spec.count * mlp * config.hidden_size for stack in stacks)
    kv_heads, head_dim = config.kv_shape
    return Work(
        shared=shared,
        head=config.vocab_size * config.hidden_size,
        routed=routed,
        experts=spec.count if spec else 0,
        per_token=spec.per_token if spec else 0,
        attention=sum(4 * layer.attention.num_heads * layer.attention.head_dim for layer in config.layers),
        kept=2 * config.num_layers * kv_heads * head_dim,
        weight_bytes=BYTES[kind],
        kept_bytes=4 if kind == "f32" else 2,
    )


def _size(linear: Any) -> int:
    return math.prod((linear.in_features, linear.out_features))
