"""An opened model through the Python face: logits, generate and chat on tiny files, and what is refused in one line."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import END, VOCABULARY, deepseek2, qwen3moe, qwen3next

import localmoe
import localmoe.network
from localmoe.errors import DeviceError, LocalMoeError, SettingError, TemplateError, TokenizerError, UnsupportedError
from localmoe.notebook import LoadedModel
from localmoe.sampling import SamplingSettings

GREEDY = SamplingSettings(temperature=0, max_tokens=12)
PROMPT = list(b"the quick brown fox")
LONG = [i * 37 % 256 for i in range(290)]  # more than a chunk of 256


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "gqa": qwen3moe(folder / "gqa.gguf"),
        "gqa-q8": qwen3moe(folder / "gqa-q8.gguf", format="Q8_0"),
        "mla": deepseek2(folder / "mla.gguf"),
        "mla-q8": deepseek2(folder / "mla-q8.gguf", format="Q8_0"),
        "delta": qwen3next(folder / "delta.gguf"),
        "delta-q8": qwen3next(folder / "delta-q8.gguf", format="Q8_0"),
    }


@pytest.fixture(scope="module", params=["gqa-q8", "mla-q8", "delta-q8"])
def model(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[LoadedModel]:
    opened = localmoe.load(files[request.param])
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["gqa", "mla", "delta"])
def exact(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[LoadedModel]:
    """A model of float32 weights: nothing is rounded to 8 bits."""
    opened = localmoe.load(files[request.param], kv_format="f32")
    yield opened
    opened.close()


def tokens(model: LoadedModel, ids: list[int], settings: SamplingSettings = GREEDY) -> list[int]:
    return [step.token for step in model.generate(ids, settings)]


def close_to(found: Any, expected: Any, tolerance: float) -> bool:
    return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())


def test_logits_have_a_row_for_each_token_and_a_column_for_each_id(model: LoadedModel) -> None:
    found = model.logits(PROMPT)
    assert (found.shape, found.dtype) == ((len(PROMPT), VOCABULARY), np.float32)
    assert np.isfinite(found).all()


def test_the_reference_device_agrees(exact: LoadedModel) -> None:
    twin = localmoe.load(exact.path, device="reference", kv_format="f32")
    assert close_to(exact.logits(PROMPT), twin.logits(PROMPT), 1e-5)
    assert tokens(exact, PROMPT) == tokens(twin, PROMPT)
    twin.close()


def test_a_prompt_in_chunks_gives_the_same_logits_bit_by_bit(model: LoadedModel) -> None:
    whole = model.forward(LONG, 0)
    for cut in (1, 63, 64, 255, 256, 257, 289):
        model.forward(LONG[:cut], 0, prompt=True)
        assert np.array_equal(model.forward(LONG[cut:], cut, prompt=True), whole), cut
    scores = model.logits(LONG)
    assert np.array_equal(
        np.concatenate([model.logits(LONG[:17]), model.forward(LONG[17:], 17, all_logits=True)]), scores
    )


def test_the_logits_of_the_last_row_alone_are_those_of_all_rows(exact: LoadedModel) -> None:
    assert close_to(exact.forward(LONG, 0)[0], exact.logits(LONG)[-1], 1e-5)


def test_decoding_token_by_token_agrees_with_prefill(exact: LoadedModel) -> None:
    whole = exact.logits(PROMPT)
    each = np.concatenate([exact.forward([token], position) for position, token in enumerate(PROMPT)])
    assert close_to(each, whole, 1e-5)


def test_a_shared_prefix_gives_equal_rows(model: LoadedModel) -> None:
    one, other = model.logits([*PROMPT, 1, 2, 3]), model.logits([*PROMPT, 200, 201])
    assert np.array_equal(one[: len(PROMPT)], other[: len(PROMPT)])
    assert not np.array_equal(one[len(PROMPT)], other[len(PROMPT)])


def test_running_at_an_earlier_position_forgets_what_stood_behind_it(model: LoadedModel) -> None:
    model.forward(LONG, 0)
    model.forward([7, 8, 9], 10)
    assert model.cached == [*LONG[:10], 7, 8, 9]
    again = model.forward([5], 13)
    model.forward([*LONG[:10], 7, 8, 9], 0)
    assert np.array_equal(again, model.forward([5], 13))


def test_greedy_text_is_the_likeliest_token_each_time(exact: LoadedModel) -> None:
    found = tokens(exact, PROMPT)
    scores = exact.logits([*PROMPT, *found])
    assert found == scores[len(PROMPT) - 1 : -1].argmax(axis=1).tolist()


def test_generating_twice_with_a_seed_gives_the_same(model: LoadedModel) -> None:
    settings = SamplingSettings(temperature=1.5, seed=11, max_tokens=20)
    first = tokens(model, PROMPT, settings)
    assert tokens(model, PROMPT, settings) == first
    assert tokens(model, PROMPT, settings.changed(seed=12)) != first


def test_what_stands_in_the_cache_does_not_change_an_answer(model: LoadedModel) -> None:
    settings = SamplingSettings(temperature=1.5, seed=5, max_tokens=6)
    model.forward([1, 2, 3], 0)
    fresh = tokens(model, LONG[:280], settings)
    for cached in (279, 278, 257, 256, 23, 1):
        model.forward(LONG[:cached], 0, prompt=True)
        assert tokens(model, LONG[:280], settings) == fresh, cached


def test_steps_carry_text_and_the_last_one_says_why_it_is_the_last(model: LoadedModel) -> None:
    steps = list(model.generate(PROMPT, GREEDY))
    assert [step.finish for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].finish in ("stop", "length")
    assert "".join(step.text for step in steps) == model.tokenizer.decode([s.token for s in steps if s.token != END])


def test_an_answer_left_early_leaves_the_model_ready(model: LoadedModel) -> None:
    expected = tokens(model, PROMPT)
    for count in (1, 3):
        steps = model.generate(PROMPT, GREEDY)
        for _ in range(count):
            next(steps)
        steps.close()
        assert tokens(model, PROMPT) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="needs timer signals")
def test_an_interrupt_at_any_time_leaves_the_model_ready(model: LoadedModel) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    expected, interrupts = tokens(model, LONG[:270]), 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(25):
            model.forward(LONG[:3], 0)
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-4 * (i + 1))
                tokens(model, LONG[:270])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            assert tokens(model, LONG[:270]) == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts


def test_two_answers_in_turns_on_one_model_do_not_disturb_each_other(exact: LoadedModel) -> None:
    alone = [tokens(exact, PROMPT), tokens(exact, LONG[:20])]
    one, other = exact.generate(PROMPT, GREEDY), exact.generate(LONG[:20], GREEDY)
    mixed: list[list[int]] = [[], []]
    for a, b in zip(one, other, strict=False):
        mixed[0].append(a.token)
        mixed[1].append(b.token)
    shortest = min(map(len, mixed))
    assert [m[:shortest] for m in mixed] == [a[:shortest] for a in alone]


def test_a_model_opened_twice_answers_twice_the_same(model: LoadedModel) -> None:
    twin = localmoe.load(model.path)
    assert np.array_equal(model.logits(PROMPT), twin.logits(PROMPT))
    assert tokens(model, PROMPT) == tokens(twin, PROMPT)
    twin.close()


@pytest.mark.parametrize("how", [{"lazy": "off"}, {"lazy": "mmap"}, {"threads": 1}, {"threads": 3}, {"context": 25}])
def test_no_way_of_opening_changes_a_bit(model: LoadedModel, how: dict[str, Any]) -> None:
    other = localmoe.load(model.path, **how)
    assert np.array_equal(other.logits(PROMPT), model.logits(PROMPT))
    assert np.array_equal(other.forward(PROMPT[:1], 0), model.forward(PROMPT[:1], 0))
    other.close()


def test_a_program_is_traced_once_for_each_kind_of_step(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[tuple[int, bool]] = []
    program = localmoe.model.Network.program

    def counted(network: Any, count: int, *, all_rows: bool = False) -> Any:
        traced.append((count, all_rows))
        return program(network, count, all_rows=all_rows)

    opened = localmoe.load(files["gqa"])
    monkeypatch.setattr(localmoe.model.Network, "program", counted)
    for length in (1, 2, 5, 290):
        opened.forward(LONG[:length], 0)
        opened.forward([3], length)
    assert traced == []  # decode and prefill were compiled when the model was opened
    opened.logits(PROMPT)
    opened.logits(LONG)
    assert traced == [(opened.score_chunk, True)]
    opened.close()


def test_a_scoring_step_is_as_long_as_its_logits_may_be(exact: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 64 rows, whatever the vocabulary, to a chunk."""
    assert exact.score_chunk == exact.chunk
    for rows, length in ((10, 64), (100, 100), (10_000, exact.chunk)):
        monkeypatch.setattr(localmoe.model, "SCORE_NBYTES", rows * 4 * exact.network.config.vocabulary)
        assert exact.score_chunk == length


