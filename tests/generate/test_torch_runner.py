"""The modules as a runner: rows of any kind in one step give the logits of the plain forward, and steady tensors change nothing."""

import pytest
import torch
from references import CONFIGS, difference
from test_cache import BAR, alone, loud_decoder, tokens
from torch import Tensor

from ownlm.generate.paged import position_bytes
from ownlm.generate.static import Bucket, Steps, bucket_pages, bucket_rows
from ownlm.generate.torch_runner import Line, TorchRunner, torch_runner
from ownlm.models.decoder import Decoder
from ownlm.quantization.codes import quantize_linears

FAMILIES = ["llama3", "gemma3", "gpt2", "gpt-oss", "mixtral", "phi3-longrope"]


def play(runner: TorchRunner, ids: list[list[int]], steps: list[list[int]], long: list[bool]) -> list[Tensor]:
    """All logits of each text, which is read by so many tokens in each step; texts have pages in turn."""
    width = -(-max(map(len, ids)) // runner.page_tokens)
    done, found = [0] * len(ids), [[] for _ in ids]
    for step in steps:
        rows = [index for index, count in enumerate(step) if count]
        lines = [
            Line(
                tokens=ids[index][done[index] : done[index] + step[index]],
                start=done[index],
                pages=[index + len(ids) * page for page in range(width)],
                wanted=step[index],
                long=long[index],
            )
            for index in rows
        ]
        for index, logits_WV in zip(rows, runner.compute(lines).split([line.wanted for line in lines]), strict=True):
            found[index].append(logits_WV)
            done[index] += step[index]
    return [torch.cat(each) for each in found]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("page", "static"), [(128, False), (16, False), (16, True)])
@torch.inference_mode()
def test_steps_of_reading_and_writing_rows_equal_the_plain_forward(name: str, page: int, static: bool) -> None:
    """One text is beyond LongRope's original context, and turns accordingly from its first token on, beside short ones."""
    model = loud_decoder(name)
    lengths = [30, 120, 12, 50]
    ids = [tokens(1, length)[0].tolist() for length in lengths]
    steps = [[20, 100, 0, 40], [1, 17, 9, 1], *[[1] * 4] * 2, [7, 1, 1, 7]]  # one token of each a step: writing
    runner = TorchRunner(model, pages=4 * (128 // page), page=page, static=static)
    is_long = [name == "phi3-longrope" and length > 100 for length in lengths]
    for text, found in zip(ids, play(runner, ids, steps, is_long), strict=True):
        assert difference(found, alone(model, torch.tensor(text))[: len(found)]) <= BAR
    assert not static or runner.steps is not None


@torch.inference_mode()
def test_a_full_bucket_is_the_same_bits_as_the_step_of_its_own_size() -> None:
    model = loud_decoder("llama3")
    ids = [tokens(1, 40)[0].tolist() for _ in range(4)]
    plain, static = (TorchRunner(model, pages=32, page=8, static=static) for static in (False, True))
    for runner in (plain, static):
        play(runner, ids, [[31] * 4], [False] * 4)
    lines = [
        Line(tokens=[5 + row], start=31, pages=[row + 4 * page for page in range(8)], wanted=1) for row in range(4)
    ]
    one, other = plain.compute(lines), static.compute(lines)
    assert torch.equal(one, other)
    # Three rows run in the bucket of four: the fourth is padding, which nobody sees and which leaves every page as it was.
    before = static.cache.both_L2NKsd[:, :, :-1].clone()
    three = static.compute(lines[:3])
    assert torch.equal(three, other[:3])
    assert torch.equal(static.cache.both_L2NKsd[:, :, :-1], before)
    assert static.steps is not None
    assert list(static.steps.buckets) == [(4, 4, False)]


@torch.inference_mode()
def test_a_bucket_keeps_its_tensors_and_reads_what_they_hold_now() -> None:
    """As the replay of a captured step does: nothing of the first call is left in the second."""
    model = loud_decoder("gemma3")
    runner = TorchRunner(model, pages=16, page=8, static=True)
    ids = [tokens(1, 30)[0].tolist()]
    bucket = Bucket(model, runner.cache, 1, 4, long=False)
    address = bucket.given_BP.data_ptr()
    expected = alone(model, torch.tensor(ids[0]))
    for place, token in enumerate(ids[0]):
        bucket.fill([Line(tokens=[token], start=place, pages=[9, 2, 11, 3], wanted=1)])
        assert difference(bucket.run()[0], expected[place]) <= BAR
    assert bucket.given_BP.data_ptr() == address
    assert bucket.uses == len(ids[0])


@torch.inference_mode()
def test_lines_that_want_nothing_get_nothing() -> None:
    runner = TorchRunner(loud_decoder("llama3"), pages=8, page=8, static=True)
    lines = [Line(tokens=[3, 4], start=0, pages=[0], wanted=0), Line(tokens=[5], start=0, pages=[1], wanted=0)]
    assert runner.compute(lines).shape == (0, 97)


def test_what_asks_the_device_on_the_way_is_no_static_step() -> None:
    assert Steps.possible(loud_decoder("llama3"))
    assert not Steps.possible(loud_decoder("mixtral"))
    quantised = loud_decoder("llama3")
    quantize_linears(quantised, "int4")
    assert not Steps.possible(quantised)


def test_buckets_hold_what_they_are_asked_for() -> None:
    assert [bucket_rows(count) for count in (1, 2, 3, 5, 8, 9, 16, 17)] == [1, 2, 4, 8, 8, 16, 16, 24]
    assert [bucket_pages(count) for count in (1, 2, 3, 5, 9)] == [1, 2, 4, 8, 16]
    assert all(bucket_rows(n) >= n and bucket_pages(n) >= n for n in range(1, 300))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_cache_is_within_the_room_and_holds_one_sequence_at_least(name: str) -> None:
    model: Decoder = loud_decoder(name)
    assert name in CONFIGS
    one = 100 * position_bytes(model.config, torch.float32)
    assert torch_runner(model, slots=6, context=100).pages == 6
    assert torch_runner(model, slots=6, context=100, room=3 * one + 1).pages == 3
    assert torch_runner(model, slots=6, context=100, room=0).pages == 1
