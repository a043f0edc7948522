"""Bits per byte on Tiny Shakespeare after the same time on the same machine: ownlm's default against nanochat's recipe.

    python benchmarks/sample_efficiency.py DATA [--seconds 120] [--seeds 3] [--peer-rows 8 16 32]

DATA is the text (.gz or plain); its last tenth is held out and scored in windows of 128 bytes. Both sides have 4 layers x
192, rows of 128 bytes and as many parameters as they need for that (printed). Each first measures its own seconds per
step here, undisturbed, and then trains the number of steps that fit into the time, so that noise on the machine changes
the duration of a run and not its result. `--peer-rows` tries several batch sizes for the peer and keeps its best.

The peer follows nanochat (github.com/karpathy/nanochat: nanochat/gpt.py, nanochat/optim.py, scripts/base_train.py): RMSNorm
without parameters, norm after the embedding, QK-norm after rotary with factor 1.2, relu squared, untied head, soft-capped
logits, Muon (Polar Express, Nesterov momentum warmed up to 0.97) for matrices and AdamW for the rest with its
learning rates, 40 steps of warm-up, 65 % of linear decay to 5 %. Left out: value embeddings, smear and backout, which add
parameters; its scaling of rates and decay from steps of 524,288 tokens, which would divide the rates by 16 here; and so
weight decay. It runs in bf16 with fp32 master weights, as nanochat does, and gets ownlm's allocator setting.
"""

import argparse
import gzip
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ownlm import device
from ownlm.models.decoder import Decoder
from ownlm.train.cross_entropy import linear_cross_entropy
from ownlm.train.fresh import init_weights
from ownlm.train.loop import keep_freed_memory
from ownlm.train.optimizers import Optimizer, Update, orthogonalize
from ownlm.train.parameters import Parameters
from ownlm.train.schedule import Schedule, factor
from ownlm.train.stages import ModelShape

VOCAB, WIDTH, LAYERS, HEADS, CONTEXT = 256, 192, 4, 6, 128
OWN_ROWS = 16
Step = Callable[[Tensor, int, int], None]  # (rows of CONTEXT + 1 bytes, step, steps)


class PeerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.c_fc, self.c_out = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = F.rms_norm(x, (WIDTH,))
        q, k, v = (cast(layer, h).view(*x.shape[:2], HEADS, -1) for layer in (self.c_q, self.c_k, self.c_v))
        q, k = (F.rms_norm(rotate(z, cos, sin), (z.shape[-1],)).transpose(1, 2) * 1.2 for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        x = x + cast(self.c_proj, y.transpose(1, 2).reshape(x.shape))
        return x + cast(self.c_out, F.relu(cast(self.c_fc, F.rms_norm(x, (WIDTH,)))).square())


def cast(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


class Peer(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wte, self.blocks = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(PeerBlock() for _ in range(LAYERS))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        bound = 3**0.5 * WIDTH**-0.5
        for block in self.blocks:
            for name, weight in block.named_parameters():
                if "c_proj" in name or "c_out" in name:
                    nn.init.zeros_(weight)
                else:
                    scale = 0.4 if "c_fc" in name else 1.0
                    nn.init.uniform_(weight, -bound * scale, bound * scale)
        frequency = 100_000.0 ** (-torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        angle = torch.outer(torch.arange(CONTEXT), frequency)[None, :, None]
        self.cos, self.sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def loss(self, rows: Tensor) -> Tensor:
        """Summed nats."""
        x = F.rms_norm(self.wte(rows[:, :-1]).bfloat16(), (WIDTH,))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = 15 * torch.tanh(cast(self.lm_head, F.rms_norm(x, (WIDTH,))).float() / 15)
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")


def peer(seed: int) -> tuple[Step, Callable[[Tensor], Tensor], int]:
    model = Peer(seed)
    matrices = list(model.blocks.parameters())
    momenta = [torch.zeros_like(p) for p in matrices]
    shapes = sorted({tuple(p.shape) for p in matrices})
    stacks = [[i for i, p in enumerate(matrices) if tuple(p.shape) == shape] for shape in shapes]
    scale = (WIDTH / 768) ** -0.5
    adamw = torch.optim.AdamW(
        [
            {"params": [model.lm_head.weight], "lr": 0.008 * scale, "betas": (0.8, 0.96), "weight_decay": 0.01},
            {"params": [model.wte.weight], "lr": 0.3 * scale, "betas": (0.8, 0.995), "weight_decay": 0.001},
        ],
        eps=1e-10,
        fused=True,
    )
    peaks = [group["lr"] for group in adamw.param_groups]

    def step(rows: Tensor, number: int, steps: int) -> None:
        decay = round(0.65 * steps)
        progress = min(1.0, (steps - number) / decay)
        lr = min(1.0, (number + 1) / 40) * (progress + (1 - progress) * 0.05)
        rise = min(1.0, number / 400)
        momentum = 0.85 + rise * 0.12 if number < 400 else 0.97 * progress + 0.90 * (1 - progress)
        (model.loss(rows) / rows[:, 1:].numel()).backward()
        with torch.no_grad():
            for stack in stacks:
                for i in stack:
                    momenta[i].lerp_(matrices[i].grad, 1 - momentum)
                update = orthogonalize(
                    torch.stack([matrices[i].grad.lerp(momenta[i], momentum) for i in stack]), torch.bfloat16
                )
                for i, change in zip(stack, update.float(), strict=True):
                    matrices[i].sub_(change, alpha=0.02 * lr)
                    matrices[i].grad = None
        for group, peak in zip(adamw.param_groups, peaks, strict=True):
            group["lr"] = peak * lr
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return step, model.loss, sum(p.numel() for p in model.parameters())


def own(seed: int) -> tuple[Step, Callable[[Tensor], Tensor], int]:
    model = init_weights(Decoder(ModelShape().config(VOCAB, CONTEXT)), seed=seed)
    parameters = Parameters(model, torch.bfloat16)
    update = Update(Optimizer(), parameters, torch.bfloat16)
    schedule = Schedule()

    def loss(rows: Tensor) -> Tensor:
        return linear_cross_entropy(model(rows[:, :-1].contiguous()), model.head_weight, rows[:, 1:].contiguous())

    def step(rows: Tensor, number: int, steps: int) -> None:
        (loss(rows) / rows[:, 1:].numel()).backward()
        parameters.collect()
        update.step(number, factor(schedule, number, steps), parameters.norm())

    return step, loss, len(parameters.master)


SIDES = {"ownlm": own, "nanochat": peer}


def step_seconds(side: str, rows: int, train: Tensor) -> float:
    """The undisturbed time of a step: the fastest quarter of 40, so that other work on the machine counts little."""
    step = SIDES[side](0)[0]
    times = []
    for number in range(44):
        batch = draw(train, rows, number)
        began = time.perf_counter()
        step(batch, number, 1000)
        times.append(time.perf_counter() - began)
    return statistics.mean(sorted(times[4:])[:10])


def draw(text: Tensor, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - CONTEXT - 1, (rows,), generator=generator)
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


def bits_per_byte(loss: Callable[[Tensor], Tensor], text: Tensor) -> float:
    count = (len(text) - 1) // CONTEXT
    rows = text[(torch.arange(count) * CONTEXT)[:, None] + torch.arange(CONTEXT + 1)]
    with torch.no_grad():
        total = sum(float(loss(part)) for part in rows.split(64))
    return total / (count * CONTEXT) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--own-rows", type=int, nargs="+", default=[OWN_ROWS])
    parser.add_argument("--peer-rows", type=int, nargs="+", default=[16])
    options = parser.parse_args()
    device.threads()
    keep_freed_memory()
    raw = options.data.read_bytes()
    raw = gzip.decompress(raw) if options.data.suffix == ".gz" else raw
    text = torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).astype(np.int64))
    train, held_out = text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]
    for side, choices in zip(SIDES, (options.own_rows, options.peer_rows), strict=True):
        for rows in choices:
            seconds = step_seconds(side, rows, train)
            steps = int(options.seconds / seconds)
            found = []
            for seed in range(options.seeds):
                step, loss, parameters = SIDES[side](seed)
                for number in range(steps):
                    step(draw(train, rows, 1_000_003 * seed + number), number, steps)
                found.append(bits_per_byte(loss, held_out))
            each = ", ".join(f"{value:.4f}" for value in found)
            print(
                f"{side:8} {rows:3} rows x {CONTEXT}, {parameters} parameters, {seconds * 1e3:.0f} ms a step, {steps} steps: "
                f"{statistics.mean(found):.4f} bits per byte ({each})",
                flush=True,
            )


if __name__ == "__main__":
    main()
