"""The codec: text <-> token ids, and conversations -> ids with the mask of what is trained.

    text ─────────────────► encode ──► ids            never a special token, whatever the text spells out
    document ─────────────► document ► [begin] ids end
    messages ─► template ─► chat ────► ids, trained    special tokens come from the template only

One object trains, evaluates and serves a model, whatever files its vocabulary came in (`tokens/readers.py`). It saves itself in
Hugging Face layout (tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja), and transformers'
AutoTokenizer gives the same ids from it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ownlm.documents.clean import well_formed
from ownlm.errors import UserError
from ownlm.records import Message, to_json
from ownlm.tokens import files, readers
from ownlm.tokens.convert import SEPARATOR
from ownlm.tokens.files import NAMED, token_text
from ownlm.tokens.patterns import QWEN2
from ownlm.tokens.stream import BYTE_OF, ByteStream, DecodeStream, WindowStream
from ownlm.tokens.template import ChatTemplate

# Which special tokens end a document or a turn, in the families that ownlm loads; the first one present ends documents.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
LINE_START = re.compile(r"(?<=\n)(?=\S)")
PART_CHARACTERS = 50_000  # the tokenizers library takes about a hundred bytes of memory for each byte of one text
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|return|>", "<end_of_turn>", "<turn|>", "<|eom_id|>")


class Tokenizer:
    """A vocabulary with its special tokens and chat template. Nothing in it changes after loading."""

    def __init__(self, backend: Backend, config: Mapping[str, Any], *, stops: Iterable[int] = ()) -> None:
        """`config` is a tokenizer_config.json with the template under "chat_template"; `stops` are further ids that end
        a reply (generation_config.json names them)."""
        self.config = dict(config)
        names = {name: text for name in NAMED if (text := token_text(config.get(name)))}
        missing = [token for token in names.values() if backend.token_to_id(token) is None]
        assert not missing, f"tokenizer_config.json names tokens that tokenizer.json lacks: {missing}"
        backend.encode_special_tokens = True  # from here on the backend never looks for special tokens in text
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self._json = json.loads(backend.to_str())
        byte_level = (self._json["decoder"] or {}).get("type") == "ByteLevel"
        if self._json["model"]["type"] == "Unigram" and self._json["model"].get("unk_id") is None and not byte_level:
            raise UserError(
                "the vocabulary has no token for unknown text.", cure="Restore its files from their source."
            )
        added = {token["content"]: token for token in self._json["added_tokens"] if token["special"]}
        unknown = _unknown_token(self._json["model"])
        # Unigram finds every piece in text, the one for unknown text too, and so does BPE that takes whole words.
        model = self._json["model"]
        self._unknown = unknown if model["type"] == "Unigram" or model.get("ignore_merges") else None
        self.special: dict[str, int] = {
            token: int(backend.token_to_id(token) or 0)
            for token in [*added, *names.values()]
            if token != unknown or token == names.get("eos_token")
        }
        self._special_ids = frozenset(self.special.values())
        # Longest first: <s> would hide <s>2 otherwise. A token may swallow the white space beside it.
        self._special_pattern = re.compile(
            "|".join(
                (r"\s*" if added.get(token, {}).get("lstrip") else "")
                + f"({re.escape(token)})"
                + (r"\s*" if added.get(token, {}).get("rstrip") else "")
                for token in sorted(self.special, key=len, reverse=True)
            )
            or "(?!)"
        )
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        ends = [token for token in DOCUMENT_ENDS if token in self.special]
        ends += [names[name] for name in ("eos_token", "sep_token") if name in names]
        if not ends:
            raise UserError(
                "the tokenizer has no token that ends a document.", cure="Name its eos_token in tokenizer_config.json."
            )
        self.eos_id: int = self.special[ends[0]]
        self.bos_id: int | None = self._bos(names)
        self.pad_id: int = self.special[names["pad_token"]] if names.get("pad_token") in self.special else self.eos_id
        turns = [token for token in (*TURN_ENDS, names.get("eos_token")) if token in self.special]
        self.stop_ids: frozenset[int] = frozenset(
            [self.eos_id, *stops, *(self.special[token] for token in turns if token)]
        )
        source = config.get("chat_template")
        self.template: ChatTemplate | None = None
        if isinstance(source, str):
            stop_texts = [token for token, id in self.special.items() if id in self.stop_ids]
            self.template = ChatTemplate(source, names=names, specials=list(self.special), stops=stop_texts)
        split = json.dumps(QWEN2) in json.dumps(self._json["pre_tokenizer"])
        self._line_safe = split and not self._json["normalizer"] and len(added) == len(self._json["added_tokens"])
        self._only_first = any(
            node["type"] == "Metaspace" and node["prepend_scheme"] == "first" for node in _nodes(self._json)
        )

    def _bos(self, names: Mapping[str, str]) -> int | None:
        """The token that begins every document, if there is one: the recipe for it is the file's post-processor, which
        "add_bos_token" overrules."""
        bos = self.special.get(names.get("bos_token", names.get("cls_token", "")))
        begins = self.config.get("add_bos_token")
        if begins is None:
            begins = bos in self.backend.encode("a", add_special_tokens=True).ids[:1]
        return bos if begins else None

    # Text.

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any special token. A lone surrogate, which no file can hold, counts as U+FFFD."""
        return self._plain(well_formed(text), self.backend)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores; long texts are cut where that changes no id."""
        parts = [self._parts(well_formed(text)) for text in texts]
        flat = [part for text in parts for part in text]
        # Unlike `encode_batch`, this one keeps no offsets: less time and memory.
        found = iter(zip(flat, self.backend.encode_batch_fast(flat, add_special_tokens=False), strict=True))
        return [
            [id for part, encoding in islice(found, len(text)) for id in self._checked(part, encoding.ids)]
            for text in parts
        ]

    def _parts(self, text: str) -> list[str]:
        parts = []
        start = 0
        while self._line_safe and len(text) - start > PART_CHARACTERS:
            cut = next(LINE_START.finditer(text, start + PART_CHARACTERS), None)
            if cut is None:
                break
            parts.append(text[start : cut.start()])
            start = cut.start()
        return [*parts, text[start:]]

    def _plain(self, text: str, backend: Backend) -> list[int]:
        return self._checked(text, backend.encode(text, add_special_tokens=False).ids, backend)

    def _checked(self, text: str, ids: list[int], backend: Backend | None = None) -> list[int]:
        """`ids`, unless the text spells a piece that is no text: then what the vocabulary makes of it without that piece."""
        if self._special_ids.isdisjoint(ids) and (self._unknown is None or self._unknown not in text):
            return ids
        literal = self._literal_inner if backend is not None and backend is not self.backend else self._literal
        found: list[int] = literal.encode(text.replace(SEPARATOR, "\ufffd"), add_special_tokens=False).ids
        return found

    @cached_property
    def _inner(self) -> Backend:
        """The backend that puts no space before a text: for the text after a special token."""
        data = _without_prefix(self._json)
        return self.backend if data is None else _backend(data)

    @cached_property
    def _literal(self) -> Backend:
        return _backend(_without_pieces(self._json, [*self.special, *([self._unknown] if self._unknown else [])]))

    @cached_property
    def _literal_inner(self) -> Backend:
        data = _without_prefix(self._json) or self._json
        return _backend(_without_pieces(data, [*self.special, *([self._unknown] if self._unknown else [])]))

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of the ids; special tokens are left out unless `special`. Broken UTF-8 becomes U+FFFD."""
        text: str = self.backend.decode(ids, skip_special_tokens=not special)
        return text

    def decode_stream(self) -> DecodeStream:
        """A decoder for one reply as it is written."""
        return ByteStream(self._bytes) if self._bytes is not None else WindowStream(self.decode)

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        """The bytes of each id when the decoder is plain byte-level, which lets a stream decode in constant time."""
        if (self._json["decoder"] or {}).get("type") != "ByteLevel":
            return None
        table = [b""] * self.vocab_size
        for token, id in self.backend.get_vocab(with_added_tokens=True).items():
            if id not in self._special_ids:
                known = all(character in BYTE_OF for character in token)
                table[id] = bytes(BYTE_OF[character] for character in token) if known else token.encode()
        return table

    # Documents and conversations.

    def document(self, text: str) -> list[int]:
        """The ids of a whole document: its begin token if the vocabulary has one, the text, the end token."""
        return self.frame(self.encode(text))

    def frame(self, ids: list[int]) -> list[int]:
        """Ids of a text between the tokens that begin and end a document."""
        return [*([] if self.bos_id is None else [self.bos_id]), *ids, self.eos_id]

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[list[int], list[bool]]:
        """(ids, trained) of a conversation: `trained` marks the assistant's words and the token that ends its turn.

        With `add_generation_prompt` the ids end where the assistant begins, and equal what training saw up to there.
        `tools`, `documents` and `variables` (such as enable_thinking=False) reach the template by these names.
        Raises UserError when there is no template, when it refuses the messages, or when it can't tell what to train.
        """
        if self.template is None:
            raise UserError(
                "this tokenizer has no chat template.", cure="Use a chat-tuned checkpoint, or add chat_template.jinja."
            )
        plain = [to_json(message) if isinstance(message, Message) else message for message in messages]
        rendered = self.template.render(
            plain, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt, **variables
        )
        asked = any(message.get("role") == "assistant" for message in plain)
        if asked and not rendered.spans and not add_generation_prompt:
            raise UserError(
                "the chat template doesn't show which part the assistant wrote.",
                cure="Put {% generation %} ... {% endgeneration %} around the assistant's words in chat_template.jinja.",
            )
        return self._encode_rendered(well_formed(rendered.text), rendered.spans, rendered.guard)

    def _encode_rendered(self, text: str, spans: Sequence[tuple[int, int]], guard: str) -> tuple[list[int], list[bool]]:
        """Special tokens by their strings; the text between them, cut at the borders of spans, without looking for any.

        The cut keeps the prompt's last token from merging with the reply's first: at serving only the prompt is there.
        """
        borders = sorted({border for span in spans for border in span} | {len(text)})
        ids: list[int] = []
        trained: list[bool] = []
        position, after_plain = 0, False

        def put(new: list[int], start: int) -> None:
            ids.extend(new)
            trained.extend([any(first <= start < last for first, last in spans)] * len(new))

        def put_plain(end: int) -> None:
            nonlocal position, after_plain
            for border in [*(b for b in borders if position < b < end), end]:
                piece = text[position:border].replace(guard, "")
                if piece:
                    backend = self._inner if after_plain or (self._only_first and ids) else self.backend
                    put(self._plain(piece, backend), position)
                    after_plain = True
                position = border

        for match in self._special_pattern.finditer(text):
            put_plain(match.start())
            put([self.special[match[match.lastindex or 0]]], match.start(match.lastindex or 0))
            position, after_plain = match.end(), False
        put_plain(len(text))
        return ids, trained

    # Files.

    @cached_property
    def digest(self) -> str:
        """A hash of all that decides ids: vocabulary, merges, special tokens, template."""
        # The backend reads floats (Unigram scores) with an error in the last digit, so they count to nine digits only.
        whole = json.loads(self.backend.to_str(), parse_float=lambda digits: f"{float(digits):.9g}")
        parts = [whole, self.template and self.template.source, self.special, self.bos_id, self.eos_id]
        return hashlib.sha256(json.dumps([*parts, sorted(self.stop_ids)], sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the files that `load` and transformers read."""
        path.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        named = {name: text for name in NAMED if (text := token_text(config.get(name)))}
        (path / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        (path / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (path / "special_tokens_map.json").write_text(
            json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if self.template is not None:
            (path / "chat_template.jinja").write_text(self.template.source, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer in a directory, from whichever files it comes in. Raises NotFound or UserError when there is none."""
        backend, config = readers.read(path)
        # A token that only the config declares special must be special to the backend too; one that the vocabulary lacks
        # (GPT-2 files name such) can't be.
        named = {name: text for name in NAMED if (text := token_text(config.get(name)))}
        known = {name: text for name, text in named.items() if backend.token_to_id(text) is not None}
        backend.add_special_tokens(sorted(set(known.values())))
        config = {key: value for key, value in config.items() if key not in named or key in known}
        stops = files.read_json(path / "generation_config.json").get("eos_token_id")
        stops = stops if isinstance(stops, list) else [stops]
        return cls(backend, config, stops=[id for id in stops if isinstance(id, int)])


def _unknown_token(model: Mapping[str, Any]) -> str | None:
    """The token for unknown text, which plain text does yield; byte-level vocabularies have none."""
    if model["type"] == "Unigram":
        return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _nodes(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of the normaliser and of the pre-tokenizer."""
    found: list[dict[str, Any]] = []
    for place, nested in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        node = data[place]
        found += node[nested] if node and node["type"] == "Sequence" else [node] if node else []
    return found


def _without_prefix(whole: dict[str, Any]) -> dict[str, Any] | None:
    """The tokenizer.json of one that puts no space before a text, or None when it never does."""
    data: dict[str, Any] = json.loads(json.dumps(whole))
    changed = False
    for item in _nodes(data):
        match item:
            case {"type": "Prepend"}:
                item["prepend"], changed = "", True
            case {"type": "Metaspace", "prepend_scheme": "first" | "always"}:
                item["prepend_scheme"], changed = "never", True
            case {"type": "ByteLevel", "add_prefix_space": True}:
                item["add_prefix_space"], changed = False, True
    return data if changed else None


def _without_pieces(whole: dict[str, Any], pieces: Iterable[str]) -> dict[str, Any]:
    """The tokenizer.json with these pieces renamed to what no text spells, under their old ids."""
    names = {piece: SEPARATOR + piece for piece in pieces}
    data: dict[str, Any] = json.loads(json.dumps(whole))
    model = data["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    data["post_processor"] = None
    return data


def _backend(data: Mapping[str, Any]) -> Backend:
    backend = Backend.from_str(json.dumps(data))
    backend.encode_special_tokens = True
    return backend
