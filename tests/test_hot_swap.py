"""Claims about changing model, template and loading in mid-conversation: the next answer is that of a fresh process."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fakes import copied
from gguf_writing import ARRAY, STRING, Typed
from rich.console import Console
from tiny_models import CONTROL, byte_alphabet, deepseek2, qwen3moe, qwen3next

import localmoe
from localmoe.errors import ContextError, SettingError
from localmoe.experts.loading import Loading
from localmoe.loader.locate import bundled
from localmoe.notebook import LoadedModel
from localmoe.repl.commands import execute
from localmoe.repl.models import OpenModels
from localmoe.repl.render import Screen
from localmoe.repl.talk import Talk
from localmoe.session import Session
from localmoe.template_fit import open_template

GREEDY = {"temperature": 0, "max_tokens": 8}
ANSWERS = 8


def other_vocabulary(template: str) -> dict[str, Any]:
    """The same bytes by other ids, other pairs, and control tokens of another order."""
    tokens = [*CONTROL[::-1], *byte_alphabet()[::-1], "th", "the", "in"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": Typed(ARRAY, tokens, STRING),
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (256 + 3),
        "tokenizer.ggml.merges": ["t h", "th e", "i n"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": template,
    }


TURNED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("swapped")
    return {
        "qwen": qwen3moe(folder / "qwen.gguf"),
        "deepseek": deepseek2(folder / "deepseek.gguf", **pad(other_vocabulary(TURNED))),
        "delta": qwen3next(folder / "delta.gguf", seed=3),
        "demo": bundled(),
    }


def pad(vocabulary: dict[str, Any]) -> dict[str, Any]:
    """As many tokens as the tiny models have rows."""
    tokens = vocabulary["tokenizer.ggml.tokens"]
    del tokens.value[260:]
    del vocabulary["tokenizer.ggml.token_type"][260:]
    vocabulary["tokenizer.ggml.merges"] = ["t h"]
    return vocabulary


def opened(path: Path) -> LoadedModel:
    return localmoe.load(path, threads=1, context=512, kv_format="f32")


@pytest.fixture
def talk(files: dict[str, Path]) -> Iterator[Talk]:
    console = Console(file=io.StringIO(), width=80, highlight=False, color_system=None)
    model = opened(files["qwen"])
    models = OpenModels(model, lambda path, loading: opened(path))
    with closing(models):
        yield Talk(Session(model, settings=GREEDY), Screen(console, console), models)


def said(session: Session, text: str) -> str:
    return "".join(piece.text for piece in session.send(text))


def fresh_answer(talk: Talk, text: str) -> str:
    """What a process says that opens the same model and finds the same conversation."""
    session = talk.session
    with closing(opened(talk.models.current.path)) as model:
        named = session.given_template
        conversation = copied(session.conversation, session.conversation.head)
        template = open_template(model.tokenizer, named) if named else None
        other = Session(model, template, session.chosen, conversation=conversation)
        other.overflow = session.overflow
        return said(other, text)


def check(talk: Talk, text: str) -> None:
    expected = fresh_answer(talk, text)
    assert said(talk.session, text) == expected, talk.screen.console.file.getvalue()


def test_each_model_answers_as_if_it_had_been_there_all_the_time(talk: Talk, files: dict[str, Path]) -> None:
    said(talk.session, "hello there")
    for name in ("deepseek", "demo", "qwen", "delta", "deepseek", "qwen"):
        execute(talk, f"/model {files[name]}")
        assert talk.models.current.path == files[name]
        check(talk, f"and what about {name} in the end?")


def test_a_model_that_was_left_has_not_forgotten_what_it_read(talk: Talk, files: dict[str, Path]) -> None:
    said(talk.session, "hello there")
    execute(talk, f"/model {files['deepseek']}")
    said(talk.session, "again")
    before = talk.models
    execute(talk, f"/model {files['qwen']}")
    said(talk.session, "and again")
    assert talk.models is before
    assert talk.session.engine.stats.reused_tokens > 0
    assert talk.session.model.cached, "the first one's cache"


@pytest.mark.parametrize("name", ["zephyr", "chatml", "own"])
def test_each_template_answers_as_if_it_had_been_there_all_the_time(talk: Talk, name: str) -> None:
    said(talk.session, "hello there")
    execute(talk, "/template chatml")
    said(talk.session, "more of it")
    execute(talk, f"/template {name}")
    check(talk, "and now?")


@pytest.mark.parametrize("seed", range(6))
def test_after_any_sequence_of_changes_the_next_answer_is_that_of_a_fresh_process(
    talk: Talk, files: dict[str, Path], seed: int
) -> None:
    random = Random(seed)
    changes = [
        *(f"/model {path}" for name, path in files.items() if name != "demo"),
        *(f"/template {name}" for name in ("own", "chatml", "zephyr")),
        *(f"/lazy {mode}" for mode in ("off", "mmap", "slots", "auto")),
        *("/regen", "/undo", "/edit 1 something else", "/branch 1", "/trim 1", "/system be brief", '/system ""'),
        *("say the thing", "say in other words", "say ab ab"),
    ]
    said(talk.session, "hello there")
    for _ in range(ANSWERS):
        for line in random.choices(changes, k=4):
            try:
                if line.startswith("/"):
                    execute(talk, line)
                else:
                    said(talk.session, line.removeprefix("say "))
            except (ContextError, SettingError):  # full, or nothing to undo
                execute(talk, "/clear")
        check(talk, "and then?")


def test_loading_lazily_changes_nothing(talk: Talk) -> None:
    said(talk.session, "hello there")
    for mode in ("slots", "off", "mmap", "slots"):
        execute(talk, f"/lazy {mode}")
        assert talk.model.loading == Loading(mode)
        check(talk, f"and with {mode}?")
