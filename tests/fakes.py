"""A model without weights: a byte tokenizer, a template, and logits that spell scripted answers; knows no real file."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from localmoe.conversation.tree import Conversation
from localmoe.errors import DeviceError
from localmoe.experts.loading import Loading
from localmoe.experts.telemetry import Counts, Room

SPECIALS = {"<|user|>": 256, "<|assistant|>": 257, "<|system|>": 258, "<|end|>": 259, "<|pad|>": 260}
USER, ASSISTANT, SYSTEM, END, PAD = SPECIALS.values()
PAIR = 261  # "ab", which the encoder always joins and the model never does
VOCABULARY = 262
PIECES = {**{id: text.encode() for text, id in SPECIALS.items()}, PAIR: b"ab"}


class ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return "" if USER <= id <= PAD else self._decoder.decode(PIECES.get(id) or bytes([id]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    bos: int | None = None
    eos: int | None = END
    stop = frozenset({END})
    vocabulary_size = VOCABULARY

    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]:
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, SPECIALS)) + ")", text):
            if part in SPECIALS and special:
                ids.append(SPECIALS[part])
            else:
                for run in re.split("(ab)", part):
                    ids.extend([PAIR] if run == "ab" else run.encode())
        return ids

    def encode_prompt(self, rendered: str) -> list[int]:
        return self.encode(rendered)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        stream = ByteStream()
        return "".join(map(stream.push, ids)) + stream.finish()

    def token(self, id: int) -> str:
        return (PIECES.get(id) or bytes([id])).decode(errors="replace")

    def is_special(self, id: int) -> bool:
        return USER <= id <= PAD

    def stream(self, *, continues: bool = False) -> ByteStream:
        return ByteStream()


class HarmonyTokenizer(ByteTokenizer):
    """With gpt-oss's control tokens in the place of others."""

    NAMES: ClassVar[dict[int, str]] = {PAD: "<|channel|>", SYSTEM: "<|message|>", USER: "<|start|>"}

    def token(self, id: int) -> str:
        return self.NAMES.get(id) or super().token(id)


class PlainTemplate:
    """`<|role|>content<|end|>` for each message; `prefill` is put after the last `<|assistant|>`."""

    name = "plain"
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"

    def __init__(self, prefill: str = "") -> None:
        self.prefill = prefill

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)
        return text + "<|assistant|>" + self.prefill if add_generation_prompt else text


class FakeModel:
    """Spells `replies[last user message]` byte by byte and then `<|end|>`; a reply may also be given as token ids.

    `cached` is what the KV cache would hold, `calls` the (position, tokens) of each forward; `before_call` runs first
    in each. In slots mode each step counts `step_counts`; `trouble` is why a loading mode cannot be changed.
    """

    name, architecture, path, threads, nbytes = "fake-moe", "fake", Path("fake.gguf"), 2, 1_234_000
    left_out = ""

    def __init__(
        self, replies: Mapping[str, str | list[int]] | None = None, *, context: int = 512, chunk: int = 16
    ) -> None:
        self.replies = replies or {}
        self.context, self.chunk, self.trained_context = context, chunk, 512
        self.tokenizer = ByteTokenizer()
        self.template: PlainTemplate | None = PlainTemplate()
        self.reasoning: tuple[str, str] | None = None
        self.recommended: dict[str, float | int] = {"temperature": 0}
        self.metadata: dict[str, Any] = {}
        self.cached: list[int] = []
        self.calls: list[tuple[int, list[int]]] = []
        self.before_call: Callable[[], None] = lambda: None
        self.shifts: list[tuple[int, int]] = []
        self.closed = False
        self.device = SimpleNamespace(cpus=())
        self.loading, self.residency_mode, self.loading_reason = Loading(), "mmap", "all of it fits"
        self.loading_problem = ""
        self.trouble = ""
        self.step_counts = Counts(
            steps=1, tokens=1, chosen=8, hits=6, nbytes_read=5_000_000, waited_seconds=0.25, seconds=0.5
        )
        self.counted = Counts()
        self.had_room: Room | None = None
        self.chosen: np.ndarray | None = None
        self.expert_blocks: list[int] = []

    def change_loading(self, loading: Loading, progress: object = None) -> None:
        if self.trouble:
            raise DeviceError(self.trouble)
        self.loading = loading
        self.residency_mode = "slots" if loading.mode == "auto" else loading.mode
        self.loading_reason = "as asked" if loading.mode != "auto" else "slots: 7.80 GB of weights, 4.20 GB free"

    def counts(self) -> Counts:
        return self.counted

    def room(self) -> Room | None:
        return self.had_room if self.residency_mode == "slots" else None

    def uses(self) -> np.ndarray | None:
        return self.chosen

    def cache_nbytes(self, tokens: int) -> int:
        return 1000 * tokens

    @property
    def has_template(self) -> bool:
        return self.template is not None

    def forward(
        self, tokens: Sequence[int], position: int, all_logits: bool = False, *, prompt: bool = False
    ) -> np.ndarray:
        assert 1 <= len(tokens) <= self.chunk, "a step of the wrong length"
        assert position <= len(self.cached), "a hole in the cache"
        assert position + len(tokens) <= self.context, "beyond the context"
        self.calls.append((position, list(tokens)))
        del self.cached[position:]
        self.before_call()
        self.cached.extend(tokens)
        if self.residency_mode == "slots":
            self.counted += replace(self.step_counts, tokens=len(tokens))
        logits = np.zeros((1, VOCABULARY), np.float32)
        logits[0, self._next()] = 20
        return logits

    def resumes(self, position: int) -> int:
        return position

    shift_obstacle = ""

    @property
    def unshifted(self) -> int:
        return min(self.shifts[-1][0], len(self.cached)) if self.shifts else len(self.cached)

    def shift(self, start: int, stop: int) -> None:
        self.shifts.append((start, stop))
        del self.cached[start:stop]

    def close(self) -> None:
        self.closed = True

    def _next(self) -> int:
        if ASSISTANT not in self.cached:
            return ord("?")
        start = len(self.cached) - self.cached[::-1].index(ASSISTANT)
        question = self.tokenizer.decode(self.cached[:start], special=False)
        last = next((key for key in self.replies if question.endswith(key)), "")
        reply = self.replies.get(last, "?")
        target = [*(reply.encode() if isinstance(reply, str) else reply), END]
        spelt = len(self.cached) - start
        return target[spelt] if spelt < len(target) else END


def copied(conversation: Conversation, head: int) -> Conversation:
    """The same branch up to `head`, as another process finds it."""
    copy, ids = Conversation(), {0: 0}
    copy.set_system(conversation.system)
    for message in conversation.path(head):
        if message.role == "user":
            copy.add(message.content)
        else:
            copy.begin(message.model)
            copy.grow(message.content, message.tokens)
            copy.end(message.finish)
        ids[message.id] = copy.head
    if conversation.first in ids:
        copy.trim(ids[conversation.first], conversation.summary)
    return copy
