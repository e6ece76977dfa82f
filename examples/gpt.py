"""Train a small byte-level GPT on the source code of Python's standard library, and let it write some.

    python examples/gpt.py                          # alone
    ringps run -n 4 examples/gpt.py                 # the same script, on 4 workers
    ringps run -n 4 examples/gpt.py --checkpoints ckpt      # stop it, and start it again
    ringps run -n 2 examples/gpt.py --device cuda           # on GPUs, which workers may share

Shapes: B sequences of this rank's batch, T bytes of context, D width, H heads.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import ringps

BYTES = 256  # the vocabulary


def corpus(limit_bytes: int) -> torch.Tensor:
    """Source files of the standard library, one after the other, in an order that is always the same."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
    return torch.frombuffer(text[:limit_bytes], dtype=torch.uint8)


class Windows(Dataset[torch.Tensor]):
    """Pieces of T + 1 bytes: T to read, T to predict. Each overlaps the one before it by half."""

    def __init__(self, text: torch.Tensor, context: int) -> None:
        self.pieces = text.unfold(0, context + 1, context // 2)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pieces[index].long()


class Block(nn.Module):
    """Attention, then a perceptron, each added to what came in (Vaswani et al., 2017; pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B, H, T, D / H
            for part in self.qkv(self.norm1(x_btd)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_btd = x_btd + self.out(mixed.transpose(1, 2).flatten(-2))
        return x_btd + self.mlp(self.norm2(x_btd))


class GPT(nn.Module):
    """Predicts each next byte from the bytes before it (Radford et al., 2019)."""

    def __init__(self, *, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(BYTES, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, bytes_bt: torch.Tensor) -> torch.Tensor:
        x_btd = self.embed(bytes_bt) + self.position[: bytes_bt.shape[1]]
        return self.head(self.norm(self.blocks(x_btd)))

    def loss(self, pieces: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy (nats per byte) of pieces of T + 1 bytes."""
        logits = self(pieces[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())

    @torch.no_grad()
    def write(self, prompt: str, length: int, generator: torch.Generator) -> str:
        """The prompt and `length` more bytes, drawn one by one from what the model predicts."""
        text = torch.tensor([list(prompt.encode())], device=self.position.device)
        for _ in range(length):
            logits = self(text[:, -self.context :])[0, -1].cpu()
            drawn = torch.multinomial((logits / 0.7).softmax(0), 1, generator=generator)
            text = torch.cat([text, drawn[None].to(text.device)], dim=1)
        return bytes(text[0].tolist()).decode(errors="replace")


def say(text: str) -> None:
    """Print it once, not once per worker."""
    if ringps.rank() == 0:
        print(text, flush=True)


def mean_over_ranks(total: float, number: float) -> float:
    """The mean of what all ranks have summed up."""
    sums = torch.tensor([total, number], dtype=torch.float64)
    ringps.all_reduce(sums)
    return (sums[0] / sums[1]).item()


@torch.no_grad()
def validate(model: GPT, windows: Windows, batch: int) -> float:
    """Mean loss over some held-out windows; each rank takes its part of them."""
    chosen = range(0, len(windows), max(1, len(windows) // 128))[ringps.rank() :: ringps.world_size()]
    total = 0.0
    for start in range(0, len(chosen), batch):
        pieces = torch.stack([windows[index] for index in chosen[start : start + batch]])
        total += model.loss(pieces.to(model.position.device)).item() * len(pieces)
    return mean_over_ranks(total, len(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description="A byte-level GPT on Python's own source, data-parallel.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step, over all workers")
    parser.add_argument("--context", type=int, default=64, help="bytes that the model looks back")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus-bytes", type=int, default=4_000_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--checkpoints", metavar="DIR", help="where to save, and to go on from")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--write", type=int, default=400, metavar="BYTES", help="length of the sample")
    options = parser.parse_args()

    torch.set_num_threads(1)  # a worker per core: they would only get in each other's way
    ringps.init()
    if options.device == "cuda":
        torch.cuda.set_device(ringps.local_rank() % max(1, torch.cuda.device_count()))
    torch.manual_seed(options.seed)

    text = corpus(options.corpus_bytes)
    split = len(text) * 19 // 20
    train, held_out = Windows(text[:split], options.context), Windows(text[split:], options.context)
    model = GPT(width=options.width, layers=options.layers, heads=options.heads, context=options.context)
    model.to(options.device)
    sampler = ringps.ElasticBatchSampler(
        len(train), global_batch_size=options.batch, seed=options.seed, drop_last=True
    )
    loader = DataLoader(train, batch_sampler=sampler)
    plain = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1, betas=(0.9, 0.95))
    optimizer = ringps.DistributedOptimizer(plain, model, sampler=sampler)
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * step / options.steps))),
    )
    state = ringps.TrainState(model=model, optimizer=optimizer, sampler=sampler, scheduler=schedule)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"{size:,} parameters, {len(text):,} bytes of text, {ringps.world_size()} workers")

    report_every = max(1, options.steps // 10)
    loss_sum, loss_count, samples = 0.0, 0, 0
    start_s = time.perf_counter()
    with contextlib.ExitStack() as stack:
        steps = state.steps
        if options.checkpoints:
            saving = ringps.Checkpointer(options.checkpoints, state, every_steps=options.save_every)
            steps = stack.enter_context(saving).steps
        for step, pieces in steps(loader, until=options.steps):
            loss = model.loss(pieces.to(options.device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of the reduced gradients, as in one process
            optimizer.step()
            schedule.step()
            loss_sum, loss_count = loss_sum + loss.item() * len(pieces), loss_count + len(pieces)
            samples += options.batch
            if step % report_every == 0 or step == options.steps:
                mean_loss = mean_over_ranks(loss_sum, loss_count)
                rate = samples / (time.perf_counter() - start_s)
                say(f"step {step:4}/{options.steps}  loss {mean_loss:.3f}  {rate:6.1f} samples/s")
                loss_sum, loss_count = 0.0, 0

    final = validate(model, held_out, options.batch)
    say(f"validation loss {final:.3f} nats per byte (chance: {math.log(BYTES):.3f})")
    leads = ringps.rank() == 0
    ringps.shutdown()  # the other workers need not wait for what follows
    if leads and options.write:
        generator = torch.Generator().manual_seed(options.seed)
        print("it writes:", model.write("def ", options.write, generator), sep="\n")


if __name__ == "__main__":
    main()
