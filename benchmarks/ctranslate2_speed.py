"""Times CTranslate2 for generate_speed.py. Runs in an environment that has ctranslate2, transformers and torch, and imports nothing of
ours.

    python ctranslate2_speed.py FOLDER THREADS

FOLDER is a Hugging Face folder of a Llama, which is converted to int8 at first. One request a line on standard input, one answer a line
on standard output: seconds of a prompt, or seconds of a step. CTranslate2 tells of whole answers only: a prompt is an answer of
one token, and a step is what a longer answer takes more than that, divided by its tokens.

    {"prompt": 512}                                        ─►  {"seconds": …}
    {"streams": 8, "context": 64, "steps": 16}             ─►  {"seconds": …}
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ctranslate2
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def converted(folder: Path, out: str) -> None:
    """The converter wants a tokenizer; what it lacks of the model's vocabulary is made up."""
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    TransformersConverter(str(folder)).convert(out, quantization="int8")


def seconds(generator: Any, streams: int, context: int, tokens: int) -> float:
    """Of so many answers of so many tokens, side by side, each to a prompt of `context` tokens."""
    vocabulary = [f"<extra_id_{index}>" for index in range(1000)]
    prompts = [random.choices(vocabulary, k=context) for _ in range(streams)]
    began = time.perf_counter()
    found = generator.generate_batch(
        prompts, max_length=tokens, min_length=tokens, sampling_topk=1, include_prompt_in_result=False
    )
    took = time.perf_counter() - began
    assert all(len(one.sequences_ids[0]) == tokens for one in found)
    return took


def main() -> None:
    random.seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        converted(Path(sys.argv[1]), f"{scratch}/model")
        generator = ctranslate2.Generator(
            f"{scratch}/model", device="cpu", compute_type="int8", inter_threads=1, intra_threads=int(sys.argv[2])
        )
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prompt" in request:
            took = seconds(generator, 1, request["prompt"], 1)
        else:
            streams, context, steps = request["streams"], request["context"], request["steps"]
            short, long = (seconds(generator, streams, context, tokens) for tokens in (1, 1 + steps))
            took = (long - short) / steps
        print(json.dumps({"seconds": took}), flush=True)


if __name__ == "__main__":
    main()
