"""Build the demo model's data set: cleaned chat turns, a byte-level BPE tokenizer, token streams; knows no model.

    python data.py CORPORA OUT [--seed 1] [--tokenizer-of MODEL.gguf]

Writes OUT/tokenizer.json and OUT/data.npz with, per source and split, `tokens` (uint16) and `roles` (uint8: 0 frame or
system, 1 user, 2 assistant) of all documents one after another, each begun by <|bos|>. Used: self-dialogue (BSD-3),
chitchat (MIT), chatterbot-english (BSD-3) and the dialogues of talk.py (our own). Left out: Shakespeare and the Wizard
of Oz (no small talk), gsm8k (beyond a model of this size), wikitext2 (licence).
"""

from __future__ import annotations

import argparse
import csv
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import yaml
from talk import conversations, echoes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
BOS, END, USER, ASSISTANT, SYSTEM = range(5)
CHATTERBOT = (
    "ai computers conversations food greetings history humor literature money movies science sports trivia".split()
)
HELD_OUT = {"dialogue": 0.02, "chitchat": 0.03, "chatterbot": 0.03, "talk": 0.03, "echo": 0.03}
DRAWN_CONVERSATIONS, DRAWN_ECHOES = 60_000, 12_000

Turns = list[str]  # user first, then in turn; a leading "system:" turn is told apart by its prefix

TYPOGRAPHY = str.maketrans(
    dict(
        zip(
            "\u2019\u2018\u201c\u201d\u2026\u2013\u2014\u00a0`",
            ("'", "'", '"', '"', "...", "-", "-", " ", "'"),
            strict=True,
        )
    )
)
CONTRACTIONS = {
    word.replace("'", "").lower(): word
    for word in (
        "don't didn't doesn't isn't wasn't aren't weren't haven't hasn't hadn't wouldn't couldn't shouldn't that's "
        "what's there's they're you're you've they've can't won't let's who's I'm I've I'd"
    ).split()
} | {"alot": "a lot", "u": "you", "ur": "your"}
REPLACED = re.compile(r"\b(" + "|".join(sorted(CONTRACTIONS, key=len, reverse=True)) + r")\b", re.IGNORECASE)
IN_DISTRESS = (
    "I'm sorry that you feel this way. Please talk to someone you trust, or to a doctor, right now. You are not alone."
)
COARSE = re.compile(
    r"\b(fuck\w*|shit\w*|bitch\w*|nigg\w*|cunt|whore|rape\w*|slut|porn\w*|sexy|asshole|faggot)\b", re.IGNORECASE
)
# what talk.py answers in this model's own name
IDENTITY = re.compile(
    r"\b(who|what) (are|r) (you|u)\b|your name|(can|do) (you|u) do\b|\b(made|created|built) you", re.IGNORECASE
)
OTHER_BOTS = re.compile("chatterbot|alice|gunther", re.IGNORECASE)


def tidy(text: str) -> str:
    """One turn in ordinary spelling: plain quotes, the pronoun I, lost apostrophes, a capital first, a mark last."""
    text = re.sub(r"\s+", " ", text.translate(TYPOGRAPHY)).strip()
    text = re.sub(r"\s+([,.!?;:])", r"\1", text)
    text = re.sub(r"([!?])\1+", r"\1", re.sub(r"\.{4,}", "...", text))
    text = re.sub(r"\bi\b(?!\.e)", "I", text)
    text = REPLACED.sub(lambda match: restored(match.group(0)), text)
    text = re.sub(r"\bi'(m|ve|d|ll)\b", r"I'\1", text)
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?\"')" else text + "."


def restored(word: str) -> str:
    """The word with its apostrophe, keeping a capital."""
    right = CONTRACTIONS[word.lower()]
    return right[0].upper() + right[1:] if word[0].isupper() else right


def acceptable(turns: Turns) -> bool:
    """Plain ASCII talk of several words, not shouted, not coarse, no turn said twice in a row."""
    text = " ".join(turns)
    letters = [c for c in text if c.isalpha()]
    return (
        text.isascii()
        and len(letters) > 4 * len(turns)
        and sum(c.isupper() for c in letters) < 0.2 * len(letters)
        and not COARSE.search(text)
        and all(a != b for a, b in pairwise(turns))
        and "http" not in text
    )


def self_dialogues(folder: Path) -> Iterator[Turns]:
    """The Self-dialogue Corpus (Fainberg et al. 2018, arXiv 1809.06641): one worker wrote both sides of each."""
    seen: set[str] = set()
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                columns = sorted((c for c in row if c and c.startswith("Answer.sentence")), key=lambda c: int(c[15:]))
                turns = [tidy(row[c] or "") for c in columns if (row[c] or "").strip()]
                key = " ".join(turns[:6]).lower()
                if row.get("AssignmentStatus") == "Rejected" or len(turns) < 4 or key in seen or not acceptable(turns):
                    continue
                seen.add(key)
                yield turns


def chitchat(folder: Path) -> Iterator[Turns]:
    """Question and answer pairs of Microsoft's chit-chat data set in its friendly and enthusiastic voices."""
    for path in sorted(folder.glob("*.tsv")):
        if "Humorous" in path.name:
            continue
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            question, answer, *_ = line.split("\t")
            # a model this small would garble the telephone number of a help line
            turns = [question.strip(), IN_DISTRESS if re.search(r"\d{3}", answer) else tidy(answer)]
            if " ".join(turns).translate(TYPOGRAPHY).isascii() and not COARSE.search(answer):
                yield [turns[0].translate(TYPOGRAPHY), turns[1]]


