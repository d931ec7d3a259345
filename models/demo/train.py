"""Train the demo model on two CPU cores against the clock; knows token streams, not text.

    python train.py DATA OUT --minutes 40 --mix dialogue=0.8,chitchat=0.18,chatterbot=0.02
    python train.py DATA OUT --minutes 45 --mix dialogue=0.4,talk=0.4,chitchat=0.2 --resume --anneal

Each command is one stage: it ends at its deadline, saves OUT/checkpoint.pt (also every five minutes and on SIGTERM) and adds to OUT/log.csv. With
--anneal the learning rate falls linearly to nothing as the deadline nears. --steps bounds a stage by steps instead, repeatable from --seed.
Matrices are trained by Muon (K. Jordan et al. 2024; arXiv 2502.16982), the embedding, norms and routers by AdamW; the load of the experts is evened
by a selection bias without an auxiliary loss (arXiv 2408.15664).
"""

from __future__ import annotations

import argparse
import csv
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import model
import numpy as np
import torch
from model import Shape, Weights
from torch import Tensor

MICRO_TOKENS = 8_192
MUON_RATE, ADAM_RATE, WARM_UP_STEPS = 0.02, 0.003, 60
BIAS_STEP = 0.01
SAVE_SECONDS, LOG_STEPS, EVALUATE_STEPS = 300, 10, 100
# share of the loss per role: frame, user, assistant
ROLE_WEIGHTS = {"dialogue": (0.1, 0.6, 1.0), "other": (0.1, 0.1, 1.0)}


class HeadLoss(torch.autograd.Function):
    """Weighted cross-entropy of hidden states (N, D) through the tied head, by chunks: the (N, V) logits never exist at once."""

    @staticmethod
    def forward(ctx, hidden: Tensor, table: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        head = table.to(hidden.dtype)
        grad_hidden, grad_table, total = torch.empty_like(hidden), torch.zeros(table.shape), torch.zeros(())
        for start in range(0, hidden.shape[0], 1024):
            part = slice(start, start + 1024)
            loss, difference = chunk_loss(hidden[part] @ head.T, targets[part], shares[part])
            total += loss
            torch.mm(difference, head, out=grad_hidden[part])
            grad_table += difference.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_table)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_table = ctx.saved_tensors
        return grad_hidden * grad, grad_table * grad, None, None


