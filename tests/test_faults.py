"""What breaks while a conversation runs: a clear line, the conversation kept, no wrong token, in every way of loading.

What is mapped and cut may end a process and is tried in `test_guard.py`; here the file comes back, or only reads fail.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from faulty_files import FaultyDisk, broken_disk
from pseudo_terminal import CTRL_C, PROMPT, Chat
from test_slots import room
from tiny_models import qwen3moe

from localmoe.errors import DeviceError, LocalMoeError, ReadError, SettingError
from localmoe.experts.loading import Loading
from localmoe.experts.usage import SUFFIX, fingerprint, usage_folder
from localmoe.guard import bus_errors
from localmoe.loader.locate import open_source
from localmoe.model import Model
from localmoe.session import Session

DRAWN = {"temperature": 1.2, "seed": 11, "max_tokens": 16}  # greedy text of random weights runs in circles
QUESTIONS = ("the quick brown fox", "jumps over the lazy dog", "and what of it?")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and files that are open are otherwise there")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3moe(tmp_path_factory.mktemp("faults") / "m.gguf", format="Q8_0")


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "m.gguf"
    copy.write_bytes(original.read_bytes())
    return copy


@pytest.fixture(scope="module")
def least(original: Path) -> int:
    """Bytes of the smallest slots: hardly any expert is there when it is chosen."""
    return room(original, 0.0)


@pytest.fixture(scope="module")
def answers(original: Path) -> list[str]:
    """What a process that nothing happens to says to the questions, one after the other."""
    with closing(Model(original, context=512, loading=Loading("off"))) as model:
        session = Session(model, settings=DRAWN)
        return [said(session, question) for question in QUESTIONS]


def said(session: Session, question: str) -> str:
    return "".join(piece.text for piece in session.send(question))


def talking(path: Path, least: int, mode: str = "slots") -> Iterator[Session]:
    """A conversation whose first question has been answered."""
    with closing(Model(path, context=512, loading=Loading(mode, expert_cache=least))) as model:
        session = Session(model, settings=DRAWN)
        said(session, QUESTIONS[0])
        yield session


@pytest.fixture(autouse=True)
def _readers_of_other_tests_have_ended() -> None:
    end = time.monotonic() + 60
    while readers() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    assert not readers()


@pytest.fixture
def session(path: Path, least: int) -> Iterator[Session]:
    yield from talking(path, least)


@pytest.fixture(params=["mmap", "slots"])
def any_session(request: pytest.FixtureRequest, path: Path, least: int) -> Iterator[Session]:
    yield from talking(path, least, request.param)


def goes_on(session: Session, answers: list[str]) -> None:
    """The conversation stands as after its first question, and the next ones are answered right."""
    assert [message["content"] for message in session.messages] == [QUESTIONS[0], answers[0]]
    for question, answer in zip(QUESTIONS[1:], answers[1:], strict=True):
        assert said(session, question) == answer


@contextmanager
def taken_back(session: Session) -> Iterator[None]:
    """What is said inside the `with` block is forgotten after it."""
    kept = session.conversation.head
    try:
        yield
    finally:
        session.conversation.move(kept)


# Files


def test_a_file_that_was_cut_is_refused_and_the_conversation_goes_on_when_it_is_whole(
    any_session: Session, path: Path, answers: list[str]
) -> None:
    whole, changed = path.read_bytes(), path.stat().st_mtime_ns
    os.truncate(path, 5000)
    for _ in range(2):
        with pytest.raises(LocalMoeError) as found:
            said(any_session, QUESTIONS[1])
        expected = f"{path}: changed while it was in use (size {len(whole)}, now 5000): open it again"
        assert str(found.value) == expected
    path.write_bytes(whole)
    with pytest.raises(LocalMoeError, match=r"changed while it was in use \(written to\): open it again"):
        said(any_session, QUESTIONS[1])
    os.utime(path, ns=(changed, changed))
    goes_on(any_session, answers)


def test_a_file_that_is_written_to_in_the_middle_of_an_answer_ends_it_before_a_wrong_token(
    any_session: Session, path: Path, answers: list[str]
) -> None:
    found, pieces = "", any_session.send(QUESTIONS[1])
    with pytest.raises(LocalMoeError, match="changed while it was in use"):  # noqa: PT012
        for i, piece in enumerate(pieces):
            found += piece.text
            if i == 4:
                with open(path, "r+b") as file:
                    file.seek(path.stat().st_size // 2)
                    file.write(bytes(200_000))
    assert found
    assert answers[1].startswith(found)
    assert any_session.messages[-1] == {"role": "assistant", "content": found}


def test_a_file_that_was_replaced_or_deleted_is_read_on_as_it_was(
    any_session: Session, path: Path, answers: list[str]
) -> None:
    path.with_suffix(".new").write_bytes(bytes(1000))
    path.with_suffix(".new").replace(path)
    assert said(any_session, QUESTIONS[1]) == answers[1]
    path.unlink()
    assert said(any_session, QUESTIONS[2]) == answers[2]


def test_another_way_of_loading_is_refused_when_the_file_has_another_name_and_the_old_one_goes_on(
    path: Path, least: int, answers: list[str]
) -> None:
    for session in talking(path, least, "mmap"):
        path.rename(path.with_suffix(".old"))
        with pytest.raises(ReadError, match=r"m\.gguf: cannot be opened again for reading"):
            session.model.change_loading(Loading("slots"))  # type: ignore[attr-defined]
        goes_on(session, answers)


@pytest.mark.skipif(bus_errors() is None, reason="nothing is guarded on this system")
def test_a_plan_that_was_compiled_while_norms_could_not_be_read_is_not_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowering copies norms: zeros in their place would outlive the fault."""
    text = list(b"a text that is scored")
    with closing(Model(path, context=512, loading=Loading("mmap"))) as model:
        expected = model.forward(text, 0, all_logits=True)
    with closing(Model(path, context=512, loading=Loading("mmap"))) as model:
        whole, changed, compiled = path.read_bytes(), path.stat().st_mtime_ns, model.device.compile

        def faulting(*arguments: object) -> object:
            os.truncate(path, 4096)
            made = compiled(*arguments)  # type: ignore[arg-type]
            path.write_bytes(whole)
            os.utime(path, ns=(changed, changed))
            return made

        with monkeypatch.context() as patch:
            patch.setattr(model.device, "compile", faulting)
            with pytest.raises(ReadError, match="cannot be read: does the disk still work"):
                model.forward(text, 0, all_logits=True)
        assert (model.forward(text, 0, all_logits=True) == expected).all()


