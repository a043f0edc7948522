"""What ranks say to each other comes over whole."""

import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ownlm.errors import UserError
from ownlm.generate import follower
from ownlm.generate.follower import Part
from ownlm.generate.torch_runner import Line

INTS = st.lists(st.integers(0, 2**40), max_size=9)
LINES = st.builds(Line, tokens=INTS, start=st.integers(0, 99), pages=INTS, wanted=st.integers(0, 9), long=st.booleans())


@given(lines=st.lists(LINES, max_size=5), runner=st.integers(0, 9))
def test_the_lines_of_a_step_come_over_whole(lines: list[Line], runner: int) -> None:
    pipe = io.BytesIO()
    follower.write(pipe, follower.pack_step(runner, lines))
    follower.write(pipe, [1, 2])
    pipe.seek(0)
    numbers = follower.read(pipe)
    assert numbers is not None
    assert numbers[:2] == [follower.STEP, runner]
    rest = iter(numbers[2:])
    assert list(follower.unpack_lines(rest)) == lines
    assert not list(rest)
    assert follower.read(pipe) == [1, 2]
    assert follower.read(pipe) is None


def test_a_plain_forward_comes_over_with_its_positions() -> None:
    tokens = torch.arange(6).view(2, 3)
    assert follower.pack_forward(tokens, None) == [follower.FORWARD, 2, 3, 0, *range(6)]
    positions = torch.tensor([[-1, 0, 1]])
    assert follower.pack_forward(tokens, positions) == [follower.FORWARD, 2, 3, 1, *range(6), -1, 0, 1, -1, 0, 1]


def test_a_follower_is_told_which_part_it_is() -> None:
    part = Part(path="p", rank=1, size=2, dtype="float32", device="cpu", store="s", threads=1, timeout_s=9)
    assert Part(**json.loads(follower.settings(part))) == part


def test_a_fault_of_a_follower_is_one_line() -> None:
    """As where there is no checkpoint; the pipe has ended before anything else was said."""
    said: list[dict[str, object]] = []
    part = Part(
        path="/nowhere",
        rank=1,
        size=2,
        dtype="float32",
        device="cpu",
        store="s",
        threads=torch.get_num_threads(),
        timeout_s=9,
    )
    with pytest.raises(UserError, match="/nowhere"):
        follower.live(io.BytesIO(follower.settings(part)), lambda **words: said.append(words))
    assert not said
