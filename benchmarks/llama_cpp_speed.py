"""Times llama.cpp for generate_speed.py. Runs in an environment that has llama-cpp-python, and imports nothing of ours.

    python llama_cpp_speed.py MODEL.gguf THREADS

One request a line on standard input, one answer a line on standard output: seconds of a prompt, or the median seconds of a step.

    {"prompt": 512}                                        ─►  {"seconds": …}
    {"streams": 8, "context": 64, "steps": 16}             ─►  {"seconds": …}
"""

import ctypes
import json
import statistics
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


class Sequences:
    """A context for so many sequences of so many tokens, and a batch for it."""

    def __init__(self, model: Any, threads: int, sequences: int, tokens: int, batch: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * tokens, sequences
        settings.n_batch = settings.n_ubatch = batch
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, settings)
        assert self.context, "llama.cpp makes no context"
        self.batch = llama_cpp.llama_batch_init(batch, 0, 1)

        self.memory, self.filled = llama_cpp.llama_get_memory(self.context), 0

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def fill(self, sequences: int, tokens: int) -> None:
        """So many sequences hold so many tokens afterwards."""
        for sequence in range(self.filled):
            assert llama_cpp.llama_memory_seq_rm(self.memory, sequence, tokens, -1)
        for sequence in range(self.filled, sequences):
            self.run([(token, sequence, token, False) for token in range(tokens)])
        self.filled = max(self.filled, sequences)

    def run(self, rows: list[tuple[int, int, int, bool]]) -> float:
        """Seconds for rows of (token, sequence, position, wanted)."""
        self.batch.n_tokens = len(rows)
        for at, (token, sequence, position, wanted) in enumerate(rows):
            self.batch.token[at], self.batch.pos[at], self.batch.n_seq_id[at] = token, position, 1
            self.batch.seq_id[at][0], self.batch.logits[at] = sequence, wanted
        began = time.perf_counter()
        assert llama_cpp.llama_decode(self.context, self.batch) == 0
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - began


def main() -> None:
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), settings)
    assert model, "llama.cpp can't load the file"
    threads = int(sys.argv[2])
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    random = np.random.default_rng(0)
    prompts, streams = Sequences(model, threads, 1, 1024, 1024), Sequences(model, threads, 16, 256, 1024)
    print(json.dumps({"system": llama_cpp.llama_print_system_info().decode()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prompt" in request:
            length = request["prompt"]
            ids = random.integers(vocabulary, size=length).tolist()
            prompts.clear()
            seconds = prompts.run([(token, 0, at, at == length - 1) for at, token in enumerate(ids)])
        else:
            count, context = request["streams"], request["context"]
            streams.fill(count, context)
            ids = random.integers(vocabulary, size=(request["steps"], count)).tolist()
            seconds = statistics.median(
                streams.run([(token, sequence, context + step, True) for sequence, token in enumerate(row)])
                for step, row in enumerate(ids)
            )
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