def chunk_loss(scores: Tensor, targets: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of a chunk and its derivative by the scores."""
    x = scores.float()
    normaliser = x.logsumexp(-1)
    loss = ((normaliser - x.gather(-1, targets[:, None])[:, 0]) * shares).sum()
    hit = torch.arange(x.shape[1])[None] == targets[:, None]
    difference = (torch.exp(x - normaliser[:, None]) - hit.float()) * shares[:, None]
    return loss, difference.to(scores.dtype)


def orthogonalised(update: Tensor, rounds: int = 5) -> Tensor:
    """The nearest orthogonal matrices of (..., rows, columns), by the quintic Newton-Schulz iteration of Muon, in bfloat16."""
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimiser:
    """Muon for matrices (stacks of experts or heads one by one), AdamW for the rest; state is plain tensors by weight name."""

    def __init__(self, weights: Weights) -> None:
        self.step = 0
        trained = {name: w for name, w in weights.items() if w.requires_grad}
        self.matrices = [n for n, w in trained.items() if w.ndim >= 2 and "embd" not in n and "gate_inp" not in n]
        self.others = [n for n in trained if n not in self.matrices]
        self.momentum = {n: torch.zeros_like(w) for n, w in trained.items()}
        self.square = {n: torch.zeros_like(trained[n]) for n in self.others}

    @torch.no_grad()
    def update(self, weights: Weights, scale: float) -> None:
        """One step at `scale` times the full rates; gradients are cleared."""
        self.step += 1
        memory = 0.85 + 0.1 * min(1.0, self.step / 300)
        for name in self.matrices:
            w, momentum = weights[name], self.momentum[name]
            momentum.lerp_(w.grad, 1 - memory)
            rate = MUON_RATE * scale * max(1.0, w.shape[-2] / w.shape[-1]) ** 0.5
            w.mul_(1 - 0.1 * MUON_RATE * scale).sub_(orthogonalised(w.grad.lerp(momentum, memory)), alpha=rate)
            w.grad = None
        for name in self.others:
            w, momentum, square = weights[name], self.momentum[name], self.square[name]
            momentum.lerp_(w.grad, 0.1)
            square.lerp_(w.grad.square(), 0.02)
            mean, spread = momentum / (1 - 0.9**self.step), (square / (1 - 0.98**self.step)).sqrt_().add_(1e-10)
            w.sub_(mean.div_(spread), alpha=ADAM_RATE * scale)
            w.grad = None


def rows(data: dict[str, np.ndarray], mix: dict[str, float], length: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of MICRO_TOKENS: ids (B, length + 1) and loss shares (B, length), each row cut at random from one source's stream."""
    names = list(mix)
    odds = np.array([mix[name] for name in names]) / sum(mix.values())
    starts: dict[str, list[int]] = {name: [] for name in names}
    while True:
        ids, shares = [], []
        for _ in range(MICRO_TOKENS // length):
            name = names[rng.choice(len(names), p=odds)]
            tokens, roles = data[f"{name}.train.tokens"], data[f"{name}.train.roles"]
            if not starts[name]:
                phase = int(rng.integers(length))
                starts[name] = rng.permutation(np.arange(phase, len(tokens) - length - 1, length)).tolist()
            start = starts[name].pop()
            ids.append(tokens[start : start + length + 1].astype(np.int64))
            weight = np.array(ROLE_WEIGHTS.get(name, ROLE_WEIGHTS["other"]), np.float32)
            shares.append(weight[roles[start + 1 : start + length + 1]])
        yield torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(shares))


@torch.no_grad()
def held_out_loss(shape: Shape, weights: Weights, tokens: np.ndarray, length: int) -> float:
    """Nats per token over the first 16 thousand held-out tokens."""
    count = min(16_384, len(tokens) - 1) // length
    ids = torch.from_numpy(tokens[: count * length + 1].astype(np.int64))
    hidden, _ = model.forward(shape, weights, ids[:-1].view(count, length), torch.bfloat16)
    scores = (hidden.flatten(0, 1) @ weights["token_embd.weight"].bfloat16().T).float()
    return float(torch.nn.functional.cross_entropy(scores, ids[1:]))


def train_step(
    shape: Shape, weights: Weights, optimiser: Optimiser, micro: list[tuple[Tensor, Tensor]], scale: float
) -> tuple[float, list[Tensor]]:
    """One optimiser step over a few batches; returns the weighted loss and the experts' loads by layer."""
    total_share = sum(float(share.sum()) for _, share in micro)
    loss, loads = 0.0, []
    for ids, share in micro:
        hidden, load = model.forward(shape, weights, ids[:, :-1], torch.bfloat16)
        part = HeadLoss.apply(hidden.flatten(0, 1), weights["token_embd.weight"], ids[:, 1:].flatten(), share.flatten() / total_share)
        part.backward()
        loss += float(part.detach())
        loads = [a + b for a, b in zip(loads, load, strict=True)] if loads else load
    optimiser.update(weights, scale)
    with torch.no_grad():
        biases = [name for name in weights if name.endswith("exp_probs_b.bias")]
        for name, load in zip(biases, loads, strict=True):
            weights[name] += BIAS_STEP * scale * torch.sign(load.float().mean() - load)
    return loss, loads


def save(path: Path, shape: Shape, weights: Weights, optimiser: Optimiser, tokens: int, seconds: float) -> None:
    """The checkpoint, complete or not at all."""
    state = {"shape": asdict(shape), "weights": {n: w.detach() for n, w in weights.items()}, "step": optimiser.step, "tokens": tokens, "seconds": seconds}
    torch.save(state | {"momentum": optimiser.momentum, "square": optimiser.square}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder written by data.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--until", type=float, help="end of the stage in Unix seconds, instead of --minutes")
    parser.add_argument("--steps", type=int, help="end of the stage in steps, instead of the clock")
    parser.add_argument("--mix", required=True, help="shares of the sources, as dialogue=0.8,talk=0.2")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--micro", type=int, default=1, help=f"batches of {MICRO_TOKENS:,} tokens to a step")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--anneal", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    a = arguments()
    a.out.mkdir(parents=True, exist_ok=True)
    checkpoint, begun = a.out / "checkpoint.pt", time.monotonic()
    end = begun + (a.until - time.time() if a.until else 60 * a.minutes)
    torch.set_num_threads(2)
    torch.manual_seed(a.seed)
    shape, tokens, earlier, first_step = Shape(), 0, 0.0, 0
    weights = model.initial_weights(shape, a.seed)
    optimiser = Optimiser(weights)
    if a.resume:
        state = torch.load(checkpoint)
        weights = {n: w.requires_grad_(not n.endswith(".bias")) for n, w in state["weights"].items()}
        optimiser.momentum, optimiser.square = state["momentum"], state["square"]
        optimiser.step, tokens, earlier = state["step"], state["tokens"], state["seconds"]
        first_step = optimiser.step
    model.attention = torch.compile(model.attention, dynamic=False)
    globals()["chunk_loss"] = torch.compile(chunk_loss, dynamic=False)
    data = dict(np.load(a.data / "data.npz"))
    mix = {name: float(share) for name, share in (pair.split("=") for pair in a.mix.split(","))}
    batches = rows(data, mix, a.length, np.random.default_rng(a.seed + first_step))
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))

    saved, mean_loss = begun, 0.0
    with (a.out / "log.csv").open("a", newline="") as file:
        log = csv.writer(file)
        if file.tell() == 0:
            log.writerow(["step", "tokens", "seconds", "rate", "train_loss", "held_out_dialogue_loss", "busiest_expert_over_mean"])
        while not stopped:
            now = time.monotonic()
            done = (optimiser.step - first_step) / a.steps if a.steps else (now - begun) / (end - begun)
            if done >= 1:
                break
            scale = min(1.0, (optimiser.step + 1) / WARM_UP_STEPS) * (1 - done if a.anneal else 1.0)
            micro = [next(batches) for _ in range(a.micro)]
            loss, loads = train_step(shape, weights, optimiser, micro, scale)
            tokens += a.micro * MICRO_TOKENS
            mean_loss = loss if not mean_loss else 0.9 * mean_loss + 0.1 * loss
            if optimiser.step % LOG_STEPS == 0:
                due = optimiser.step % EVALUATE_STEPS == 0
                held = f"{held_out_loss(shape, weights, data['dialogue.held.tokens'], a.length):.4f}" if due else ""
                busiest = max(float(load.max() / load.float().mean()) for load in loads)
                seconds = earlier + time.monotonic() - begun
                log.writerow([optimiser.step, tokens, f"{seconds:.0f}", f"{scale:.3f}", f"{mean_loss:.4f}", held, f"{busiest:.2f}"])
                file.flush()
            if time.monotonic() - saved > SAVE_SECONDS:
                saved = time.monotonic()
                save(checkpoint, shape, weights, optimiser, tokens, earlier + saved - begun)
    save(checkpoint, shape, weights, optimiser, tokens, earlier + time.monotonic() - begun)


if __name__ == "__main__":
    main()
