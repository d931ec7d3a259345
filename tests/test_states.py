"""Recurrent states over a conversation: what can be gone back to, and that every way to a position gives one answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from fakes import copied
from tiny_models import END, VOCABULARY, qwen3next

import localmoe
from localmoe.errors import DeviceError
from localmoe.inspection import report
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.states import BACK, States
from localmoe.network import Network
from localmoe.notebook import LoadedModel
from localmoe.sampling import SamplingSettings

GREEDY = SamplingSettings(temperature=0, max_tokens=12)
LONG = [i * 37 % 256 for i in range(290)]


def stepped(states: States, position: int, tokens: int, *, marked: bool = True) -> None:
    """What `Model.forward` does with a step."""
    position = states.nearest(position)
    states.forget(position)
    states.finish(states.begin(position, tokens, marked=marked), position, tokens)


def test_without_recurrent_layers_every_position_will_do() -> None:
    states = States(0)
    stepped(states, 0, 40)
    assert states.nearest(17) == 17


def test_a_part_of_a_prompt_can_be_gone_back_to_near_its_end_and_decoded_tokens_cannot() -> None:
    states = States(4)
    stepped(states, 0, 100)
    for position in range(100, 130):
        stepped(states, position, 1, marked=False)
    assert [states.nearest(n) for n in (130, 129, 100, 100 - BACK, 99 - BACK)] == [130, 84, 84, 84, 0]


def test_of_a_short_part_its_beginning_is_kept() -> None:
    states = States(4)
    stepped(states, 0, 100)
    stepped(states, 100, 5)
    assert [states.nearest(n) for n in (105, 104, 100, 99)] == [105, 100, 100, 84]


def test_what_was_forgotten_is_not_gone_back_to() -> None:
    states = States(6)
    for position in (0, 100, 200):
        stepped(states, position, 100)
    states.forget(190)
    assert [states.nearest(n) for n in (300, 190, 183)] == [184, 184, 84]


def test_states_from_elsewhere_are_gone_back_to() -> None:
    states = States(4)
    states.put(states.emptied(), 50)
    stepped(states, 50, 60)
    assert [states.nearest(n) for n in (110, 93, 50, 49)] == [110, 50, 50, 0]
    assert states.positions() == [50, 94, 110]


@pytest.mark.parametrize("count", [3, 4, 10])
def test_the_last_mark_always_stays_and_the_others_spread(count: int) -> None:
    states, position = States(count), 0
    for _ in range(40):
        stepped(states, position, 50)
        position += 50
        for _ in range(10):
            stepped(states, position, 1, marked=False)
            position += 1
        assert states.nearest(position - 11) == position - 10 - BACK
    marks = sorted({states.nearest(n) for n in range(position)} - {0})
    assert len(marks) == count - 2
    gaps = np.diff([0, *marks[:-1]])
    assert count < 10 or gaps.max() <= 4 * max(gaps.min(), position / 16)


@pytest.mark.parametrize("count", [3, 5])
def test_an_interrupted_step_leaves_what_it_came_from(count: int) -> None:
    states = States(count)
    stepped(states, 0, 100)
    slots = states.begin(100, 60, marked=True)
    assert len({slots.source, slots.target, slots.kept}) == 3
    assert [states.nearest(n) for n in (160, 100)] == [100, 100]
    stepped(states, 100, 60)
    assert states.nearest(160) == 160


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3next(tmp_path_factory.mktemp("states") / "delta.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[LoadedModel]:
    opened = localmoe.load(path, kv_format="f32")
    yield opened
    opened.close()


def alike(found: Any, expected: Any) -> bool:
    return bool(np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max())


def test_the_states_are_those_of_the_text_however_it_came_to_be(model: LoadedModel, path: Path) -> None:
    """A random walk through a conversation: on, back, and on with other tokens."""
    random, other = Random(3), localmoe.load(path, kv_format="f32")
    for _ in range(120):
        length = len(model.cached)
        tokens = [random.randrange(VOCABULARY) for _ in range(random.choice((1, 1, 1, 2, 16, 17, 40)))]
        position = max(length - random.choice((0, 0, 0, 1, 5, 17, 60)), 0) if length < 240 else random.randrange(100)
        text = model.cached[:position] + tokens
        found = model.forward(tokens, position, prompt=random.random() < 0.5)
        assert model.cached == text
        assert alike(found[-1], other.forward(text, 0)[-1]), (length, position, len(tokens))
    other.close()


def test_another_answer_to_the_same_prompt_runs_few_tokens_again(model: LoadedModel) -> None:
    first = [step.token for step in model.generate(LONG[:200], GREEDY)]
    chat = model.chat(system=None)
    again = [step.token for step in chat.session.engine.generate(LONG[:200], GREEDY)]
    assert again == first
    assert chat.session.engine.stats.reused_tokens == 200 - BACK


def test_a_conversation_is_taken_back_and_edited(model: LoadedModel, path: Path) -> None:
    """Regenerated, and with an earlier message changed: the answers are those of a model that saw nothing else."""

    def fresh() -> str:
        other = localmoe.load(path, kv_format="f32", threads=1)
        chat = other.chat(system=None)
        chat.session.settings = GREEDY
        *before, question, _ = session.conversation.path()
        chat.session.start(copied(session.conversation, before[-1].id))
        answer = "".join(chat.send(question.content))
        other.close()
        return answer

    chat = model.chat(system=None)
    session = chat.session
    session.settings = GREEDY
    for text in ("hello there, how are you today?", "tell me about the cat", "and more"):
        "".join(chat.send(text))
    regenerated = "".join(piece.text for piece in session.regenerate())
    assert regenerated == fresh()
    session.conversation.move(session.conversation.path()[1].id)
    edited = "".join(chat.send("tell me about the dog instead"))
    assert edited == fresh()


def test_scoring_between_two_steps_of_an_answer_does_not_disturb_it(model: LoadedModel) -> None:
    alone = [step.token for step in model.generate(LONG[:100], GREEDY)]
    found = []
    for step in model.generate(LONG[:100], GREEDY):
        found.append(step.token)
        model.logits(LONG[50:70])
    assert found == alone


def interrupted_after(pieces: int, run: Any) -> Any:
    """`run` so many times, then Ctrl+C."""
    left = iter([run] * pieces)

    def piece(tape: Any) -> None:
        effect = next(left, None)
        if effect is None:
            raise KeyboardInterrupt
        effect(tape)

    return piece


def test_a_chunk_interrupted_anywhere_applies_none_of_its_tokens(model: LoadedModel) -> None:
    device = model.device
    assert isinstance(device, CpuDevice)
    expected, run = model.forward(LONG[:160], 0), device.threads_run
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "threads_run", lambda tape: (counted.append(1), run(tape)))
        model.forward(LONG[:100], 0)
    for pieces in range(len(counted)):
        model.forward(LONG[:100], 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "threads_run", interrupted_after(pieces, run))
            with pytest.raises(KeyboardInterrupt):
                model.forward(LONG[100:160], 100, prompt=True)
        assert model.cached == LONG[:100]
        assert model.resumes(100) == 100
        assert np.array_equal(model.forward(LONG[100:160], 100, prompt=True), expected), pieces


def test_the_context_may_be_filled_to_its_end_and_gone_back_from(path: Path) -> None:
    opened = localmoe.load(path, context=40)
    settings = SamplingSettings(temperature=0)
    steps = [step.token for step in opened.generate(LONG[:24], settings)]
    assert len(steps) == 17 or steps[-1] == END
    assert [step.token for step in opened.generate(LONG[:24], settings)] == steps
    with pytest.raises(DeviceError, match=r"41 .* 40"):
        opened.forward(LONG[:41], 0)
    assert opened.resumes(24) == 24 - BACK
    opened.close()


def test_threads_change_no_bit(path: Path) -> None:
    answers = []
    for threads in (1, 2, 3):
        opened = localmoe.load(path, threads=threads)
        answers.append(np.concatenate([opened.forward(LONG[:100], 0), opened.forward([5], 100), opened.logits(LONG)]))
        opened.close()
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


def test_memory_counts_every_slot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(localmoe.loader.locate.open_source(path))  # type: ignore[attr-defined]
    program = network.program(1)
    once = 3 * 4 * (4 * 32 * 32 + 4 * 256)  # 3 layers: 4 heads of 32 by 32, and 3 rows of 256 channels padded to 4
    assert (program.state_nbytes, program.state_slots) == (once, 10)
    cache, _ = CpuDevice.needed_nbytes([program], 100, "f16")
    assert cache == 100 * program.cache_nbytes(localmoe.formats.F16) + 10 * once  # type: ignore[attr-defined]
    rows = {name: value for _, section in report(path) for name, value in section}
    assert rows["recurrent states"] == "614 kB: 61.4 kB at each of 10 positions to go on from"
    monkeypatch.setattr(localmoe.network, "available_nbytes", lambda: 10 * once + 30 * 128)
    with pytest.raises(DeviceError, match=r"for keys, values and recurrent states, .* at most 30 tokens fit"):
        localmoe.load(path)
