"""What a small model that drafts brings: tokens a second with and without it, over the same answers.

    python benchmarks/drafting.py TEXT [--seconds 75] [--layers 48] [--kind bf16] [--rounds 5]

Two models are trained here on the bytes of a text (a book of some 700 kB will do), a small one of 1 layer for a third of the time and
a bigger one of 3 layers. To cost what a big model costs, the bigger one gets further layers that do nothing (their outputs are
zero), up to --layers: what the two say, and so how often a draft comes true, is that of the trained models; how much longer a step
of the one takes than of the other is chosen. Prompts are cut from the last tenth of the text, which neither has learned.

Both engines run in turn, the order turning each round: one answer at a time and four, greedy and at temperature 1. The texts must
be equal, or it fails. On as many threads as OMP_NUM_THREADS says.
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


def run(engine: Engine, prompts: list[list[int]], temperature: float) -> tuple[list[list[int]], float]:
    """The answers, and tokens a second from the first one on."""
    answers: dict[int, list[int]] = {}
    for seed, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=NEW, temperature=temperature, seed=seed)
        answers[engine.add(prompt, sampling)] = []
    while any(not each.new_tokens for each in (*engine.running, *engine.waiting)):
        for event in engine.step():
            answers[event.request].append(event.token.id if event.token else -1)
    before, began = sum(map(len, answers.values())), time.perf_counter()
    while not engine.idle:
        for event in engine.step():
            answers[event.request].append(event.token.id if event.token else -1)
    rate = (sum(map(len, answers.values())) - before) / (time.perf_counter() - began)
    return list(answers.values()), rate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    parser.add_argument("--seconds", type=float, default=75, help="of the processor, for the bigger model")
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
    small = trained(SMALL, learned, arguments.seconds / 3)
    big = deepened(trained(BIG, learned, arguments.seconds), arguments.layers)
    natives = {
        name: NativeDecoder(model, cast(Kind, arguments.kind)) for name, model in (("big", big), ("small", small))
    }

    def engine(drafts: bool) -> Engine:
        pages = 8 * CONTEXT // PAGE
        drafter = (
            Drafter(small, NativeRunner(natives["small"], small, pages=pages), context=CONTEXT) if drafts else None
        )
        runner = NativeRunner(natives["big"], big, pages=pages)
        made = Engine(big, cast(Tokenizer, NoText()), slots=8, runner=runner, speculate=drafts, drafter=drafter)
        if drafts:  # prompt lookup is another matter
            made.costs.length = lambda rows, share: 0  # type: ignore[method-assign]
        return made

    for streams in (1, 4):
        for temperature in (0.0, 1.0):
            engines, rates = (
                {drafts: engine(drafts) for drafts in (False, True)},
                {False: list[float](), True: list[float]()},
            )
            for round in range(arguments.rounds + 1):
                begin = [2_000 * (round * streams + row) % (len(held) - PROMPT) for row in range(streams)]
                prompts = [held[start : start + PROMPT] for start in begin]
                said = {}
                for drafts in (False, True) if round % 2 else (True, False):
                    said[drafts], rate = run(engines[drafts], prompts, temperature)
                    if round:  # the first one learns what steps take
                        rates[drafts].append(rate)
                assert said[False] == said[True], "drafts changed a text"
            plain, drafted = (statistics.median(rates[drafts]) for drafts in (False, True))
            ratios = [with_ / without for with_, without in zip(rates[True], rates[False], strict=True)]
            found = engines[True]
            assert found.drafter is not None
            print(
                f"{streams} answers, temperature {temperature:g}: {plain:.0f} tokens/s alone, {drafted:.0f} with drafts, "
                f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f}); "
                f"{found.accepted_tokens / max(1, found.drafted_tokens):.0%} of {found.drafted_tokens:,} drafted tokens came true; "
                f"a step of the big model {1e3 * (found.costs.curve()(streams) or 0):.2f} ms, of the small one "
                f"{1e3 * (found.drafter.costs.curve()(streams) or 0):.2f} ms"
            )


if __name__ == "__main__":
    main()
