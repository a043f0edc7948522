"""Adapters beside the weights in the native step: the merged model's numbers, whoever else is in the batch."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from references import CONFIGS, difference
from torch import Tensor

from kernels.test_native import BAR, decoder, shuffled_pages
from ownlm.adapters.lora import Learned, Pair, attach, base_of, matching, merge, use_adapter
from ownlm.errors import UserError
from ownlm.kernels import library
from ownlm.kernels.adapters import NativeAdapter, joined
from ownlm.kernels.native import Batch, Kind, NativeDecoder
from ownlm.models.decoder import Decoder

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.missing()}")
LENGTH = 45
KINDS: tuple[Kind, ...] = ("f32", "bf16", "int8", "int4", "uint4", "fp8")


def learned(model: Decoder, rank: int, seed: int, targets: tuple[str, ...] | str = "all-linear") -> Learned:
    """A loud adapter; where the model has a head of its own, odd seeds train that whole too."""
    generator = torch.Generator().manual_seed(seed)

    def pair(name: str) -> Pair:
        layer = base_of(model, name)
        A_rI = torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5
        B_Or = torch.randn(layer.out_features, rank, generator=generator) * rank**-0.5
        return Pair(A_rI, B_Or, alpha=rank * 0.7, rslora=False)

    whole: dict[str, Tensor] = {}
    if seed % 2 and model.lm_head is not None:
        for name, parameter in model.lm_head.named_parameters(prefix="lm_head"):
            whole[name] = parameter.detach() + torch.randn(parameter.shape, generator=generator) * 0.1
    return Learned(pairs={name: pair(name) for name in matching(model, targets)}, whole=whole)  # type: ignore[arg-type]


def merged(model: Decoder, adapter: Learned) -> Decoder:
    """The adapter in the weights of a copy."""
    changed = copy.deepcopy(model)
    for name, pair in adapter.pairs.items():
        attach(changed, name, "one", pair)
    use_adapter(changed, "one")
    merge(changed)
    with torch.no_grad():
        for name, value in adapter.whole.items():
            changed.get_parameter(name).copy_(value)
    return changed


def ask(
    native: NativeDecoder,
    adapters: Sequence[NativeAdapter],
    texts: Sequence[tuple[Tensor, int]],
    pieces: Sequence[int] = (LENGTH,),
) -> list[Tensor]:
    """The logits of each text under its adapter (-1: none), all texts in the same steps, each read in these pieces."""
    pages = shuffled_pages(len(texts), LENGTH)
    cache, at = native.cache(pages.size), 0
    out: list[list[Tensor]] = [[] for _ in texts]
    for piece in pieces:
        rows = piece * len(texts)
        found = native.step(
            cache,
            Batch(
                token_R=torch.cat([tokens[at : at + piece] for tokens, _ in texts]).numpy().astype(np.int32),
                sequence_R=np.repeat(np.arange(len(texts), dtype=np.int32), piece),
                position_R=np.tile(np.arange(at, at + piece, dtype=np.int32), len(texts)),
                wanted_R=np.ones(rows, np.int32),
                long_R=np.zeros(rows, np.int32),
                pages_SP=pages,
                adapter_R=np.repeat(np.array([number for _, number in texts], np.int32), piece),
                adapters=adapters,
            ),
        )
        for index, part in enumerate(found.split(piece)):
            out[index].append(part)
        at += piece
    return [torch.cat(parts) for parts in out]


def text(model: Decoder, seed: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("instruction_set", library.instruction_sets())
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_beside_others_are_those_of_the_merged_model(name: str, instruction_set: str) -> None:
    model = decoder(name)
    every = [learned(model, 5, 1), learned(model, 40, 2), learned(model, 3, 3, ("o_proj",))]
    native = NativeDecoder(model, "f32", instruction_set=instruction_set)
    adapters = [NativeAdapter(native, one) for one in every]
    tokens = text(model, 1)
    order = (1, -1, 0, 2, 1)
    found = ask(native, adapters, [(tokens, number) for number in order], pieces=[30, 1, 14])
    with torch.inference_mode():
        plain = model.logits(model(tokens[None]))[0]
        for number, ours in zip(order, found, strict=True):
            changed = model if number < 0 else merged(model, every[number])
            reference = changed.logits(changed(tokens[None]))[0]
            assert difference(ours, reference) <= BAR, (name, number)
            assert number < 0 or difference(reference, plain) > 0.05, "an adapter that says nothing tests nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "mixtral"])
def test_a_row_is_the_same_alone_and_beside_fifteen_with_other_adapters(name: str, kind: Kind) -> None:
    model = decoder(name)
    native = NativeDecoder(model, kind)
    adapters = [NativeAdapter(native, learned(model, rank, rank)) for rank in (3, 8, 17, 64)]
    texts = [(text(model, seed), seed % 5 - 1) for seed in range(16)]
    together = ask(native, adapters, texts, pieces=[20, *[1] * 9, 16])
    for (tokens, number), beside in zip(texts, together, strict=True):
        chosen = adapters[number : number + 1] if number >= 0 else []
        alone = ask(native, chosen, [(tokens, min(number, 0))])[0]
        assert torch.equal(alone, beside), (kind, number)
    # Rows without an adapter don't know that there are any.
    assert torch.equal(ask(native, [], [texts[0]])[0], together[0])


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_beside_coarser_weights_an_adapter_is_kept_in_bf16(kind: Kind) -> None:
    model = decoder("llama")
    native = NativeDecoder(model, kind)
    adapter = learned(model, 8, 2)
    packed = NativeAdapter(native, adapter)
    exact = NativeAdapter(NativeDecoder(model, "f32"), adapter)
    assert 0 < packed.memory_bytes < exact.memory_bytes
    tokens = text(model, 1)
    ours = ask(native, [packed], [(tokens, 0)])[0]
    with torch.inference_mode():
        changed = merged(model, adapter)
        reference = changed.logits(changed(tokens[None]))[0]
    assert torch.nn.functional.cosine_similarity(ours, reference, dim=-1).mean() > 0.995


def test_pairs_are_joined_only_where_that_costs_nothing() -> None:
    generator = torch.Generator().manual_seed(0)

    def part(at: int, rank: int, outputs: int = 32) -> tuple[int, Tensor, Tensor]:
        return at, torch.randn(rank, 8, generator=generator), torch.randn(outputs, rank, generator=generator)

    x_I = torch.randn(8, generator=generator)

    def applied(parts: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
        y = torch.zeros(96)
        for at, A_rI, B_Or in parts:
            y[at : at + len(B_Or)] += B_Or @ (A_rI @ x_I)
        return y

    wide, narrow, uneven = [part(0, 40), part(64, 40)], [part(0, 4), part(64, 4)], [part(0, 40), part(37, 40)]
    first = part(0, 40)
    shared = [first, (32, first[1], part(32, 40)[2])]
    for parts, count in ((wide, 2), (narrow, 1), (uneven, 1), (shared, 1), ([part(0, 4)], 1)):
        made = joined(parts)
        assert len(made) == count
        torch.testing.assert_close(applied(made), applied(parts), atol=1e-4, rtol=1e-4)
    assert joined(shared)[0][1].shape == (40, 8)


def test_what_the_step_has_no_place_for_is_refused() -> None:
    model = decoder("llama")
    pair = Pair(torch.zeros(2, 32), torch.zeros(32, 2), alpha=1, rslora=False)
    with pytest.raises(UserError, match="an adapter of score can't run beside the base"):
        NativeAdapter(NativeDecoder(model), Learned(pairs={"score": pair}, whole={}))


def test_rows_that_stop_between_layers_keep_their_adapter() -> None:
    """A piece of a prompt goes through one layer in each step, beside a row of the same adapter that goes through all."""
    model = decoder("llama")
    native = NativeDecoder(model, "f32")
    adapters = [NativeAdapter(native, learned(model, 6, seed)) for seed in (2, 4)]
    tokens, other = text(model, 1), text(model, 2)
    whole = ask(native, adapters, [(tokens, 0), (other, 0)])
    pages = shuffled_pages(2, LENGTH)
    cache = native.cache(pages.size)
    piece = 20
    for layer in range(2):
        rows = 1 + piece
        wanted = np.zeros(rows, np.int32)
        wanted[0] = 1
        wanted[1:] = layer == 1
        found = native.step(
            cache,
            Batch(
                token_R=torch.cat([other[layer : layer + 1], tokens[:piece]]).numpy().astype(np.int32),
                sequence_R=np.array([1] + [0] * piece, np.int32),
                position_R=np.array([layer, *range(piece)], np.int32),
                wanted_R=wanted,
                long_R=np.zeros(rows, np.int32),
                pages_SP=pages,
                partial=piece,
                layers=range(layer, layer + 1),
                adapter_R=np.zeros(rows, np.int32),
                adapters=adapters,
            ),
        )
        assert torch.equal(found[0], whole[1][layer])
    assert torch.equal(found[1:], whole[0][:piece])