# Reads


def test_reads_that_fail_at_random_cost_an_answer_at_most(
    session: Session, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, refused = broken_disk(monkeypatch, failing=0.001, short=0.3), 0
    for _ in range(12):
        with taken_back(session):
            try:
                assert said(session, QUESTIONS[1]) == answers[1]
            except ReadError as error:
                refused += 1
                assert "bytes cannot be read: Input/output error" in str(error)  # noqa: PT017
                last = session.messages[-1]["content"]
                assert answers[1].startswith(last) or last == answers[0]  # words may have come already
    assert 0 < refused < 12
    disk.mend()
    goes_on(session, answers)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"failing": 1.0}, r"m\.gguf: at byte \d+: \d+ bytes cannot be read: Input/output error"),
        ({"ended": True}, r"m\.gguf: at byte \d+: \d+ bytes cannot be read: the file seems to end there"),
        (
            {"broken": RuntimeError("a mistake")},
            r"gate_exps.weight: expert \d+ could not be read: RuntimeError\('a mistake'\)",
        ),
        ({"broken": SystemExit(3)}, r"gate_exps.weight: expert \d+ could not be read: SystemExit\(3\)"),
    ],
    ids=["EIO", "end", "mistake", "exit"],
)
def test_a_read_that_fails_is_told_and_the_next_question_is_answered_right(
    session: Session, answers: list[str], monkeypatch: pytest.MonkeyPatch, fault: dict[str, object], expected: str
) -> None:
    disk = broken_disk(monkeypatch, **fault)
    for _ in range(2):
        with pytest.raises(LocalMoeError, match=expected):
            said(session, QUESTIONS[1])
    disk.mend()
    goes_on(session, answers)


