"""Claims about the command line: what is printed where, and with which exit status it ends; models are fakes."""

from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from fakes import FakeModel

import localmoe
from localmoe.cli import app, main
from localmoe.errors import FileFormatError
from localmoe.experts.loading import Loading
from localmoe.settings import SETTINGS

TESTS = Path(__file__).parent
REPLIES = {"hello": "Hi there.", "text\n\npiped": "Both.", "piped": "Piped.", "esc": "\x1b[1m"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """What every `localmoe.load` gives; the arguments of the last call are in `model.opened`."""
    fake = FakeModel(REPLIES)

    def load(path: Path, progress: Any, **how: Any) -> FakeModel:
        fake.opened = {"path": path, **how}
        progress("reading weights", 1, 1)
        return fake

    monkeypatch.setattr(localmoe, "load", load, raising=False)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("localmoe.cli.conversation.kept_state", lambda model, asked: None)
    return fake


def call(*words: str) -> int:
    """The exit status of `localmoe words`."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return caught.value.code or 0


def pipe_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_run_prints_the_answer_and_nothing_else(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "x.gguf", "-p", "hello") == 0
    assert capsys.readouterr() == ("Hi there.\n", "")
    assert model.closed


def test_run_reads_what_is_piped_in(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, "piped\n")
    assert call("run", "x.gguf") == 0
    pipe_in(monkeypatch, "piped\n")
    assert call("run", "x.gguf", "-p", "text") == 0
    assert capsys.readouterr().out == "Piped.\nBoth.\n"


def test_run_without_a_prompt_says_how(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "x.gguf") == 2
    assert capsys.readouterr() == ("", 'localmoe: run needs a prompt: -p "…", or text piped in\n')


def test_run_leaves_reasoning_out(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.reasoning = ("<think>", "</think>")
    model.replies = {"hello": "<think>\nhm\n</think>\n\nYes."}
    assert call("run", "x.gguf", "-p", "hello") == 0
    assert capsys.readouterr() == ("Yes.\n", "")


def test_run_gives_a_pipe_the_exact_text(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "x.gguf", "-p", "esc") == 0
    assert capsys.readouterr().out == "\x1b[1m\n"


def test_raw_continues_the_prompt_without_a_template(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.template = None
    assert call("run", "x.gguf", "-p", "once", "--raw", "--max-tokens", "3") == 0
    assert capsys.readouterr().out == "???\n"
    assert model.calls[0] == (0, [*b"once"])


def test_flags_become_settings_over_the_models_recommendation(
    model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.recommended = {"temperature": 0.5, "top_k": 9}
    pipe_in(monkeypatch, "/set\n")
    assert call("chat", "x.gguf", "--top-k", "3", "--seed", "1") == 0
    told = capsys.readouterr().out
    assert "(sampling as the model recommends: temperature 0.5)" in told
    assert all(line in told for line in ("temperature = 0.5", "top_k = 3", "seed = 1", "min_p = 0.05"))


def test_every_setting_has_a_flag(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    for name, setting in SETTINGS.items():
        assert call("run", "x.gguf", "-p", "hello", f"--{name.replace('_', '-')}", f"{setting.default:g}") == 0


def test_a_flag_out_of_range_is_one_line_and_2(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "x.gguf", "-p", "hello", "--top-p", "7") == 2
    assert capsys.readouterr() == ("", "localmoe: top_p is a number from 0 to 1, not '7.0'\n")


def test_chat_greets_talks_and_closes(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, "hello\n/exit\n")
    assert (
        call("chat", "x.gguf", "--context", "64", "-t", "2", "--lazy", "off", "--kv", "q8_0", "--quantize", "q6_K") == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "fake-moe · fake · 1.23 MB · context 512 · 2 threads · /help for commands",
        "(sampling as the model recommends: temperature 0)",
        "",
        "Hi there.",
        "",
    ]
    how = {
        "context": 64,
        "threads": 2,
        "pin": None,
        "device": "cpu",
        "lazy": Loading("off"),
        "kv_format": "q8_0",
        "quantize": "q6_K",
        "for_chat": True,
    }
    assert model.opened == {"path": Path("x.gguf"), **how}
    assert model.closed


def test_chat_greets_with_the_cpus_that_threads_are_kept_on(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, "")
    model.device.cpus = (0, 1, 4)
    assert call("chat", "x.gguf", "--pin", "0-1,4") == 0
    assert capsys.readouterr().out.startswith(
        "fake-moe · fake · 1.23 MB · context 512 · 2 threads on CPU 0-1,4 · /help"
    )
    assert model.opened["pin"] == "0-1,4"


@pytest.mark.parametrize("command", [["chat"], ["run", "-p", "hello"]])
def test_loading_flags_reach_the_model_as_one_loading(
    command: list[str], model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--lazy", "slots", "--memory", "8GiB", "--expert-cache", "6.5GB", "--expert-policy", "lru", "--lookahead"]
    pipe_in(monkeypatch, "")
    assert call(*command, "x.gguf", *flags) == 0
    assert model.opened["lazy"] == Loading("slots", 8 << 30, 6_500_000_000, "lru", lookahead=True)


@pytest.mark.parametrize("command", [["chat"], ["run", "-p", "hello"], ["bench"], ["perplexity"]])
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lazy", "of"], "'of'"),
        (["--memory", "8 gigs"], "--memory: a size is a number with"),
        (["--expert-cache", "0"], "--expert-cache: a size is a number with"),
        (["--expert-policy", "fifo"], "expert policy 'fifo' is not known; these are: lfru, lru, history"),
        (["--lazy", "off", "--expert-cache", "2GiB"], "--expert-cache is for --lazy slots or auto, not for --lazy off"),
        (["--lazy", "mmap", "--memory", "2GiB"], "--memory is for --lazy slots or auto, not for --lazy mmap"),
        (["--lazy", "off", "--expert-policy", "lru"], "--expert-policy is for --lazy slots or auto"),
        (["--lazy", "off", "--lookahead"], "--lookahead is for --lazy slots or auto"),
        (["--memory", "2GiB", "--expert-cache", "2GiB"], "--expert-cache 2GiB must be smaller than --memory 2GiB"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_loading_flags_that_cannot_be_are_one_line_and_2_before_anything_is_opened(
    command: list[str],
    flags: list[str],
    told: str,
    model: FakeModel,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    text = tmp_path / "text"
    text.write_text("words")
    more = [str(text)] if command == ["perplexity"] else []
    assert call(*command, "x.gguf", *more, *flags) == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n"), told in line) == ("", 1, True), line
    assert not hasattr(model, "opened")


def test_a_trace_that_nobody_would_write_is_refused(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.loading = Loading(trace=Path("t"))
    assert call("run", "x.gguf", "-p", "hello", "--trace", "t") == 2
    assert "--trace: fake-moe has no experts whose choices" in capsys.readouterr().err
    assert model.closed
    model.chosen = np.zeros((1, 2), np.int64)
    assert call("run", "x.gguf", "-p", "hello", "--trace", "t") == 0


@pytest.mark.parametrize(
    ("asked", "runs", "free", "told"),
    [
        ("auto", "mmap", 10**9, ""),
        ("auto", "mmap", 10**6, "(loading mmap: why)"),
        ("auto", "slots", 10**9, "(loading slots: why)"),
        ("slots", "slots", 10**6, ""),
    ],
)
def test_chat_tells_why_weights_are_loaded_in_no_plain_way_that_nobody_asked_for(
    asked: str,
    runs: str,
    free: int,
    told: str,
    model: FakeModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("localmoe.memory.available_nbytes", lambda: free)
    model.loading, model.residency_mode, model.loading_reason = Loading(asked), runs, f"{runs}: why"
    pipe_in(monkeypatch, "")
    assert call("chat", "x.gguf") == 0
    assert capsys.readouterr().out.splitlines()[2] == told


def test_chat_tells_which_recommendation_it_cannot_follow(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model.metadata = {"general.sampling.mirostat": 2}
    pipe_in(monkeypatch, "")
    assert call("chat", "x.gguf") == 0
    assert "(the model recommends general.sampling.mirostat = 2, which is not implemented)" in capsys.readouterr().out


def test_chat_tells_when_the_context_is_longer_than_the_trained_one(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model.trained_context = 256
    pipe_in(monkeypatch, "")
    assert call("chat", "x.gguf") == 0
    assert "trained on 256 tokens" in capsys.readouterr().out


def test_chat_without_a_model_opens_the_bundled_one(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.loader.locate.bundled", lambda: Path("demo.gguf"))
    pipe_in(monkeypatch, "")
    assert call("chat") == 0
    assert model.opened["path"] == Path("demo.gguf")


def test_a_model_without_a_template_names_the_choices(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.template = None
    assert call("chat", "x.gguf") == 2
    out, told = capsys.readouterr()
    assert out == ""
    assert told.startswith("localmoe: fake-moe has no chat template: name one with --template (")
    assert model.closed


def test_a_template_is_asked_of_a_model_before_it_opens_where_it_has_to_have_one(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    pipe_in(monkeypatch, "")
    asked = []
    for line in (
        "chat x.gguf",
        "chat x.gguf --template chatml",
        "run x.gguf -p hello",
        "run x.gguf -p hello --template chatml",
    ):
        assert call(*line.split()) == 0
        asked.append(model.opened["for_chat"])
    assert call("run", "x.gguf", "-p", "once", "--raw") == 0
    asked.append(model.opened["for_chat"])
    for commands in (f"/model {other}\n", f"/template chatml\n/model {other}\n"):
        pipe_in(monkeypatch, commands)
        assert call("chat", "x.gguf") == 0
        assert model.opened["path"] == other
        asked.append(model.opened["for_chat"])
    assert asked == [True, False, True, False, False, True, False]


def test_an_error_is_one_line_without_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: Path, **how: Any) -> None:
        raise FileFormatError(f"{path}: byte 8:\n\x1b[2J")

    monkeypatch.setattr(localmoe, "load", load, raising=False)
    assert call("chat", "x.gguf") == 2
    assert capsys.readouterr() == ("", "localmoe: x.gguf: byte 8: \\x1b[2J\n")


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_one_line_and_its_place_is_shown_on_demand(
    debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: Path, **how: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(localmoe, "load", load, raising=False)
    monkeypatch.delenv("LOCALMOE_DEBUG", raising=False)
    assert call(*(["--debug"] if debug else []), "chat", "x.gguf") == 1
    told = capsys.readouterr().err
    hint = "" if debug else " (localmoe --debug … shows where)"
    assert told.endswith(f"localmoe: sorry, this is a bug: ZeroDivisionError('oops'){hint}\n")
    assert ("Traceback" in told) is debug


def test_ctrl_c_ends_run_with_130(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        if len(model.calls) == 4:
            raise KeyboardInterrupt

    model.before_call = interrupt
    assert call("run", "x.gguf", "-p", "hello") == 130
    assert capsys.readouterr() == ("Hi \n", "")
    assert model.closed


@pytest.mark.parametrize("words", [["chat", "--nonsense"], ["nonsense"], ["run"], ["chat", "x", "--top-k", "many"]])
def test_a_mistyped_command_line_ends_with_2_and_shows_the_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 2
    assert "Usage: localmoe" in capsys.readouterr().err


def test_version_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("localmoe")


def test_inspect_plans_from_settings_and_wants_one_thing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 4, "vocab_size": 5,
        "max_position_embeddings": 64, "num_attention_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    assert call("inspect", "--config", str(path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == str(5 * 8 + 4 * 64 + 3 * 32 + 3 * 8)
    assert found["model"]["weights"].startswith("none read")
    assert call("inspect") == call("inspect", "x.gguf", "--config", str(path)) == 2
    assert "needs one of MODEL and --config" in capsys.readouterr().err


def test_inspect_prints_sections_or_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = SimpleNamespace(
        report=lambda path, context, kv_format, quantize: [("Model", [("KV", kv_format), ("context", str(context))])],
        program_table=lambda path, quantize: (["op", "bytes"], [["embed", "12"], ["linear", "3400"]]),
    )
    monkeypatch.setitem(sys.modules, "localmoe.inspection", told)
    monkeypatch.setattr(localmoe, "inspection", told, raising=False)
    assert call("inspect", "x.gguf", "--context", "9", "--kv", "q8_0", "--program") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "Model",
        "  KV       q8_0",
        "  context  9",
        "op      bytes",
        "embed   12",
        "linear  3400",
    ]
    assert call("inspect", "x.gguf", "--json", "--program") == 0
    assert json.loads(capsys.readouterr().out) == {
        "Model": {"KV": "f16", "context": "None"},
        "program": [{"op": "embed", "bytes": "12"}, {"op": "linear", "bytes": "3400"}],
    }


def python(program: str, *words: str, **how: Any) -> subprocess.Popen[bytes]:
    path = os.pathsep.join((str(TESTS), str(TESTS.parent)))
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **how,
    )


def endless() -> None:
    """Run in a process of its own: `localmoe run` of a model that talks for long."""
    from fakes import FakeModel

    import localmoe
    from localmoe.cli import main

    localmoe.load = lambda path, **how: FakeModel({"hello": "word " * 40_000}, context=300_000)
    main(["run", "x.gguf", "-p", "hello"])


def test_a_reader_that_leaves_ends_run_quietly() -> None:
    with python(inspect.getsource(endless) + "endless()", stdin=subprocess.DEVNULL) as process:
        assert process.stdout.read(5) == b"word "
        process.stdout.close()
        assert process.wait(timeout=30) != 0
        assert process.stderr.read() == b""


def test_help_and_a_mistake_import_nothing_heavy() -> None:
    program = "import sys, localmoe.cli; print(*sorted(m for m in sys.modules if '.' not in m))"
    with python(program) as process:
        modules = process.communicate(timeout=30)[0].decode().split()
    assert not {"numpy", "numba", "llvmlite", "prompt_toolkit", "jinja2", "tokenizers", "gguf"} & set(modules)


@pytest.mark.parametrize("name", ["make_cli.py", "make_models.py"])
def test_the_generated_pages_are_up_to_date(name: str) -> None:
    script = TESTS.parent / "docs" / name
    with python(
        "import runpy, sys; sys.argv = [sys.argv[1], '--check']; runpy.run_path(sys.argv[0], run_name='__main__')",
        str(script),
    ) as process:
        assert process.wait(timeout=30) == 0, process.stderr.read().decode()


def test_the_manual_names_every_flag_of_every_command() -> None:
    """Flags that several commands share stand in sections of their own."""
    whole = (TESTS.parent / "docs" / "cli.md").read_text("utf-8")
    parts = {part.partition("\n")[0]: part for part in whole.split("\n## ")}
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    chosen = {name: commands[name] for name in ("chat", "run", "bench", "plan", "doctor")}
    for name, command in {**chosen, "experts replay": commands["experts"].commands["replay"]}.items():
        part = parts[f"localmoe {name}"]
        part += "".join(parts[kind] for kind in ("Loading", "Sampling") if f"(#{kind.lower()})" in part)
        for parameter in command.params:
            written = parameter.metavar if parameter.param_type_name == "argument" else max(parameter.opts, key=len)
            assert written in part, (name, written)


def test_python_dash_m_is_the_command_too() -> None:
    with python("import runpy; runpy.run_module('localmoe', run_name='__main__')", "--help") as process:
        assert b"chat" in process.communicate(timeout=30)[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line_and_no_bug() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "localmoe", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (2, "localmoe: the output: No space left on device\n")


def test_memory_that_runs_out_is_one_line_and_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("localmoe.cli.app", no_memory)
    with pytest.raises(SystemExit, match="2"):
        main(["chat"])
    assert capsys.readouterr().err == "localmoe: memory ran out; a smaller --context needs less\n"


def test_models_lists_what_is_there_and_its_names_open_it(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS", "LLAMA_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("LOCALMOE_MODELS", str(tmp_path))
    broken = tmp_path / "some\x1b[31m-model.gguf"
    broken.write_bytes(b"hello")
    assert call("models") == 0
    told = capsys.readouterr().out
    assert "some\\x1b[31m-model" in told
    assert "expected b'GGUF'" in told
    assert call("models", "--json") == 0
    record = json.loads(capsys.readouterr().out)[-1]
    assert (record["path"], record["kind"], record["memory"]) == (str(broken), "broken", "broken")
    assert call("run", "some", "-p", "hello") == 0
    assert model.opened["path"] == broken
    assert call("run", "sone", "-p", "hello") == 2
    assert "'sone' is neither a file nor a model that is known here" in capsys.readouterr().err
