"""Original small talk for the demo model, drawn at random from small_talk.txt; knows text only."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

Slots = dict[str, list[dict[str, str]]]
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a friendly chat partner.",
    "Answer briefly.",
    "Be kind and friendly.",
    "You are the localmoe demo model.",
    "You are a helpful, friendly assistant. Keep your answers short.",
)
CHOICE = re.compile(r"\(([^()]*)\)")
SLOT = re.compile(r"\{(\w+)\}")


def read(path: Path) -> tuple[Slots, dict[str, list[list[str]]]]:
    """Slots by name (each value a record of its columns) and blocks of turns by kind: greeting, closing, topic."""
    slots: Slots = {}
    blocks: dict[str, list[list[str]]] = {"greeting": [], "closing": [], "topic": []}
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line and not line.startswith("#")]
        kind = lines.pop(0)[1:] if lines and lines[0].startswith("@") else "topic"
        turns = [line[3:] for line in lines if line[:3] in ("u: ", "a: ")]
        for line in lines:
            if line.startswith("list "):
                columns, values = line.removeprefix("list ").split(" = ")
                names = columns.split(" > ")
                records = [dict(zip(names, value.split(" > "), strict=True)) for value in values.split(" / ")]
                slots |= dict.fromkeys(names, records)
        if turns:
            blocks["topic" if kind == "often" else kind] += [turns] * (4 if kind == "often" else 1)
    return slots, blocks


def spoken(pattern: str, values: dict[str, str], slots: Slots, rng: random.Random) -> str:
    """One turn of the pattern: choices made, slots filled (and kept in `values`), sentences with a capital."""
    text = rng.choice(top_level_choices(pattern))
    while match := CHOICE.search(text):
        text = text[: match.start()] + rng.choice(match.group(1).split("|")) + text[match.end() :]
    lower = text.strip()[:1].islower()

    def filled(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in values:
            values.update(rng.choice(slots[name]) if name in slots else addition(rng))
        return values[name]

    text = re.sub(r"\s+", " ", SLOT.sub(filled, text)).strip()
    return text if lower else re.sub(r"(^|[.!?] )([a-z])(?!ocalmoe)", lambda m: m.group(1) + m.group(2).upper(), text)


def top_level_choices(pattern: str) -> list[str]:
    """The alternatives of a line: parts between " | " outside parentheses."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(pattern):
        depth += (character == "(") - (character == ")")
        if depth == 0 and pattern[index : index + 3] == " | ":
            parts.append(pattern[start:index])
            start = index + 3
    return [*parts, pattern[start:]]


def addition(rng: random.Random) -> dict[str, str]:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    return {"a": str(a), "b": str(b), "sum": str(a + b)}


def block_turns(block: list[str], slots: Slots, rng: random.Random) -> list[str]:
    """The turns of one block with one set of slot values, cut off at a random answer."""
    values: dict[str, str] = {}
    pairs = len(block) // 2
    kept = 1
    while kept < pairs and rng.random() < 0.7:
        kept += 1
    return [spoken(line, values, slots, rng) for line in block[: 2 * kept]]


def conversations(count: int, rng: random.Random) -> Iterator[list[str]]:
    """`count` conversations: perhaps a system text and a greeting, one to five topics, perhaps a farewell."""
    slots, blocks = read(Path(__file__).with_name("small_talk.txt"))
    for _ in range(count):
        turns: list[str] = []
        if rng.random() < 0.15:
            turns.append("system:" + rng.choice(SYSTEM_TEXTS))
        if rng.random() < 0.4:
            turns += block_turns(rng.choice(blocks["greeting"]), slots, rng)
        for block in rng.sample(blocks["topic"], rng.choice((1, 1, 2, 2, 3, 4, 5))):
            turns += block_turns(block, slots, rng)
        if rng.random() < 0.3:
            turns += block_turns(rng.choice(blocks["closing"]), slots, rng)
        yield turns


def echoes(count: int, words: Sequence[str], rng: random.Random) -> Iterator[list[str]]:
    """`count` conversations that reward looking back, not learning by heart: words to repeat, words as names."""
    for _ in range(count):
        turns: list[str] = []
        for _ in range(rng.randint(1, 4)):
            said = " ".join(rng.choices(words, k=rng.randint(2, 10)))
            asked = rng.choice(("Repeat after me:", "Say", "Please say", "Can you say", "Repeat:", "Please repeat:"))
            turns += [f"{asked} {said}", f"{rng.choice(('You said:', 'All right:', 'Okay:', 'I say'))} {said}"]
        name, other = (word.capitalize() for word in rng.sample(words, 2))
        animal = rng.choice(("dog", "cat", "rabbit", "horse", "bird", "friend", "brother", "sister"))
        greeting = [
            f"{rng.choice(('My name is', 'I am', 'Hello, my name is', 'Please call me'))} {name}.",
            f"{rng.choice(('Nice to meet you,', 'Hello,', 'Hi,', 'Welcome,'))} {name}!",
        ]
        friend = [
            f"My {animal} is called {other}.",
            f"{rng.choice(('How nice!', 'I see!'))} Your {animal} is called {other}.",
        ]
        questions = [
            ["What is my name?", f"Your name is {name}."],
            [f"What is my {animal} called?", f"Your {animal} is called {other}."],
        ]
        middle = turns if rng.random() < 0.5 else []
        yield [*greeting, *friend, *middle, *(turn for pair in rng.sample(questions, 2) for turn in pair)]
