"""Runs inside the environment that has llama-cpp-python: a GGUF file in another mixture of types, as llama.cpp makes it.

    python llama_cpp_quantize.py FROM.gguf TO.gguf FTYPE

FTYPE is llama.cpp's number of a mixture: 15 is Q4_K_M, 17 Q5_K_M, 18 Q6_K.
"""

import ctypes
import sys
from typing import Any

import llama_cpp


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    if level >= 4:  # errors
        sys.stderr.write(text.decode(errors="replace"))


llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(settings)))
