"""What drafts bring, of a small model and of the text itself: tokens a second with and without, over the same answers.

    python benchmarks/drafting.py TEXT [--seconds 75] [--small-seconds 25] [--layers 48] [--kind bf16] [--rounds 5]

Two models are trained here on the bytes of a text (a book of some 700 kB will do), a bigger one of 3 layers and a small one of 1 layer,
for a third of the time unless told. To cost what a big model costs, the bigger one gets further layers that do nothing (their outputs
are zero), up to --layers: what the two say, and so how often a draft comes true, is that of the trained models; how much longer a step
of the one takes than of the other is chosen. Prompts are cut from the last tenth of the text, which neither has learned.

An engine without drafts and one with them (of the model; of what the text repeats) run in turn for moments: one answer at a time and
four, greedy and at temperature 1. The texts must be equal, or it fails. On as many threads as OMP_NUM_THREADS says; with one thread the
processor's time tells what drafts cost whatever else the machine does.
"""

import argparse
import gzip
import math
import statistics
import time
from pathlib import Path
from typing import Any, cast

import torch

from ownlm import device
from ownlm.generate.drafter import Drafter
from ownlm.generate.engine import Engine
from ownlm.generate.runners import NativeRunner
from ownlm.generate.sampling import Sampling
from ownlm.kernels.native import PAGE, Kind, NativeDecoder
from ownlm.models.decoder import Decoder
from ownlm.models.families import from_hf
from ownlm.tokens.codec import Tokenizer
from serving import NoText

CONTEXT, PROMPT, NEW = 512, 64, 192
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 176}
BIG = {"hidden_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 432}
BATCH, WIDTH = 16, 64
TURN_S = 0.02  # that an engine runs before the others do


def decoder(shape: dict[str, int]) -> Decoder:
    hf: dict[str, Any] = {
        "model_type": "llama", "vocab_size": 256, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6,
        "num_key_value_heads": shape["num_attention_heads"], "tie_word_embeddings": False, **shape,
    }  # fmt: skip
    config, family = from_hf(hf)
    return cast(Decoder, family.build(config, hf))


def trained(shape: dict[str, int], text: torch.Tensor, seconds: float) -> Decoder:
    torch.manual_seed(0)
    model = decoder(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    began, steps, loss = time.process_time(), 0, math.inf
    while (share := (time.process_time() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (steps + 1) / 20) * (1 - share)
        starts = torch.randint(len(text) - WIDTH - 1, (BATCH,))
        ids_BT = torch.stack([text[start : start + WIDTH + 1] for start in starts.tolist()])
        logits_BTV = model.logits(model(ids_BT[:, :-1]))
        value = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, loss = steps + 1, value.item() if math.isinf(loss) else 0.95 * loss + 0.05 * value.item()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {steps} steps in {seconds:.0f} s: {loss / math.log(2):.2f} bits per byte"
    )
    return model.eval()


def deepened(model: Decoder, layers: int) -> Decoder:
    """The same function, with further layers that add nothing."""
    deep = decoder({**BIG, "num_hidden_layers": layers})
    deep.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for layer in deep.layers[len(model.layers) :]:
            layer.self_attn.o_proj.weight.zero_()  # type: ignore[union-attr,operator]
            layer.mlp.down_proj.weight.zero_()  # type: ignore[union-attr,operator]
    return deep.eval()


class Answering:
    """One engine on some prompts, from the step on in which all of them have begun to write."""

    def __init__(self, engine: Engine, prompts: list[list[int]], temperature: float) -> None:
        self.engine, self.seconds, self.processor_s = engine, 0.0, 0.0
        self.answers: dict[int, list[int]] = {}
        for seed, prompt in enumerate(prompts):
            sampling = Sampling(max_tokens=NEW, temperature=temperature, seed=seed, stop_ids=frozenset())
            self.answers[engine.add(prompt, sampling)] = []
        while any(not each.new_tokens for each in (*engine.running, *engine.waiting)):
            self.step()
        self.before = sum(map(len, self.answers.values()))

    def step(self) -> None:
        for event in self.engine.step():
            self.answers[event.request].append(event.token.id if event.token else -1)

    def turn(self) -> None:
        """Go on for a moment."""
        began, processor = time.perf_counter(), time.process_time()
        while not self.engine.idle and time.perf_counter() - began < TURN_S:
            self.step()
        self.seconds += time.perf_counter() - began
        self.processor_s += time.process_time() - processor

    def tokens(self) -> int:
        return sum(map(len, self.answers.values())) - self.before


def race(engines: list[Engine], prompts: list[list[int]], temperature: float) -> list[Answering]:
    """The engines on the same prompts, in turn: whatever else slows the machine down slows all of them. The texts must be equal."""
    each = [Answering(engine, prompts, temperature) for engine in engines]
    while any(not one.engine.idle for one in each):
        for one in each:
            one.turn()
    assert len({tuple(map(tuple, one.answers.values())) for one in each}) == 1, "drafts changed a text"
    return each


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("--seconds", type=float, default=75, help="of the processor, for the bigger model")
    parser.add_argument("--small-seconds", type=float, help="for the small one; by default a third")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--kind", default="bf16", choices=("f32", "bf16", "int8", "int4"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device.threads()
    data = (
        gzip.decompress(arguments.text.read_bytes()) if arguments.text.suffix == ".gz" else arguments.text.read_bytes()
    )
    text = torch.tensor(list(data))
    learned, held = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :].tolist()
    small = trained(SMALL, learned, arguments.small_seconds or arguments.seconds / 3)
    big = deepened(trained(BIG, learned, arguments.seconds), arguments.layers)
    natives = {
        name: NativeDecoder(model, cast(Kind, arguments.kind)) for name, model in (("big", big), ("small", small))
    }

    def engine(way: str) -> Engine:
        pages = 8 * CONTEXT // PAGE
        drafter = None
        if way == "model":
            drafter = Drafter(small, NativeRunner(natives["small"], small, pages=pages), context=CONTEXT)
        runner = NativeRunner(natives["big"], big, pages=pages)
        made = Engine(big, cast(Tokenizer, NoText()), slots=8, runner=runner, speculate=way != "alone", drafter=drafter)
        if way == "model":  # prompt lookup is another matter
            made.speculation.lookup.open, made.speculation.lookup.need = False, math.inf
        return made

    for way in ("model", "lookup"):
        for streams in (1, 4):
            for temperature in (0.0, 1.0):
                engines = [engine("alone"), engine(way)]
                rates, processor = list[float](), list[float]()
                for round in range(arguments.rounds + 1):
                    begin = [2_000 * (round * streams + row) % (len(held) - PROMPT) for row in range(streams)]
                    prompts = [held[start : start + PROMPT] for start in begin]
                    alone, drafted = race(engines, prompts, temperature)
                    if round:  # the first one learns what steps take
                        rates.append(alone.seconds / drafted.seconds)
                        processor.append(alone.processor_s / drafted.processor_s)
                found = engines[1].speculation
                print(
                    f"{way}, {streams} answers, temperature {temperature:g}: {alone.tokens() / alone.seconds:.0f} tokens/s alone, "
                    f"with drafts {statistics.median(rates):.2f}x ({min(rates):.2f}-{max(rates):.2f}), of processor time "
                    f"{statistics.median(processor):.2f}x ({min(processor):.2f}-{max(processor):.2f}); "
                    f"{found.accepted_tokens / max(1, found.drafted_tokens):.0%} of {found.drafted_tokens:,} drafted tokens came true; "
                    f"a step alone {1e3 * (found.costs.without(streams) or 0):.2f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
