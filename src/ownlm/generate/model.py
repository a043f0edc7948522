"""The public face of a model: ask it, read its numbers.

    load("demo") (opening.py) ─► Model ── generate, stream ─► Engine (KV cache, sampling)
                                       └─ logits, hidden, score, embed ─► the plain forward that training uses

A prompt is a `str`, continued as raw text, or a list of messages, answered as a chat through the checkpoint's own template.
Encoders (BERT) and models with another head than the vocabulary's read texts and write none: of those above, they have `hidden`
and `embed`, and `logits` where there is a masked-LM head.

Shapes: B rows, T tokens, V vocabulary, D hidden size, N texts.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast, overload

import torch
from torch import Tensor

from ownlm import device as machine
from ownlm.checkpoints.unread import Unread
from ownlm.errors import ContextTooLong, UserError
from ownlm.generate import asking, beams
from ownlm.generate.adapters import Adapter, Adapters, for_each
from ownlm.generate.answers import Answer, as_sampling, best, plain
from ownlm.generate.drafter import Drafter, check_vocabulary
from ownlm.generate.engine import Engine
from ownlm.generate.parallel import Ranks
from ownlm.generate.prompts import Chat, Prompt, as_message, is_one
from ownlm.generate.reading import Entity, Found, Headed
from ownlm.generate.runners import NativeRunner, Runner
from ownlm.generate.sampling import Sampling
from ownlm.generate.sequence import Event
from ownlm.generate.sight import Reading, Sight
from ownlm.generate.torch_runner import torch_runner
from ownlm.kernels import native
from ownlm.kernels.sources import WeightsState, weights_state
from ownlm.models.decoder import Decoder
from ownlm.models.encoder import Encoder
from ownlm.models.heads import Pooling, pool
from ownlm.quantization.codes import count_weights
from ownlm.records import Completion
from ownlm.tokens.codec import Tokenizer

SLOTS = 64
CACHE_SHARE, GPU_CACHE_SHARE = 0.25, 0.85  # of the free memory, at most; a GPU has nothing else to do
ANSWER_SHARE = 0.75  # of it, where a single answer needs more
PACKED_SHARE = 0.5  # likewise
FORWARD_TOKENS = 8192  # tokens of one plain forward (score, embed), padding included


class Model:
    """A decoder or an encoder, and its tokenizer. `slots` bounds how many answers are generated at the same time.

    kv  how engines made from now on keep keys and values: "f32", "bf16", or "int8" in half the memory of bf16; None: f32 beside
        float32 weights, else bf16. Only the native kernels have a choice.
    """

    def __init__(
        self,
        decoder: Decoder | Encoder,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        ref: str = "",
        digest: str = "",
        slots: int = SLOTS,
        kv: native.KV | None = None,
        sight: Sight | None = None,
        unread: Unread | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`sight` reads the images of a chat. `unread` has the weights of a decoder that comes without; `ranks` are the processes that it
        is split over."""
        self.shapes, self.tokenizer, self.sight = decoder.eval(), tokenizer, sight
        self._unread, self.ranks = unread, ranks
        self.pooling = decoder.pooling or Pooling()
        self.name, self.ref, self.digest = name, ref or name, digest
        self.slots, self.kv = slots, kv
        self.draft: Model | None = None
        self.lock = threading.RLock()
        self._engine: Engine | None = None
        self._native: native.NativeDecoder | None = None
        self._packed: WeightsState = ()  # of the weights that `_native` is a copy of
        self._engine_state: WeightsState = ()
        self._events: dict[int, deque[Event]] = {}

    @property
    def decoder(self) -> Decoder | Encoder:
        """The modules. Where only the kernels had their weights so far, a copy is read now and kept. (`shapes` has the same config,
        maybe without weights.)"""
        with self.lock:
            if self._unread is not None:
                self.shapes, self._unread = self._unread.read(), None
                # The packed copy and the cache, where they are there, are of these very weights.
                self._packed = self._engine_state = weights_state(self.shapes)
            return self.shapes

    @decoder.setter
    def decoder(self, module: Decoder | Encoder) -> None:
        with self.lock:
            self.shapes, self._unread = module.eval(), None

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.shapes.config.max_tokens

    @property
    def num_parameters(self) -> int:
        if self.ranks is not None:
            return self.ranks.num_parameters
        return count_weights(self.shapes if self.sight is None else self.sight.model)

    def writer(self) -> Decoder:
        """The `shapes` of a decoder. Raises UserError where this model can only read."""
        if isinstance(self.shapes, Decoder) and self.shapes.task is None:
            return self.shapes
        has = "no head" if self.shapes.task is None else f"a head for {self.shapes.task!r}"
        raise UserError(
            f"this model reads texts and writes none: its config names {has}.",
            where=self.name,
            cure="Use its `embed` or `hidden`, or load a model for causal LM.",
        )

    def engine(self, slots: int | None = None) -> Engine:
        """A new engine over this model, its cache within a share of the free memory. Raises UserError: see `writer`."""
        decoder = self.writer()
        slots = max(1, slots or self.slots)
        runner, drafter = self._runner(decoder, slots), None
        if self.draft is not None:
            small = self.draft.writer()
            drafter = Drafter(small, self.draft._runner(small, slots), context=self.context)
        return Engine(decoder, self.tokenizer, slots=slots, runner=runner, drafter=drafter)

    def draft_with(self, small: "Model | None") -> None:
        """Let a small decoder write ahead from now on: the same text, sooner where that pays. Raises UserError: another vocabulary."""
        if small is not None:
            self.writer()
            check_vocabulary(self.tokenizer, small.tokenizer, small.writer(), where=small.ref)
        self.draft, self._engine = small, None

    @cached_property
    def adapters(self) -> Adapters:
        """What waits beside the model, to be chosen by `adapter=NAME`. UserError where nothing can: see `writer`."""
        if self.sight is not None:
            raise UserError("adapters of a model of images can only be merged.", where=self.name)
        if self.ranks is not None:
            raise UserError(
                "a split model goes without adapters.", where=self.name, cure="Export the merged model, and split that."
            )
        return Adapters(self.writer(), self._kernels, name=self.name, ref=self.ref, digest=self.digest)

    @property
    def loaded_adapters(self) -> list[Adapter]:
        """Those of `adapters`; none for a model that can have none."""
        return self.adapters.all() if self.sight is None and self.ranks is None else []

    def _kernels(self) -> native.NativeDecoder | None:
        """The native kernels where they can run and there is memory for a packed copy of the weights; decided once for these weights."""
        decoder = self.writer()
        if self._packed != (state := weights_state(decoder)):
            self._native, self._packed = None, state  # gone before another is made
            room = machine.free_memory_bytes() * PACKED_SHARE
            if native.unsupported(decoder) is None and native.packed_bytes(decoder) < room:
                lend = None if self._unread is None else self._unread.lend
                self._native = native.NativeDecoder(decoder, lend=lend)
        return self._native

    def _runner(self, decoder: Decoder, slots: int) -> Runner:
        """The native kernels, or the modules: here, or split over processes."""
        kernels = self._kernels() if self.ranks is None else None
        share = GPU_CACHE_SHARE if decoder.device.type == "cuda" else CACHE_SHARE
        room = int(machine.free_memory_bytes(decoder.device) * share)
        if kernels is not None:
            least, page_bytes = -(-self.context // native.PAGE), kernels.page_bytes(self.kv)
            pages = min(slots * least, room // page_bytes)
            if pages < least:  # then texts are shorter than the model would read, and none ends the process
                pages = max(1, min(least, int(room / CACHE_SHARE * ANSWER_SHARE) // page_bytes))
            return NativeRunner(kernels, decoder, pages=pages, kv=self.kv)
        if self.kv is not None:
            reason = native.unsupported(decoder) or "there is no memory for a packed copy of the weights"
            raise UserError(
                "only the native kernels keep keys and values as asked, and they don't run here: "
                f"{reason if self.ranks is None else 'the model is split over processes'}.",
                where=f"kv={self.kv}",
                cure="Leave it out.",
            )
        if self.ranks is not None:
            return self.ranks.runner(slots=slots, context=self.context, room=room)
        return torch_runner(cast(Decoder, self.decoder), slots=slots, context=self.context, room=room)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens a prompt becomes. Raises UserError for messages of another shape."""
        return self.read(prompt).ids

    def read(self, prompt: Prompt) -> Reading:
        """The tokens a prompt becomes, and what stands in for their embedding where there are images."""
        if isinstance(prompt, str):
            if isinstance(self.shapes, Encoder):
                return Reading(self.tokenizer.document(prompt))
            # A document without its end token; a text of nothing stands where a new document begins.
            return Reading(self.tokenizer.document(prompt)[:-1] or [self.tokenizer.eos_id])
        self.writer()
        if self.sight is not None:
            return self.sight.read(prompt, self.tokenizer)
        messages = [as_message(message) for message in prompt]
        return Reading(self.tokenizer.chat(messages, add_generation_prompt=True)[0])

    @overload
    def generate(self, prompt: str | Chat, sampling: Sampling | None = None, **fields: Any) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Chat], sampling: Sampling | None = None, **fields: Any
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[str] | Sequence[Chat],
        sampling: Sampling | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        **fields: Any,
    ) -> Completion | list[Completion]:
        """The completion of a prompt, or the completions of a list of prompts in their order.

        adapter: of `adapters` the name of one, or of one for each prompt of a list (None: the model alone).
        Keywords are the fields of `Sampling`: max_tokens, temperature, top_k, top_p, seed, stop, … Greedy by default.
        Raises ContextTooLong, with the counts, before anything is generated.
        """
        settings = plain(as_sampling(sampling, fields))
        one = is_one(prompt)
        read = [self.read(each) for each in cast(Sequence[Prompt], [prompt] if one else prompt)]
        rows = self.answers([each.ids for each in read], settings, [each.embeds_TD for each in read], adapter)
        answers = [row[0] for row in rows]
        return answers[0] if one else answers

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        embeds: Sequence[Tensor | None] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[list[Completion]]:
        """The `sampling.n` completions of each prompt, given as tokens. A thousand prompts run as full batches.

        embeds: for each prompt what stands in for the embedding of its tokens, or None. adapter: as in `generate`.
        """
        chosen = [None if name is None else self.adapters[name] for name in for_each(adapter, len(prompts))]
        engine = self.engine(max(sampling.beams, min(self.slots, len(prompts) * max(sampling.answers, sampling.beams))))
        if sampling.beams > 1:
            if any(one is not None for one in chosen):
                raise UserError(
                    "a search over beams goes without adapters.", where="adapter", cure="Merge the adapter."
                )
            searched = beams.search(engine, prompts, sampling, embeds)
            return [
                [one.completion(self.tokenizer, prompt) for one in found]
                for prompt, found in zip(prompts, searched, strict=True)
            ]
        for prompt in prompts:
            engine.check(prompt, sampling)
        # Neighbours of equal length waste no padding, and answers of one batch then end at about the same time.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        given = embeds or [None] * len(prompts)
        requests = {engine.add(prompts[at], sampling, given[at], adapter=chosen[at]): at for at in order}
        results: list[list[Answer]] = [[Answer() for _ in range(sampling.answers)] for _ in prompts]
        while not engine.idle:
            for event in engine.step():
                results[requests[event.request]][event.index].add(event)
        if sampling.answers > sampling.n:
            results = [[row[at] for at in best([one.logprobs for one in row], sampling.n)] for row in results]
        return [
            [answer.completion(len(prompt)) for answer in row] for prompt, row in zip(prompts, results, strict=True)
        ]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, adapter: str | None = None, **fields: Any
    ) -> Generator[str, None, None]:
        """The pieces of the completion's text, as they come; of the best of several (`best_of`, `beams`) the whole, known at the end only.
        Closing the iterator cancels the rest. adapter: as in `generate`."""
        settings, read = plain(as_sampling(sampling, fields)), self.read(prompt)
        if settings.answers > 1 or settings.beams > 1:
            yield self.generate(prompt, settings, adapter=adapter).text
            return
        for event in self.events(read.ids, settings, read.embeds_TD, adapter):
            if event.text:
                yield event.text

    def events(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        embeds_TD: Tensor | None = None,
        adapter: str | None = None,
    ) -> Iterator[Event]:
        """The engine's events for one prompt, of all answers that are written. Several may be open at once: they share one engine
        and one batch."""
        chosen = None if adapter is None else self.adapters[adapter]
        with self.lock:
            state = weights_state(self.shapes)
            # Also what the cache holds of earlier prompts is of the weights it was made with.
            if self._engine is None or (self._engine.idle and self._engine_state != state):
                self._engine, self._engine_state = self.engine(min(self.slots, 8)), state
            engine = self._engine
            request = engine.add(prompt, sampling, embeds_TD, adapter=chosen)
            queue = self._events[request] = deque()
        open_answers = sampling.answers
        try:
            while open_answers:
                with self.lock:
                    if not queue:
                        for event in engine.step():
                            self._events[event.request].append(event)
                    ready = list(queue)
                    queue.clear()
                for event in ready:
                    open_answers -= event.finish_reason is not None
                    yield event
        finally:
            with self.lock:
                engine.cancel(request)
                del self._events[request]

    @torch.inference_mode()
    def logits(self, ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, V) float32: for the next token, or, of an encoder, for the token at each place.

        `mask` is True for real tokens. Raises UserError where there is no head for it.
        """
        if self.shapes.task != "masked_lm":
            self.writer()
        return self.decoder.logits(self._forward(ids, mask)).float()

    @torch.inference_mode()
    def hidden(self, ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, D) final hidden states, after the last norm. `mask` is True for real tokens."""
        return self._forward(ids, mask)

    @torch.inference_mode()
    def embed(self, texts: str | Sequence[str]) -> Tensor:
        """(N, D) float32, a vector of each text: made as the model's files say (sentence-transformers' modules.json), else the
        mean of its final hidden states, scaled to length 1."""
        texts = [texts] if isinstance(texts, str) else texts
        # The vector of a last token is that of the token that ends the text.
        whole = self.tokenizer.document if self.pooling.kind == "last" else self.prompt_ids
        return self.embed_ids([whole(text) for text in texts])

    @torch.inference_mode()
    def embed_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """`embed` for texts that are tokens already. Raises ContextTooLong."""
        rows = torch.empty(len(ids), self.shapes.config.hidden_size)
        kind, normalize = self.pooling.kind, self.pooling.normalize
        for chosen, hidden_BTD in self._batches(ids):
            for index, hidden_TD in zip(chosen, hidden_BTD, strict=True):
                rows[index] = pool(hidden_TD[None, : len(ids[index])], kind=kind, normalize=normalize)[0].cpu()
        return rows

    @property
    def headed(self) -> Headed:
        """What its head reads: `classify`, `tag`, `entities`, `answer`, each for the task it was made for."""
        return Headed(self.decoder, self.tokenizer, where=self.name)

    @overload
    def classify(self, texts: str, pairs: str | None = None) -> dict[str, float]: ...  # type: ignore[overload-overlap]
    @overload
    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[dict[str, float]]: ...
    def classify(
        self, texts: str | Sequence[str], pairs: str | Sequence[str] | None = None
    ) -> dict[str, float] | list[dict[str, float]]:
        """The probability of each label for a text (or for each), the likeliest first. UserError without a sequence head."""
        if isinstance(texts, str):
            return self.headed.classify([texts], None if pairs is None else [str(pairs)])[0]
        return self.headed.classify(texts, pairs)

    @overload
    def entities(self, texts: str) -> list[Entity]: ...  # type: ignore[overload-overlap]
    @overload
    def entities(self, texts: Sequence[str]) -> list[list[Entity]]: ...
    def entities(self, texts: str | Sequence[str]) -> list[Entity] | list[list[Entity]]:
        """Names and other stretches of a text (or of each) with their characters. UserError without a token head."""
        return self.headed.entities([texts])[0] if isinstance(texts, str) else self.headed.entities(texts)

    def answer(self, question: str, context: str, **fields: Any) -> Found | Completion:
        """The stretch of `context` that answers, by a span head; without one, what the model writes when asked."""
        if self.shapes.task is None and isinstance(self.shapes, Decoder):
            return self._asked("answer", [context], fields, question=question)[0]
        if fields:
            raise UserError("a span head points and writes nothing.", where=", ".join(fields), cure="Leave it out.")
        return self.headed.answer(question, context)

    def translate(self, texts: Sequence[str], *, source: str, target: str, **fields: Any) -> list[Completion]:
        """Each text in another language; languages by name or ISO code. `fields` are those of `Sampling`."""
        return self._asked("translate", texts, fields, source=asking.language(source), target=asking.language(target))

    def summarize(self, texts: Sequence[str], **fields: Any) -> list[Completion]:
        """Each text in short."""
        return self._asked("summarize", texts, fields)

    def _asked(self, kind: str, texts: Sequence[str], fields: dict[str, Any], **words: str) -> list[Completion]:
        self.writer()
        shape: asking.Shape = "form" if self.tokenizer.template is None else "chat"
        asked = asking.prompts(kind, shape, texts, **words)
        if not asked:
            return []
        room = self.context - max(len(self.prompt_ids(prompt)) for prompt in asked)
        found: list[Completion] = self.generate(asked, asking.settings(kind, shape, room, fields))
        return found

    def score(self, prompt: Prompt, continuation: str) -> tuple[float, ...]:
        """The natural log-probability of each token of `continuation` after `prompt`; their sum is the text's."""
        return self.scores([(prompt, continuation)])[0]

    @torch.inference_mode()
    def scores(self, pairs: Iterable[tuple[Prompt, str]]) -> list[tuple[float, ...]]:
        """`score` of many (prompt, continuation) pairs, in batches of similar length. Raises ContextTooLong."""
        self.writer()
        split = [self.continuation_ids(prompt, continuation) for prompt, continuation in pairs]
        results: list[tuple[float, ...]] = [()] * len(split)
        # The last token predicts nothing that is asked for.
        for chosen, hidden_BTD in self._batches([[*prompt, *rest][:-1] for prompt, rest in split]):
            for index, hidden_TD in zip(chosen, hidden_BTD, strict=True):
                prompt, rest = split[index]
                first = len(prompt) - 1
                logprobs_TV = self.decoder.logits(hidden_TD[first : first + len(rest)]).float().log_softmax(-1)
                ids_T = torch.tensor(rest, device=logprobs_TV.device)
                results[index] = tuple(logprobs_TV.gather(-1, ids_T[:, None])[:, 0].tolist())
        return results

    def continuation_ids(self, prompt: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of the prompt and those that the continuation adds.

        Raw text is encoded as a whole and cut where the prompt ends, so that the tokens are those of natural text; spaces
        at the end of the prompt belong to the continuation, for tokens begin with their space.
        """
        if not isinstance(prompt, str):
            read = self.read(prompt)
            if read.embeds_TD is not None:
                raise UserError("a continuation after images can't be scored.", where="prompt")
            return read.ids, self.tokenizer.encode(continuation)
        stem = prompt.rstrip(" ")
        ids = self.prompt_ids(stem)
        whole = self.prompt_ids(prompt + continuation)
        if whole[: len(ids)] != ids or not stem:
            return ids, self.tokenizer.encode(prompt[len(stem) :] + continuation)
        return ids, whole[len(ids) :]

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """(which rows, their hidden states (B, T, D)) in batches of similar length, padded on the right."""
        for row in ids:
            if len(row) > self.context:
                raise ContextTooLong(len(row), 0, self.context)
            if not row:
                raise UserError("a text has no tokens.", where="input")
        order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
        while order:
            width = len(ids[order[0]])
            chosen, order = order[: max(1, FORWARD_TOKENS // width)], order[max(1, FORWARD_TOKENS // width) :]
            mask = torch.arange(width) < torch.tensor([len(ids[index]) for index in chosen])[:, None]
            yield chosen, self._forward([[*ids[index], *[0] * (width - len(ids[index]))] for index in chosen], mask)

    def _forward(self, ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None) -> Tensor:
        tokens_BT = torch.as_tensor(ids, dtype=torch.int64, device=self.decoder.device)
        if tokens_BT.shape[-1] > self.context:
            raise ContextTooLong(tokens_BT.shape[-1], 0, self.context)
        if mask is None or bool(mask.all()):
            return cast(Tensor, self.decoder(tokens_BT))
        mask_BT = mask.to(tokens_BT.device, torch.bool)
        if isinstance(self.decoder, Encoder):
            return cast(Tensor, self.decoder(tokens_BT, mask_BT=mask_BT))
        if bool((mask_BT[:, :-1] >= mask_BT[:, 1:]).all()):
            return cast(Tensor, self.decoder(tokens_BT))  # what stands on the right, a causal model never sees
        positions_BT = (mask_BT.cumsum(1) - 1).masked_fill(~mask_BT, -1)
        return cast(Tensor, self.decoder(tokens_BT, positions_BT=positions_BT))
