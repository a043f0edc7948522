"""The compiled kernels, found or built: the installed library, one built earlier, or one built now.

Where there is none, `missing()` says why and everything runs on PyTorch, slower and with the same results.
"""

import ctypes
import functools
import subprocess
from pathlib import Path

from ownlm import device
from ownlm.kernels import build

INT, FLOAT, LONG, POINTER = ctypes.c_int32, ctypes.c_float, ctypes.c_int64, ctypes.c_void_p


class ModelSpec(ctypes.Structure):
    """Mirrors `ModelSpec` of cpu/model.h."""

    _fields_ = tuple((name, INT) for name in "hidden layers heads_d rotaries kv_heads".split()) + tuple(
        (name, FLOAT) for name in "embed_scale logit_scale logit_softcap".split()
    )


class LayerSpec(ctypes.Structure):
    """Mirrors `LayerSpec` of cpu/model.h."""

    _fields_ = (
        *((name, INT) for name in "heads kv_heads qk_norm window rotary".split()),
        *((name, FLOAT) for name in "scale softcap".split()),
        *((name, INT) for name in "norms residual activation gated experts per_token renormalise centred".split()),
        *((name, FLOAT) for name in "limit up_offset eps".split()),
    )


class Rows(ctypes.Structure):
    """Mirrors `Rows` of cpu/model.h."""

    _fields_ = (
        *((name, INT) for name in "count pages_of_each partial from_layer to_layer".split()),
        *((name, POINTER) for name in "token sequence position wanted is_long embeds pages logits".split()),
        *((name, POINTER) for name in "adapter adapters".split()),
        ("adapter_count", LONG),
    )


# name: (result, arguments)
FUNCTIONS = {
    "ownlm_instruction_sets": (ctypes.c_char_p, ()),
    "ownlm_new": (POINTER, (POINTER, ctypes.c_char_p, INT)),
    "ownlm_delete": (None, (POINTER,)),
    "ownlm_layer": (None, (POINTER, INT, POINTER)),
    "ownlm_rotary": (None, (POINTER, INT, INT, INT, POINTER, POINTER, POINTER, POINTER)),
    "ownlm_vector": (None, (POINTER, INT, INT, LONG, POINTER, POINTER, FLOAT, INT)),
    "ownlm_matrix": (INT, (POINTER, INT, INT, INT, INT, INT, INT, POINTER)),
    "ownlm_pack": (None, (POINTER, *[INT] * 6, *[POINTER] * 3)),
    "ownlm_tie": (None, (POINTER,)),
    "ownlm_bytes": (LONG, (POINTER,)),
    "ownlm_cache_new": (POINTER, (POINTER, INT, INT)),
    "ownlm_cache_delete": (None, (POINTER,)),
    "ownlm_cache_copy": (None, (POINTER, INT, INT)),
    "ownlm_step": (INT, (POINTER, POINTER, POINTER)),
    "ownlm_adapter_new": (POINTER, (INT,)),
    "ownlm_adapter_pair": (INT, (POINTER, *[INT] * 7, POINTER, POINTER)),
    "ownlm_adapter_head": (INT, (POINTER, INT, INT, INT, POINTER, POINTER)),
    "ownlm_adapter_bytes": (LONG, (POINTER,)),
    "ownlm_adapter_delete": (None, (POINTER,)),
    "ownlm_linear_new": (POINTER, (ctypes.c_char_p, *[INT] * 5, *[POINTER] * 4)),
    "ownlm_linear_delete": (None, (POINTER,)),
    "ownlm_linear_bytes": (LONG, (POINTER,)),
    "ownlm_linear": (INT, (POINTER, INT, POINTER, POINTER)),
    "ownlm_feed_forward": (INT, (POINTER, POINTER, POINTER, INT, FLOAT, FLOAT, INT, POINTER, POINTER)),
    "ownlm_read": (ctypes.c_uint64, (INT, POINTER, LONG)),
    "ownlm_choose": (None, (ctypes.c_char_p, INT, INT, INT, LONG, *[POINTER] * 6)),
}


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    if device.kernels() == "off":
        return None, "OWNLM_KERNELS=off"
    try:
        name = build.file_name()
        folders = (Path(build.__file__).parent, device.cache_folder())
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        library = ctypes.CDLL(str(path or build.build(device.cache_folder())))
        for function, (result, arguments) in FUNCTIONS.items():
            getattr(library, function).restype, getattr(library, function).argtypes = result, arguments
    except subprocess.CalledProcessError as fault:
        return None, f"the compiler failed: {(fault.stderr or str(fault)).strip().splitlines()[0][:200]}"
    except OSError as fault:
        return None, str(fault)
    return library, ""


def library() -> ctypes.CDLL | None:
    return _found()[0]


def missing() -> str:
    """Why there is no library; empty where there is one."""
    return _found()[1]


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """What the library has for this processor, best first."""
    found = library()
    return tuple(found.ownlm_instruction_sets().decode().split()) if found else ()


def instruction_set() -> str:
    """The one that runs: the best, or `$OWNLM_KERNELS` where this processor has it."""
    names = instruction_sets()
    return device.kernels() if device.kernels() in names else names[0]
