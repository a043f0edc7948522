"""The choice of a token on the native kernels: for greedy and plainly tempered rows, where the distribution isn't cut."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ownlm.kernels import library as lib


def able(logits_BV: Tensor) -> bool:
    """True where `choose` can read these logits."""
    there = logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32
    return there and logits_BV.stride(-1) == 1 and lib.library() is not None


def choose(logits_BV: Tensor, temperatures: Sequence[float], uniform: Sequence[float]) -> tuple[list[int], list[float]]:
    """Each row's token and its log-probability at temperature 1. Temperature 0 takes the largest logit, the first of equals;
    otherwise the token at which the running sum of exp(logit / temperature) passes uniform * total, uniform in [0, 1)."""
    found = lib.library()
    assert found is not None, "ask `able` first"
    rows, vocab_size = logits_BV.shape
    ids, logprobs = np.empty(rows, np.int32), np.empty(rows, np.float32)
    temperature, drawn = np.asarray(temperatures, np.float32), np.asarray(uniform, np.float64)
    found.ownlm_choose(
        lib.instruction_set().encode(),
        torch.get_num_threads(),
        rows,
        vocab_size,
        logits_BV.stride(0),
        logits_BV.data_ptr(),
        *(array.ctypes.data for array in (temperature, drawn, ids, logprobs)),
    )
    return ids.tolist(), logprobs.tolist()
