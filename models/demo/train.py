"""Train the demo model on two CPU cores against the clock; knows token streams, not text.

    python train.py DATA OUT --minutes 40 --mix dialogue=0.8,chitchat=0.18,chatterbot=0.02
    python train.py DATA OUT --minutes 45 --mix dialogue=0.4,talk=0.4,chitchat=0.2 --resume --anneal

Each command is one stage: it ends at its deadline, saves OUT/checkpoint.pt (also every five minutes and on SIGTERM) and
adds to OUT/log.csv. With --anneal the learning rate falls linearly to nothing as the deadline nears. --steps bounds a
stage by steps instead, repeatable from --seed. Matrices are trained by Muon (K. Jordan et al. 2024; arXiv 2502.16982),
the embedding, norms and routers by AdamW; a selection bias evens the load of the experts, without an auxiliary loss
(arXiv 2408.15664).
"""

from __future__ import annotations

import argparse
import csv
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
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
LOG_COLUMNS = (
    "step", "tokens", "seconds", "rate", "train_loss", "held_out_dialogue_loss", "busiest_expert_over_mean"
)  # fmt: skip
# share of the loss per role: frame, user, assistant
ROLE_WEIGHTS = {"dialogue": (0.1, 0.6, 1.0), "other": (0.1, 0.1, 1.0)}


class HeadLoss(torch.autograd.Function):
    """Weighted cross-entropy of hidden states (N, D) through the tied head, never all (N, V) logits at once."""

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
    """The nearest orthogonal matrices of (..., rows, columns): Muon's quintic Newton-Schulz iteration, in bfloat16."""
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Optimiser:
    """Muon for matrices (experts and heads one by one), AdamW for the rest; its state is tensors by name."""

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


def rows(
    data: dict[str, np.ndarray], mix: dict[str, float], lengths: list[int], rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of MICRO_TOKENS, of each length in turn: ids (B, length + 1), loss shares (B, length)."""
    names = list(mix)
    odds = np.array([mix[name] for name in names]) / sum(mix.values())
    starts: dict[str, list[int]] = {name: [] for name in names}
    for length in cycle(lengths):
        ids, shares = [], []
        for _ in range(MICRO_TOKENS // length):
            name = names[rng.choice(len(names), p=odds)]
            tokens, roles = data[f"{name}.train.tokens"], data[f"{name}.train.roles"]
            if not starts[name]:
                phase = int(rng.integers(length))
                starts[name] = rng.permutation(np.arange(phase, len(tokens) - max(lengths) - 1, length)).tolist()
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
        table, targets = weights["token_embd.weight"], ids[:, 1:].flatten()
        part = HeadLoss.apply(hidden.flatten(0, 1), table, targets, share.flatten() / total_share)
        part.backward()
        loss += float(part.detach())
        loads = [a + b for a, b in zip(loads, load, strict=True)] if loads else load
    optimiser.update(weights, scale)
    with torch.no_grad():
        biases = [name for name in weights if name.endswith("exp_probs_b.bias")]
        for name, load in zip(biases, loads, strict=True):
            weights[name] += BIAS_STEP * scale * torch.sign(load.float().mean() - load)
    return loss, loads


@dataclass
class Run:
    """A training run between two steps; `tokens` and `seconds` count all its stages."""

    shape: Shape
    weights: Weights
    optimiser: Optimiser
    tokens: int = 0
    seconds: float = 0.0


def fresh(seed: int) -> Run:
    weights = model.initial_weights(Shape(), seed)
    return Run(Shape(), weights, Optimiser(weights))


def save(path: Path, run: Run) -> None:
    """The checkpoint, complete or not at all."""
    state = {"shape": asdict(run.shape), "weights": {n: w.detach() for n, w in run.weights.items()}}
    state |= {"step": run.optimiser.step, "tokens": run.tokens, "seconds": run.seconds}
    state |= {"momentum": run.optimiser.momentum, "square": run.optimiser.square}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def resumed(path: Path) -> Run:
    state = torch.load(path)
    weights = {n: w.requires_grad_(not n.endswith(".bias")) for n, w in state["weights"].items()}
    optimiser = Optimiser(weights)
    optimiser.momentum, optimiser.square, optimiser.step = state["momentum"], state["square"], state["step"]
    return Run(Shape(**state["shape"]), weights, optimiser, state["tokens"], state["seconds"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder written by data.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--until", type=float, help="end of the stage in Unix seconds, instead of --minutes")
    parser.add_argument("--steps", type=int, help="end of the stage in steps, instead of the clock")
    parser.add_argument("--mix", required=True, help="shares of the sources, as dialogue=0.8,talk=0.2")
    parser.add_argument("--lengths", default="256", help="tokens of a row, batch by batch in turn, as 256,256,512")
    parser.add_argument("--micro", type=int, default=1, help=f"batches of {MICRO_TOKENS:,} tokens to a step")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--anneal", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def log_line(
    run: Run, loss: float, scale: float, loads: list[Tensor], held_out: np.ndarray, length: int
) -> list[int | str]:
    """A row of log.csv, with the held-out loss where it is due."""
    due = run.optimiser.step % EVALUATE_STEPS == 0
    held = f"{held_out_loss(run.shape, run.weights, held_out, length):.4f}" if due else ""
    busiest = max(float(load.max() / load.float().mean()) for load in loads)
    return [run.optimiser.step, run.tokens, f"{run.seconds:.0f}", f"{scale:.3f}", f"{loss:.4f}", held, f"{busiest:.2f}"]


def main() -> None:
    a = arguments()
    a.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    torch.manual_seed(a.seed)
    checkpoint = a.out / "checkpoint.pt"
    run = resumed(checkpoint) if a.resume else fresh(a.seed)
    model.attention = torch.compile(model.attention, dynamic=False)
    globals()["chunk_loss"] = torch.compile(chunk_loss, dynamic=False)
    data = dict(np.load(a.data / "data.npz"))
    mix = {name: float(share) for name, share in (pair.split("=") for pair in a.mix.split(","))}
    first_step = run.optimiser.step
    lengths = [int(length) for length in a.lengths.split(",")]
    batches = rows(data, mix, lengths, np.random.default_rng(a.seed + first_step))
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))

    begun = saved = last = time.monotonic()
    end = begun + (a.until - time.time() if a.until else 60 * a.minutes)
    mean_loss = 0.0
    with (a.out / "log.csv").open("a", newline="") as file:
        log = csv.writer(file)
        if file.tell() == 0:
            log.writerow(LOG_COLUMNS)
        while not stopped:
            done = (run.optimiser.step - first_step) / a.steps if a.steps else (last - begun) / (end - begun)
            if done >= 1:
                break
            scale = min(1.0, (run.optimiser.step + 1) / WARM_UP_STEPS) * (1 - done if a.anneal else 1.0)
            micro = [next(batches) for _ in range(a.micro)]
            loss, loads = train_step(run.shape, run.weights, run.optimiser, micro, scale)
            now = time.monotonic()
            run.tokens, run.seconds, last = run.tokens + a.micro * MICRO_TOKENS, run.seconds + now - last, now
            mean_loss = 0.9 * mean_loss + 0.1 * loss if mean_loss else loss
            if run.optimiser.step % LOG_STEPS == 0:
                log.writerow(log_line(run, mean_loss, scale, loads, data["dialogue.held.tokens"], min(lengths)))
                file.flush()
            if now - saved > SAVE_SECONDS:
                saved = now
                save(checkpoint, run)
    save(checkpoint, run)


if __name__ == "__main__":
    main()