def chatterbot(folder: Path) -> Iterator[Turns]:
    """The small-talk files of the ChatterBot corpus; replies with the name of another bot are left out."""
    for name in CHATTERBOT:
        for turns in yaml.safe_load((folder / f"{name}.yml").read_text(encoding="utf-8"))["conversations"]:
            spoken = [tidy(str(turn)) for turn in turns]
            text = " ".join(spoken)
            if len(spoken) >= 2 and text.isascii() and not OTHER_BOTS.search(text):
                yield spoken


def joined(pairs: list[Turns], rng: random.Random) -> list[Turns]:
    """Pairs as they are, and again as conversations of two to six pairs, so that a longer chat is nothing new."""
    shuffled = rng.sample(pairs, len(pairs))
    documents = list(pairs)
    while shuffled:
        count = rng.randint(2, 6)
        documents.append([turn for pair in shuffled[:count] for turn in pair[: len(pair) // 2 * 2]])
        shuffled = shuffled[count:]
    return documents


def typed(turns: Turns, rng: random.Random) -> Turns:
    """The turns with the user's as people type them: some without the last mark, some in small letters."""

    def form(text: str) -> str:
        draw = rng.random()
        if draw < 0.15:
            return text.rstrip(".?!") or text
        return text.lower() if draw < 0.3 else text

    first = int(turns[0].startswith("system:"))
    return turns[:first] + [form(text) if index % 2 == 0 else text for index, text in enumerate(turns[first:])]


def split(documents: Iterable[Turns], share: float, rng: random.Random) -> tuple[list[Turns], list[Turns]]:
    kept, held = [], []
    for turns in documents:
        (held if rng.random() < share else kept).append(turns)
    return kept, held


def common_words(documents: list[Turns]) -> list[str]:
    """Words of three letters and more that occur at least a hundred times in small letters."""
    counts = Counter(word for turns in documents for turn in turns for word in re.findall(r"\b[a-z]{3,}\b", turn))
    return sorted(word for word, count in counts.items() if count >= 100)


def encode(tokenizer: Tokenizer, documents: list[Turns]) -> tuple[np.ndarray, np.ndarray]:
    """Token and role streams of the documents, in the chat template's form."""
    tokens: list[int] = []
    roles: list[int] = []
    for turns in documents:
        tokens.append(BOS)
        roles.append(0)
        if turns[0].startswith("system:"):
            text = tokenizer.encode(turns[0].removeprefix("system:").strip(), add_special_tokens=False).ids
            tokens += [SYSTEM, *text, END]
            roles += [0] * (len(text) + 2)
            turns = turns[1:]
        for index, text in enumerate(tokenizer.encode_batch(turns, add_special_tokens=False)):
            tokens += [ASSISTANT if index % 2 else USER, *text.ids, END]
            roles += [0, *[1 + index % 2] * (len(text.ids) + 1)]
    return np.array(tokens, np.uint16), np.array(roles, np.uint8)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer (`tokenizer.ggml.pre` is "gpt-2"), control tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def stored_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file that export.py wrote."""
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer-of", type=Path, help="take the tokenizer of this GGUF file, do not train one")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)

    sources = {
        "dialogue": list(self_dialogues(arguments.corpora / "self-dialogue")),
        "chitchat": list(chitchat(arguments.corpora / "chitchat")),
        "chatterbot": list(chatterbot(arguments.corpora / "chatterbot-english")),
    }
    splits = {name: split(documents, HELD_OUT[name], rng) for name, documents in sources.items()}
    talk_rng = random.Random(arguments.seed + 1)
    splits["talk"] = split(conversations(DRAWN_CONVERSATIONS, talk_rng), HELD_OUT["talk"], talk_rng)
    echo_rng = random.Random(arguments.seed + 2)
    drawn = echoes(DRAWN_ECHOES, common_words(splits["dialogue"][0]), echo_rng)
    splits["echo"] = split(drawn, HELD_OUT["echo"], echo_rng)
    if arguments.tokenizer_of:
        tokenizer = stored_tokenizer(arguments.tokenizer_of)
    else:
        tokenizer = train_tokenizer(turn for name in sources for turns in splits[name][0] for turn in turns)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    kept, held = splits["chitchat"]
    splits["chitchat"] = [t for t in kept if not IDENTITY.search(t[0])], [t for t in held if not IDENTITY.search(t[0])]
    streams = {}
    for name, (kept, held) in splits.items():
        if name == "dialogue":
            kept = kept + [turns[1:] for turns in kept]
        elif name == "talk":
            kept = [typed(turns, talk_rng) for turns in kept]
        elif name != "echo":
            kept = joined([typed(turns, rng) for turns in kept for _ in range(2)], rng)
        rng.shuffle(kept)
        for part, documents in (("train", kept), ("held", held)):
            tokens, roles = encode(tokenizer, documents)
            streams |= {f"{name}.{part}.tokens": tokens, f"{name}.{part}.roles": roles}
            print(f"{name:11} {part:6} {len(documents):7,} documents {len(tokens):10,} tokens")
    np.savez(arguments.out / "data.npz", **streams)


if __name__ == "__main__":
    main()