def test_a_disk_that_takes_its_time_changes_no_word(
    session: Session, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_disk(monkeypatch, delay=0.01, short=0.5)  # a hundred times what a read of this file takes
    goes_on(session, answers)


def end_thread(thread: threading.Thread) -> None:
    """As if something had ended it: SystemExit at its next step."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reader"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_readers_that_are_left_do_the_work_of_those_that_ended(session: Session, answers: list[str]) -> None:
    for thread in readers()[:-1]:
        end_thread(thread)
    goes_on(session, answers)
    assert len(readers()) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_without_any_reader_the_question_is_refused_and_another_way_of_loading_goes_on(
    session: Session, least: int, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for thread in readers():
        end_thread(thread)
    for _ in range(2):
        with pytest.raises(DeviceError, match="the threads that read experts have ended"):
            said(session, QUESTIONS[1])
    session.model.change_loading(Loading("slots", expert_cache=least))  # type: ignore[attr-defined]
    goes_on(session, answers)


def test_a_disk_that_stands_still_keeps_nobody_from_leaving(
    path: Path, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmoe.experts.readers.HANGING", 0.1)
    model = Model(path, context=512, loading=Loading("slots", expert_cache=least))
    disk = broken_disk(monkeypatch)
    disk.stand_still()
    with pytest.raises(KeyboardInterrupt):
        interrupted(disk, Session(model, settings=DRAWN), QUESTIONS[0])
    begun = len(readers())
    model.close()
    assert len(readers()) == begun > 0
    disk.go_on()
    for thread in readers():
        thread.join(10)
    assert not readers()


# Ctrl+C


def interrupted(disk: FaultyDisk, session: Session, question: str) -> str:
    """Asks, with a SIGINT as soon as a read stands still."""

    def press() -> None:
        disk.standing.wait(60)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        return said(session, question)
    finally:
        thread.join()


def test_an_interrupt_is_heard_while_a_read_stands_still_and_the_conversation_goes_on(
    session: Session, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = broken_disk(monkeypatch)
    for _ in range(3):
        disk.stand_still()
        with pytest.raises(KeyboardInterrupt):
            interrupted(disk, session, QUESTIONS[1])
        disk.go_on()
    goes_on(session, answers)


def test_a_read_of_an_interrupted_question_that_fails_during_the_next_one_is_tried_anew(
    session: Session, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = broken_disk(monkeypatch, broken=RuntimeError("of before"))
    disk.stand_still()
    with pytest.raises(KeyboardInterrupt):
        interrupted(disk, session, QUESTIONS[1])
    disk.broken = None
    timer = threading.Timer(0.2, disk.go_on)
    timer.start()
    goes_on(session, answers)
    timer.join()


def test_an_interrupt_while_the_disk_is_slow_leaves_no_half_read_expert_behind(
    session: Session, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = broken_disk(monkeypatch, delay=0.002)
    for turn in range(15):
        timer = threading.Timer(0.01 * turn, lambda: os.kill(os.getpid(), signal.SIGINT))
        with taken_back(session), suppress(KeyboardInterrupt):
            timer.start()
            assert said(session, QUESTIONS[1]) == answers[1]
            timer.join()
            time.sleep(1)  # for the interrupt
        timer.join()
    disk.mend()
    goes_on(session, answers)


# In the terminal

BREAKING = """
import errno, os, time
from localmoe.experts.reading import FileReader
whole = FileReader._read_at
def broken(reader, buffer, offset):
    if os.path.exists({sign!r}):
        {fault}
    return whole(reader, buffer, offset)
FileReader._read_at = broken
"""
FAILING, SLOW = "raise OSError(errno.EIO, os.strerror(errno.EIO))", "time.sleep(0.05)"
FLAGS = ("--temperature", 1.2, "--seed", 11, "--max-tokens", 16, "--context", 512)


def chat(path: Path, mode: str, least: int, setup: str = "") -> Chat:
    cache = ("--expert-cache", least) if mode == "slots" else ()
    return Chat(
        path, *FLAGS, "--prompt-cache", "off", "--lazy", mode, *cache, setup=setup, XDG_STATE_HOME=str(path.parent)
    )


def shown(answer: str) -> str:
    """An answer without what the terminal says beside it."""
    return answer.partition("\n(max_tokens")[0]


@pytest.fixture(scope="module")
def transcript(original: Path) -> list[str]:
    with chat(original, "mmap", 0) as undisturbed:
        return [shown(undisturbed.ask(question)) for question in QUESTIONS]


@pytest.mark.parametrize("mode", ["mmap", "slots"])
def test_in_the_terminal_a_cut_file_is_one_line_and_the_conversation_goes_on(
    mode: str, path: Path, least: int, transcript: list[str]
) -> None:
    with chat(path, mode, least) as terminal:
        assert shown(terminal.ask(QUESTIONS[0])) == transcript[0]
        whole, changed = path.read_bytes(), path.stat().st_mtime_ns
        os.truncate(path, 1000)
        answer = terminal.ask(QUESTIONS[1])
        expected = f"{path}: changed while it was in use (size {len(whole)}, now 1000): open it again"
        assert re.sub(r"\s", "", expected) in re.sub(r"\s", "", answer)
        assert "Traceback" not in terminal.transcript
        path.write_bytes(whole)
        os.utime(path, ns=(changed, changed))
        assert shown(terminal.ask(QUESTIONS[1])) == transcript[1]
        assert terminal.leave() == 0


def test_in_the_terminal_a_model_is_opened_anew_and_the_conversation_goes_on(
    path: Path, least: int, transcript: list[str]
) -> None:
    """A file that was whole for a while only: /reopen is refused until it is whole again, whatever its time says."""
    with chat(path, "slots", least) as terminal:
        assert shown(terminal.ask(QUESTIONS[0])) == transcript[0]
        whole = path.read_bytes()
        os.truncate(path, 60000)
        assert "(/reopen opens it; the conversation stays)" in terminal.ask(QUESTIONS[1])
        assert "isthedownloadcomplete?" in re.sub(r"\s", "", terminal.ask("/reopen"))
        assert "openitagain" in re.sub(r"\s", "", terminal.ask(QUESTIONS[1]))
        path.write_bytes(whole)
        assert terminal.ask("/reopen").endswith("(m opened anew)")
        assert "slots" in terminal.ask("/lazy")
        for question, answer in zip(QUESTIONS[1:], transcript[1:], strict=True):
            assert shown(terminal.ask(question)) == answer
        assert terminal.leave() == 0


def test_in_the_terminal_a_failing_disk_is_one_line_and_the_conversation_goes_on(
    path: Path, least: int, transcript: list[str]
) -> None:
    sign = path.parent / "broken"
    with chat(path, "slots", least, BREAKING.format(sign=str(sign), fault=FAILING)) as terminal:
        assert shown(terminal.ask(QUESTIONS[0])) == transcript[0]
        sign.touch()
        assert "bytes cannot be read: Input/output error" in terminal.ask(QUESTIONS[1])
        sign.unlink()
        assert shown(terminal.ask(QUESTIONS[1])) == transcript[1]
        assert "Traceback" not in terminal.transcript
        assert terminal.leave() == 0


def test_in_the_terminal_ctrl_c_in_the_middle_of_a_slow_read_takes_the_question_back(
    path: Path, least: int, transcript: list[str]
) -> None:
    sign = path.parent / "slow"
    with chat(path, "slots", least, BREAKING.format(sign=str(sign), fault=SLOW)) as terminal:
        sign.touch()
        for _ in range(2):
            terminal.say(QUESTIONS[1])
            time.sleep(0.3)
            terminal.press(CTRL_C)
            assert "(stopped before the first word; Up brings the message back)" in terminal.until("\n" + PROMPT)
        sign.unlink()
        for question, answer in zip(QUESTIONS, transcript, strict=True):
            assert shown(terminal.ask(question)) == answer
        assert "Traceback" not in terminal.transcript
        assert terminal.leave() == 0


# What is kept beside the model


def test_a_cache_that_cannot_be_written_keeps_nobody_from_talking(
    path: Path, least: int, answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are those of the cache; whatever else would go there meets a file where a folder should be."""
    from localmoe.kernels.cpu.build import cache_folder

    (tmp_path / "cache").mkdir(mode=0o500)
    (tmp_path / "cache" / "kernels").symlink_to(cache_folder())
    (tmp_path / "cache" / "usage").touch()
    (tmp_path / "cache" / "experts").touch()
    monkeypatch.setenv("LOCALMOE_CACHE", str(tmp_path / "cache"))
    for session in talking(path, least):
        goes_on(session, answers)


def test_a_usage_file_that_is_corrupt_keeps_nobody_from_talking(
    path: Path, least: int, answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from localmoe.kernels.cpu.build import cache_folder

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(cache_folder())
    monkeypatch.setenv("LOCALMOE_CACHE", str(tmp_path / "cache"))
    usage_folder().mkdir()
    (usage_folder() / (fingerprint(open_source(path)) + SUFFIX)).write_bytes(b'{"localmoe_usage": 1, "uses": [[')
    for session in talking(path, least):
        goes_on(session, answers)


def test_a_trace_that_cannot_be_written_is_refused_by_name(path: Path, least: int) -> None:
    with pytest.raises(SettingError, match="/proc/nowhere/trace"):
        Model(path, context=512, loading=Loading("slots", expert_cache=least, trace=Path("/proc/nowhere/trace")))
