"""The choice of a token on the native kernels: for greedy and plainly tempered rows, where the distribution isn't cut."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ownlm.kernels import library as lib


def able(logits_BV: Tensor) -> bool:
    """True where `choose` can read these logits."""
    there = logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32
    return there and logits_BV.stride(-1) == 1 and lib.library() is not None


def choose(
    logits_BV: Tensor, places: Sequence[int], temperatures: Sequence[float], uniform: Sequence[float]
) -> tuple[list[int], list[float]]:
    """The token of each row that stands at one of `places`, and its log-probability at temperature 1. Temperature 0 takes the largest
    logit, the first of equals; otherwise the token at which the running sum of exp(logit / temperature) passes uniform * total,
    uniform in [0, 1)."""
    found = lib.library()
    assert found is not None, "ask `able` first"
    rows, (height, vocab_size) = len(places), logits_BV.shape
    assert len(temperatures) == len(uniform) == rows, f"{rows} places"
    assert all(0 <= place < height for place in places), places
    integers, floats = ctypes.c_int32 * rows, ctypes.c_float * rows
    ids, logprobs = integers(), floats()
    found.ownlm_choose(
        lib.instruction_set().encode(),
        torch.get_num_threads(),
        rows,
        vocab_size,
        logits_BV.stride(0),
        logits_BV.data_ptr(),
        integers(*places),
        floats(*temperatures),
        (ctypes.c_double * rows)(*uniform),
        ids,
        logprobs,
    )
    return list(ids), list(logprobs)