def test_close_ends_the_threads(files: dict[str, Path]) -> None:
    before = set(threading.enumerate())
    opened = localmoe.load(files["gqa"], threads=4)
    opened.forward(PROMPT, 0)
    assert len(set(threading.enumerate()) - before) == 3
    opened.close()
    opened.close()
    assert not set(threading.enumerate()) - before


def test_a_closed_model_has_forgotten_what_it_cached(files: dict[str, Path]) -> None:
    opened = localmoe.load(files["gqa"])
    expected = tokens(opened, PROMPT)
    opened.close()
    assert tokens(opened, PROMPT) == expected
    opened.close()


def test_the_context_is_the_trained_one_unless_asked(files: dict[str, Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localmoe.network, "DEFAULT_CONTEXT", 200)
        assert localmoe.load(files["gqa"], device="reference").context == 200
    assert localmoe.load(files["gqa"], device="reference").context == 300
    assert localmoe.load(files["gqa"], device="reference", context=1000).context == 1000


def test_a_full_context_ends_generation_and_overflow_is_refused_with_the_numbers(files: dict[str, Path]) -> None:
    opened = localmoe.load(files["gqa"], context=24)
    steps = list(opened.generate(PROMPT, SamplingSettings(temperature=0)))
    assert steps[-1].finish == "stop" or (steps[-1].finish, len(steps)) == ("context", 24 - len(PROMPT) + 1)
    with pytest.raises(DeviceError, match=r"25 .* 24"):
        opened.logits(LONG[:25])
    with pytest.raises(DeviceError, match=r"25 .* 24"):
        next(opened.generate(LONG[:25], GREEDY))
    assert opened.logits(LONG[:24]).shape == (24, VOCABULARY)
    opened.close()


@pytest.mark.parametrize("ids", [[], [-1], [1, VOCABULARY]])
def test_ids_outside_the_vocabulary_are_refused(model: LoadedModel, ids: list[int]) -> None:
    with pytest.raises(SettingError, match=f"between 0 and {VOCABULARY - 1}"):
        model.logits(ids)


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ({"device": "tpu"}, DeviceError, "'tpu'.*cpu, reference"),
        ({"lazy": "gpu"}, SettingError, "'gpu'.*auto, mmap, slots, off"),
        ({"lazy": "off", "memory": "8GiB"}, SettingError, "--memory is for --lazy slots or auto, not for --lazy off"),
        ({"kv_format": "q5_0"}, SettingError, "'q5_0'.*f32, f16, q8_0, q4_0"),
        ({"threads": 0}, SettingError, "0 threads.*1 to 256"),
        ({"threads": 257}, SettingError, "257 threads.*1 to 256"),
        ({"context": 0}, SettingError, "0 tokens.*at least 1"),
        ({"context": -5}, SettingError, "-5 tokens.*at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_names_what_can(
    files: dict[str, Path], how: dict[str, Any], kind: type[LocalMoeError], says: str
) -> None:
    threads = set(threading.enumerate())
    with pytest.raises(kind, match=says) as caught:
        localmoe.load(files["gqa"], **how)
    assert "\n" not in str(caught.value)
    assert not set(threading.enumerate()) - threads


def test_a_cache_that_memory_cannot_hold_is_refused_with_the_numbers(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    per_token = 2 * 2 * 2 * (16 + 16)  # 2 bytes, 2 blocks, 2 kv-heads, keys and values of 16
    monkeypatch.setattr(localmoe.network, "available_nbytes", lambda: 100 * per_token)
    with pytest.raises(DeviceError, match=r"300 tokens needs 76\.8 kB .* 25\.6 kB are free; at most 100 tokens fit"):
        localmoe.load(files["gqa"])
    with pytest.raises(DeviceError, match="at most 50 tokens fit"):
        localmoe.load(files["gqa"], kv_format="f32")
    localmoe.load(files["gqa"], context=100).close()
    per_token = 2 * 2 * (34 + 34)  # a head of 16 takes a whole block
    monkeypatch.setattr(localmoe.network, "available_nbytes", lambda: 40 * per_token)
    with pytest.raises(DeviceError, match=r"300 tokens needs 81\.6 kB .* at most 40 tokens fit"):
        localmoe.load(files["gqa"], kv_format="q8_0")


def test_chat_answers_and_the_second_turn_reuses_the_first(model: LoadedModel) -> None:
    chat = model.chat(system=None)
    chat.session.settings = GREEDY
    first = "".join(chat.send("hello"))
    assert [m["role"] for m in chat.session.messages] == ["user", "assistant"]
    assert chat.session.messages[1]["content"] == first
    "".join(chat.send("ab and more"))
    assert len(chat.session.messages) == 4
    assert chat.session.engine.stats.reused_tokens >= len("hello")


def test_a_file_without_vocabulary_has_logits_and_no_chat(tmp_path: Path) -> None:
    opened = localmoe.load(qwen3moe(tmp_path / "bare.gguf", **{"qwen3moe.vocab_size": VOCABULARY}))
    assert opened.logits(PROMPT).shape == (len(PROMPT), VOCABULARY)
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.model is missing"):
        opened.tokenizer.encode("x")
    with pytest.raises(TemplateError, match="chat template"):
        opened.chat()
    opened.close()


def test_an_unknown_setting_of_the_architecture_is_refused_by_name(tmp_path: Path) -> None:
    file = qwen3moe(tmp_path / "odd.gguf", **{"qwen3moe.vocab_size": VOCABULARY, "qwen3moe.attention.softcap": 30.0})
    with pytest.raises(UnsupportedError, match=r"qwen3moe\.attention\.softcap = '30"):
        localmoe.load(file)


def test_progress_hears_of_weights_being_read(files: dict[str, Path]) -> None:
    heard: list[tuple[str, int, int]] = []
    localmoe.load(files["gqa"], lazy="off", progress=lambda *news: heard.append(news)).close()
    reading = [news for news in heard if news[0] == "reading weights"]
    assert reading
    assert all(0 < done <= total for _, done, total in reading)


def test_a_model_says_which_blocks_have_experts(tmp_path: Path) -> None:
    opened = localmoe.load(deepseek2(tmp_path / "tiny.gguf"))
    ops = [op for op in opened.network.program(1).ops if op.name == "experts"]
    assert opened.expert_blocks == [int(op.weights[0].name.split(".")[1]) for op in ops] != []
    assert 0 not in opened.expert_blocks, "the first block is dense"
    opened.close()


def test_the_cache_is_counted_by_its_tokens(files: dict[str, Path]) -> None:
    opened = localmoe.load(files["gqa"], kv_format="f32")
    assert opened.cache_nbytes(10) == 10 * 4 * 2 * 2 * (16 + 16)  # 2 blocks, 2 kv-heads, keys and values of 16
    opened.close()


def test_one_for_a_chat_without_a_template_is_refused_before_anything_takes_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localmoe.model, "open_device", lambda *_, **__: pytest.fail("a device was opened"))
    path = qwen3moe(tmp_path / "bare.gguf", **{"general.name": "bare one"})
    with pytest.raises(TemplateError, match=r"bare one has no chat template: .*chatml"):
        localmoe.load(path, for_chat=True)
