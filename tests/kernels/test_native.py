"""The native step against the PyTorch modules it was packed from, for every decoder there is a reference of."""

import numpy as np
import pytest
import torch
from references import CONFIGS, difference, make_loud
from torch import Tensor

from ownlm.kernels import library
from ownlm.kernels.native import KV, PAGE, Batch, Kind, NativeDecoder, unsupported
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
LENGTH = 160
BAR = 1e-4
NEARLY: dict[KV, float] = {
    "bf16": 0.03,
    "int8": 0.08,
}  # |Δ| of a row of logits as a share of it; loud weights make rounding visible


def decoder(name: str) -> Decoder:
    config, family = from_hf(CONFIGS[name])
    model = family.build(config, CONFIGS[name])
    make_loud(model)
    assert isinstance(model, Decoder)
    return model.eval()


def batch(
    tokens: Tensor, positions: range, sequence: int, pages_SP: np.ndarray, *, wanted: str = "all", long: bool = False
) -> Batch:
    count = len(positions)
    return Batch(
        token_R=tokens[positions.start : positions.stop].numpy().astype(np.int32),
        sequence_R=np.full(count, sequence, np.int32),
        position_R=np.arange(positions.start, positions.stop, dtype=np.int32),
        wanted_R=np.ones(count, np.int32) if wanted == "all" else np.zeros(count, np.int32),
        long_R=np.full(count, long, np.int32),
        pages_SP=pages_SP,
    )


def shuffled_pages(sequences: int, length: int) -> np.ndarray:
    """Page tables in which no sequence's pages are neighbours."""
    each = -(-length // PAGE)
    return np.random.default_rng(0).permutation(sequences * each).reshape(sequences, each).astype(np.int32)


def logits(
    native: NativeDecoder, tokens: Tensor, pieces: list[int], *, long: bool = False, kv: KV | None = None
) -> Tensor:
    """Of all tokens, read in pieces of the given lengths."""
    pages = shuffled_pages(2, len(tokens))
    cache, out, at = native.cache(pages.size, kv), [], 0
    for piece in pieces:
        found = native.step(cache, batch(tokens, range(at, at + piece), 1, pages, long=long))
        out.append(found)
        at += piece
    return torch.cat(out)


@pytest.mark.parametrize("instruction_set", library.instruction_sets())
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_modules(name: str, instruction_set: str) -> None:
    model = decoder(name)
    assert unsupported(model) is None
    tokens = torch.randint(model.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        reference = model.logits(model(tokens[None]))[0]
    native = NativeDecoder(model, "f32", instruction_set=instruction_set)
    # A long prompt in uneven pieces, then token by token.
    ours = logits(native, tokens, [90, 37, 1, 9, *[1] * 23], long=True)
    assert difference(ours, reference) <= BAR, name


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "uint4", "fp8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "gpt-oss"])
def test_every_instruction_set_gives_the_same_quantised_logits(name: str, kind: Kind) -> None:
    model = decoder(name)
    tokens = torch.randint(model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    first, *others = [
        logits(NativeDecoder(model, kind, instruction_set=each), tokens, [33, 7]) for each in library.instruction_sets()
    ]
    for other in others:
        # Sums in another order now and then round an activation to its neighbour, which loud weights make visible.
        cosine = torch.nn.functional.cosine_similarity(first, other, dim=-1)
        assert cosine.min() > 0.99, (name, kind, cosine.min())


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("instruction_set", library.instruction_sets())
@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_values_in_few_bits_are_nearly_the_same(name: str, instruction_set: str, kv: KV) -> None:
    model = decoder(name)
    tokens = torch.randint(model.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        reference = model.logits(model(tokens[None]))[0]
    native = NativeDecoder(model, "f32", instruction_set=instruction_set)
    ours = logits(native, tokens, [90, 37, 1, 9, *[1] * 23], long=True, kv=kv)
    distance = (ours - reference).norm(dim=-1) / reference.norm(dim=-1)
    assert distance.median() < NEARLY[kv], (name, distance.median())


def test_int8_takes_half_the_memory_of_bf16() -> None:
    native = NativeDecoder(decoder("llama"), "bf16")
    heads = native.padded_head
    assert native.page_bytes("int8") == native.page_bytes("bf16") * (heads + 2) // (2 * heads)
    assert native.page_bytes("f32") == 2 * native.page_bytes("bf16") == 2 * native.page_bytes()


@pytest.mark.parametrize(
    ("kind", "kv"),
    [("f32", None), ("bf16", None), ("int8", None), ("int4", None), ("fp8", None), ("f32", "int8"), ("int8", "int8")],
)
def test_a_row_does_not_depend_on_its_neighbours(kind: Kind, kv: KV | None) -> None:
    model = decoder("mixtral")
    native = NativeDecoder(model, kind)
    tokens = torch.randint(model.config.vocab_size, (50,), generator=torch.Generator().manual_seed(1))
    alone = logits(native, tokens, [50], kv=kv)
    by_one = logits(native, tokens, [1] * 50, kv=kv)
    assert torch.equal(alone, by_one)
    pages = shuffled_pages(9, 50)
    cache = native.cache(pages.size, kv)
    for at in range(50):  # nine sequences, each a token behind the one before
        rows = [(sequence, at - sequence) for sequence in range(9) if at - sequence >= 0]
        found = native.step(
            cache,
            Batch(
                token_R=np.array([int(tokens[position]) for _, position in rows], np.int32),
                sequence_R=np.array([sequence for sequence, _ in rows], np.int32),
                position_R=np.array([position for _, position in rows], np.int32),
                wanted_R=np.ones(len(rows), np.int32),
                long_R=np.zeros(len(rows), np.int32),
                pages_SP=pages,
            ),
        )
        for row, (_, position) in zip(found, rows, strict=True):
            assert torch.equal(row, alone[position])


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "phi2", "gemma3", "mixtral", "gpt-oss"])
def test_rows_that_stop_between_layers_go_on_where_they_were(name: str) -> None:
    """A prompt goes through one layer a step, beside another sequence that writes; both get the numbers they get alone."""
    model = decoder(name)
    native, layers = NativeDecoder(model, "bf16"), model.config.num_layers
    tokens = torch.randint(model.config.vocab_size, (60,), generator=torch.Generator().manual_seed(1))
    alone = logits(native, tokens, [60])
    pages, pieces = shuffled_pages(2, 60), [range(0, 33), range(33, 60)]
    cache, writes, reads = native.cache(pages.size), [], []
    for piece in pieces:
        for layer in range(layers):
            writer, last = len(writes), layer == layers - 1
            found = native.step(
                cache,
                Batch(
                    token_R=np.concatenate([tokens[writer : writer + 1], tokens[piece.start : piece.stop]]).astype(
                        np.int32
                    ),
                    sequence_R=np.array([0, *[1] * len(piece)], np.int32),
                    position_R=np.array([writer, *piece], np.int32),
                    wanted_R=np.array([1, *[last] * len(piece)], np.int32),
                    long_R=np.zeros(1 + len(piece), np.int32),
                    pages_SP=pages,
                    partial=len(piece),
                    layers=range(layer, layer + 1),
                ),
            )
            writes.append(found[:1])
            reads.append(found[1:])
    assert torch.equal(torch.cat(reads), alone)
    assert torch.equal(torch.cat(writes), alone[: len(writes)])
