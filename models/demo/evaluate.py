"""Measure a GGUF of the demo model: held-out perplexity against simple baselines, sample dialogues; prints Markdown.

    python evaluate.py MODEL.gguf DATA [--tokens 60000] [--seed 1]

The baselines are counted on the training stream of the same source: unigrams with one added to each count, bigrams with
interpolated Kneser-Ney smoothing (Chen and Goodman 1999). All three are scored on the same held-out tokens, control
tokens included.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import model
import numpy as np
import torch
from data import stored_tokenizer
from export import read_weights
from model import Shape, Weights
from tokenizers import Tokenizer

LENGTH = 256
SOURCES = ("dialogue", "chitchat", "talk")
DIALOGUES = (
    ("Hello!", "I'm good, thanks. Who are you?", "What can you do?"),
    ("Hi, I'm Clara.", "I have a cat.", "What is my name?"),
    ("I feel sad today.", "I had a fight with my best friend.", "Thank you."),
    ("What kind of music do you like?", "I like rock music.", "Have you seen any good movies?"),
    ("What should I cook tonight?", "I don't like that.", "Tell me a joke."),
    ("Do you like the Star Wars movies?", "Which one is the best?", "I like Han Solo."),
    ("Explain quantum physics.", "What is the capital of Italy?", "Goodbye!"),
)


def unigram_nats(train: np.ndarray, held: np.ndarray, vocabulary: int) -> float:
    """Nats per predicted token under add-one unigrams."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[held[1:]].mean())


def bigram_nats(train: np.ndarray, held: np.ndarray, vocabulary: int, discount: float = 0.75) -> float:
    """Nats per predicted token under interpolated Kneser-Ney bigrams."""
    pairs, counts = np.unique(train[:-1].astype(np.int64) * vocabulary + train[1:], return_counts=True)
    first, second = pairs // vocabulary, pairs % vocabulary
    continuations = np.bincount(second, minlength=vocabulary) + 1.0
    lower = continuations / continuations.sum()
    total = np.bincount(first, weights=counts, minlength=vocabulary)
    kinds = np.bincount(first, minlength=vocabulary)
    wanted = held[:-1].astype(np.int64) * vocabulary + held[1:]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place] - discount, 0.0)
    context = held[:-1]
    known = np.maximum(total[context], 1.0)
    back_off = np.where(total[context] > 0, discount * kinds[context] / known, 1.0)
    return float(-np.log(seen / known + back_off * lower[held[1:]]).mean())


@torch.no_grad()
def model_nats(s: Shape, weights: Weights, held: np.ndarray) -> float:
    """Nats per predicted token of the model in rows of LENGTH tokens, each without what went before."""
    count = (len(held) - 1) // LENGTH
    ids = torch.from_numpy(held[: count * LENGTH + 1].astype(np.int64))
    total = 0.0
    for start in range(0, count, 16):
        rows = slice(start * LENGTH, min(start + 16, count) * LENGTH)
        scores = model.logits(s, weights, ids[rows].view(-1, LENGTH)).flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(scores, ids[rows.start + 1 : rows.stop + 1], reduction="sum"))
    return total / (count * LENGTH)


@torch.no_grad()
def reply(
    s: Shape, weights: Weights, tokenizer: Tokenizer, ids: list[int], generator: torch.Generator, temperature: float
) -> list[int]:
    """Up to 60 sampled tokens (top 40, nucleus 0.9) after `ids`, ending with <|end|>; greedy at temperature 0."""
    answer: list[int] = []
    while len(answer) < 60 and (not answer or answer[-1] != tokenizer.token_to_id("<|end|>")):
        scores = model.logits(s, weights, torch.tensor([ids + answer]))[0, -1]
        if temperature == 0:
            answer.append(int(scores.argmax()))
            continue
        values, tokens = (scores / temperature).softmax(-1).topk(40)
        values[values.cumsum(0) - values > 0.9] = 0
        answer.append(int(tokens[torch.multinomial(values, 1, generator=generator)]))
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("data", type=Path, help="folder written by data.py --tokenizer-of")
    parser.add_argument("--tokens", type=int, default=60_000, help="held-out tokens of each source, at most")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    s, weights = Shape(), read_weights(arguments.gguf)
    tokenizer = stored_tokenizer(arguments.gguf)
    if tokenizer.get_vocab() != Tokenizer.from_file(str(arguments.data / "tokenizer.json")).get_vocab():
        raise SystemExit(
            f"{arguments.data} was built with another tokenizer: use data.py --tokenizer-of {arguments.gguf}"
        )
    data = np.load(arguments.data / "data.npz")

    print("| held-out text | tokens | bytes per token | unigram | bigram | model | model, bits per byte |")
    print("|---|---|---|---|---|---|---|")
    for source in SOURCES:
        train, held = data[f"{source}.train.tokens"], data[f"{source}.held.tokens"][: arguments.tokens]
        held = held[: (len(held) - 1) // LENGTH * LENGTH + 1]
        size = len(tokenizer.decode(held.tolist()).encode()) / len(held)
        nats = model_nats(s, weights, held)
        baselines = [measure(train, held, s.vocabulary) for measure in (unigram_nats, bigram_nats)]
        cells = " | ".join(f"{np.exp(n):.1f}" for n in (*baselines, nats))
        print(f"| {source} | {len(held):,} | {size:.2f} | {cells} | {nats / np.log(2) / size:.2f} |", flush=True)

    generator = torch.Generator().manual_seed(arguments.seed)
    frame = {role: tokenizer.token_to_id(f"<|{role}|>") for role in ("bos", "end", "user", "assistant")}
    for turns in DIALOGUES:
        ids = [frame["bos"]]
        print()
        for text in turns:
            spoken = tokenizer.encode(text, add_special_tokens=False).ids
            ids += [frame["user"], *spoken, frame["end"], frame["assistant"]]
            answer = reply(s, weights, tokenizer, ids, generator, arguments.temperature)
            ids += answer if answer[-1] == frame["end"] else [*answer, frame["end"]]
            print(f"> **{text}**  \n> {tokenizer.decode(answer)}  ", flush=True)


if __name__ == "__main__":
    main()
