"""`localmoe bench`: the arithmetic of its rows under a fake clock, its yardsticks, a peer that is a script, real runs
of a tiny model, and what the command prints."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny_models import deepseek2, qwen3moe

from localmoe.benchmark import machine, measure, peer, request, roofline, work
from localmoe.benchmark.report import Bar, report_of_profiles, report_of_results
from localmoe.cli import main
from localmoe.errors import SettingError
from localmoe.experts.loading import Loading
from localmoe.experts.telemetry import Counts
from localmoe.kernels.cpu import limits
from localmoe.kernels.cpu.build import assembly
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.isa import named, runnable
from localmoe.kernels.cpu.limits import Limits, Rates
from localmoe.model import Model

RATES = Rates(read=1e6, float_ops=1e7, integer_ops=4e7)

LLAMA_BENCH = """#!{python}
import json, os, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
{trouble}
def record(prompt, generate):
    speed = 4.0 if words["--repack"] == "1" else 2.0
    return {{"build_commit": "abc", "build_number": 7, "cpu_info": "a chip", "backends": "CPU",
            "flash_attn": int(words.get("-fa", -1)), "repack": words["--repack"] == "1", "n_prompt": prompt,
            "n_gen": generate, "n_depth": int(words["-d"]), "avg_ts": speed * (10 if prompt else 1)}}
found = [record(int(n), 0) for n in words["-p"].split(",") if n != "0"]
print(json.dumps(found + [record(0, int(n)) for n in words["-n"].split(",") if n != "0"]))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3moe(tmp_path_factory.mktemp("models") / "tiny.gguf", format="Q8_0")


@pytest.fixture(autouse=True)
def _small_yardsticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_NBYTES", 1 << 20)
    monkeypatch.setattr(limits, "PRODUCTS", 1 << 12)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes half a second, and the machine has the rates RATES."""
    ticks = count()
    monkeypatch.setattr(measure, "perf_counter", lambda: next(ticks) / 2)
    monkeypatch.setattr(Limits, "rates", lambda self: RATES)


def llama_bench(folder: Path, trouble: str = "") -> Path:
    """A script that answers as llama-bench does: 20 tokens of a prompt a second, 2 generated, twice that repacked."""
    script = folder / "llama-bench"
    script.write_text(LLAMA_BENCH.format(python=sys.executable, log=str(folder / "log"), trouble=trouble))
    script.chmod(0o755)
    return script


def calls(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def bench(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *words])
    return caught.value.code or 0


# What is asked for


def test_lists_make_every_test_at_every_depth_under_every_setting() -> None:
    asked = request.read_request("m", prompt="8,16", generate="4", depth="0,32", threads="1,2", kv="f16,f32")
    assert [t.name for t in asked.tests] == ["pp8", "pp16", "tg4", "pp8 @ d32", "pp16 @ d32", "tg4 @ d32"]
    assert [(s.threads, s.kv) for s in asked.settings] == [(1, "f16"), (1, "f32"), (2, "f16"), (2, "f32")]
    assert (asked.context, asked.depths) == (48, (0, 32))


def test_a_value_given_twice_is_measured_once() -> None:
    asked = request.read_request("m", prompt="8, 8", generate="0", threads="2,2", lazy="off,auto,off")
    assert [t.name for t in asked.tests] == ["pp8"]
    assert [(s.threads, s.lazy) for s in asked.settings] == [(2, "off"), (2, "auto")]


def test_a_budget_is_for_the_modes_that_have_a_use_for_it() -> None:
    asked = request.read_request("m", lazy="slots,mmap", memory="4GiB", expert_policy="lru")
    assert [s.how["loading"] for s in asked.settings] == [
        Loading("slots", memory=4 << 30, policy="lru", learned=False),
        Loading("mmap", memory=4 << 30, policy="lru", learned=False),
    ]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"prompt": "0", "generate": "0"}, "nothing to measure"),
        ({"prompt": "12,x"}, "-p takes whole numbers from 0 on with commas between, not 'x'"),
        ({"depth": "-1"}, "-d takes whole numbers"),
        ({"generate": "²"}, "-n takes whole numbers"),
        ({"threads": "0"}, "--threads takes whole numbers from 1 on"),
        ({"kv": "f16,f8"}, "--kv takes f32, f16, q8_0.* not 'f8'"),
        ({"lazy": "never"}, "--lazy takes auto, mmap, slots, off"),
        ({"lazy": "mmap,off", "memory": "4GiB"}, "--memory is for --lazy slots or auto, not for --lazy mmap"),
        ({"memory": "much"}, "--memory: a size is .*, not 'much'"),
    ],
)
def test_what_is_no_such_list_is_refused(how: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        request.read_request("m", **how)


# The arithmetic


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("kv", "element"), [("f32", 4), ("f16", 2), ("q8_0", 34 / 32)])
@pytest.mark.parametrize("depth", [0, 30])
def test_generation_is_measured_against_the_bytes_it_must_read(file: Path, kv: str, element: float, depth: int) -> None:
    asked = request.read_request(file, prompt="0", generate="4", depth=str(depth), kv=kv, repeat=3, threads="2")
    (series,) = measure.run(asked).series
    # 74,580 bytes of weights a token (test_inspection), and 128 elements for each of the cached tokens
    nbytes = 4 * 74580 + 128 * element * sum(depth + n for n in (1, 2, 3, 4))
    assert series.samples == [8, 8, 8]
    assert {(bound.name, bound.unit, bound.rate) for bound in series.bounds} == {("memory", "GB/s", 1e6)}
    assert all(math.isclose(percent, 100 * nbytes / 0.5 / 1e6) for percent in series.percents)


@pytest.mark.usefixtures("clock")
def test_a_prompt_is_measured_against_the_products_it_takes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "rates", lambda self: replace(RATES, read=1e12))
    (series,) = measure.run(request.read_request(file, prompt="7", generate="0", repeat=2, threads="1")).series
    matrices = 2 * 64 * 64 + 2 * 32 * 64 + 2 * 3 * 32 * 64  # of a block and token: attention, two experts
    integers = 2 * (7 * 2 * matrices + 260 * 64)  # logits of the last token only
    floats = 2 * 7 * 2 * (6 * 64 + 4 * (16 + 16) * 4)  # the router is float32, and so is attention: 4 of 7 on average
    assert (series.samples, series.bounds[0].name) == ([14, 14], "int8")
    assert math.isclose(series.percents[0], 100 * (integers / 4e7 + floats / 1e7) / 0.5)


def test_float_weights_count_as_float_operations(tmp_path: Path) -> None:
    asked = request.read_request(qwen3moe(tmp_path / "f.gguf"), prompt="7", generate="0", threads="1")
    subject = measure.Subject(asked, asked.settings[0], None, None)
    found = subject.work(asked.tests[0])
    assert found.integer_ops == 0
    assert found.bound(replace(RATES, read=1e12)).name == "float32"
    subject.model.close()


def test_samples_come_with_median_and_median_absolute_deviation() -> None:
    series = measure.Series("localmoe", request.Test("tg", 4), request.Setting(2))
    for rate in (10.0, 1.0, 11.0, 13.0, 12.0):
        series.add(rate, work.Bound("memory", "GB/s", 1e9, 0.1))
    assert (series.median, series.deviation) == (11, 1)
    assert series.percents == pytest.approx([25, 2.5, 27.5, 32.5, 30])  # 0.1 s of 4 tokens at so many a second


# Turns


def test_rounds_run_forwards_and_backwards_in_turn(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(measure.Subject, "warm_up", lambda self, tests: None)
    monkeypatch.setattr(
        measure.Subject, "tokens_per_second", lambda self, test: done.append(f"{test.name} {self.setting.kv}") or 1.0
    )
    measure.run(request.read_request(file, prompt="5", generate="3", kv="f16,f32", repeat=2, threads="1"))
    once = ["pp5 f16", "tg3 f16", "pp5 f32", "tg3 f32"]
    assert done == [*once, *reversed(once)]


def test_the_cache_is_filled_to_a_depth_once_and_stays_filled(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request.read_request(file, prompt="6", generate="2", depth="0,40", threads="1")
    subject = measure.Subject(asked, asked.settings[0], None, None)
    steps: list[tuple[int, int]] = []
    forward = subject.model.forward

    def noted(tokens: list[int], position: int, **how: Any) -> Any:
        steps.append((len(tokens), position))
        return forward(tokens, position, **how)

    monkeypatch.setattr(subject.model, "forward", noted)
    for _ in range(2):
        for test in asked.tests:
            subject.tokens_per_second(test)
    shallow = [(1, 0), (6, 0), (1, 0), (1, 0), (1, 1)]  # each run is behind one token that warms the caches up
    deep = [(1, 40), (6, 40), (1, 40), (1, 40), (1, 41)]
    assert steps == [*shallow, (34, 6), *deep, *shallow, *deep]
    assert subject.model.cached == subject.ids[:46]
    subject.model.close()


def test_a_real_run_has_a_series_for_each_test_and_tells_how_far_it_is(file: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    asked = request.read_request(file, prompt="20", generate="3", depth="0,9", repeat=2)
    results = measure.run(asked, progress=lambda *news: heard.append(news))
    assert [s.test.name for s in results.series] == ["pp20", "tg3", "pp20 @ d9", "tg3 @ d9"]
    assert all(math.isfinite(x) and x > 0 for s in results.series for x in (*s.samples, *s.percents))
    assert {news[2] for news in heard if news[0].startswith("tg3")} == {8}
    assert [news[1] for news in heard if news[0] == "tg3"] == [1, 6]


def test_a_device_without_yardsticks_is_measured_without_a_limit(file: Path) -> None:
    asked = request.read_request(file, prompt="0", generate="2", repeat=1, device="reference")
    report = report_of_results(measure.run(asked))
    assert report.tables[0].rows[0][-2:] == ("not measured", "")
    assert report.records[0]["limit"] is None


# The peer


@pytest.mark.usefixtures("clock")
def test_a_peer_takes_turns_with_and_without_repacking(file: Path, tmp_path: Path) -> None:
    asked = request.read_request(file, prompt="5,7", generate="3", repeat=2, threads="2", kv="f32")
    results = measure.run(asked, peer.Peer(llama_bench(tmp_path)))
    assert [(c["-p"], c["-n"], c["-d"], c["--repack"]) for c in calls(tmp_path)] == [
        ("5,7", "3", "0", "0"), ("5,7", "3", "0", "1"), ("5,7", "3", "0", "1"), ("5,7", "3", "0", "0"),
    ]  # fmt: skip
    first = calls(tmp_path)[0]
    assert (first["-t"], first["-ctk"], first["-ctv"], first["-r"], first["-m"]) == ("2", "f32", "f32", "1", str(file))
    engines = ["localmoe", "llama.cpp", "llama.cpp repacked"]
    assert [(s.test.name, s.engine) for s in results.series] == [(t, e) for t in ("pp5", "pp7", "tg3") for e in engines]
    ratio = results.ratio(results.series[-3])
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high, ratio.series.engine) == (1.5, 1.5, 1.5, "llama.cpp repacked")
    assert results.peer == "llama.cpp build 7 (commit abc), CPU, a chip, instruction set unknown"


@pytest.mark.parametrize(("pin", "flags"), [(None, (None, None)), ("0-1,4", ("0x13", "1"))])
def test_a_peer_is_pinned_where_we_are(tmp_path: Path, pin: str | None, flags: tuple[str | None, str | None]) -> None:
    (test,), setting = request.read_request("m", prompt="0").tests, request.Setting(3, pin=pin)
    found = peer.Peer(llama_bench(tmp_path))
    found.run(Path("m"), [test], setting, found.variants(0, "f16")[0])
    assert [(c.get("-C"), c.get("--cpu-strict")) for c in calls(tmp_path)] == [flags]


@pytest.mark.parametrize(("kv", "settings"), [("f16", 4), ("q8_0", 2)])
def test_behind_cached_tokens_the_peer_may_leave_flash_attention_out(tmp_path: Path, kv: str, settings: int) -> None:
    found = peer.Peer(llama_bench(tmp_path)).variants(64, kv)
    assert len(found) == settings
    assert [("-fa" in v.flags, v.name.endswith("no-fa")) for v in found[2:]] == [(True, True)] * (settings - 2)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("sys.exit('error: failed to load model')", "it ended with status 1: error: failed to load model"),
        ("os.kill(os.getpid(), 11)", "it ended with signal 11: without a word"),
        ("print('hello'); sys.exit()", "its output is not that of llama-bench"),
        ("print('[1]'); sys.exit()", "its output is not that of llama-bench"),
        (
            'print(\'[{"n_prompt": 5, "n_gen": 0, "n_depth": 0, "avg_ts": 0}]\'); sys.exit()',
            "its output is not that of llama-bench",
        ),
        ("print('[]'); sys.exit()", "its output has no result for pp5"),
        ("import time; time.sleep(60)", "no result after 0.5 s"),
    ],
)
def test_a_peer_that_fails_is_one_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: str,
    words: str,
) -> None:  # fmt: skip
    if "sleep" in trouble:
        monkeypatch.setattr(peer, "TIMEOUT", 0.5)
    script = llama_bench(tmp_path, trouble)
    assert bench(str(file), "-p", "5", "-n", "0", "-r", "1", "--against", str(script)) == 2
    said = capsys.readouterr().err
    assert f"--against {script}: {words}" in said
    assert said.count("\n") == 1


def test_a_peer_that_is_not_there_is_refused_before_the_model_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("nowhere.gguf", "--against", str(tmp_path / "llama-bench")) == 2
    assert "no program; a llama-bench binary is wanted" in capsys.readouterr().err


def test_a_file_that_the_system_cannot_start_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "llama-bench"
    broken.write_bytes(b"\x00nothing")
    broken.chmod(0o755)
    with pytest.raises(SettingError, match="it does not start"):
        peer.Peer(broken).run(
            Path("m"), [request.Test("pp", 5)], request.Setting(1), peer.Variant(repack=True, flash_attention=True)
        )


@pytest.mark.skipif(machine.platform.machine().lower() not in peer.X86, reason="the machine code of x86-64")
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("62f26d4850c1", "AVX-512 VNNI"),  # vpdpbusd zmm0, zmm2, zmm1
        ("62f26d48b8c1", "AVX-512 without VNNI"),  # vfmadd231ps zmm0, zmm2, zmm1
        ("c4e26db8c1", "AVX2 only"),  # vfmadd231ps ymm0, ymm2, ymm1
        ("62f26d2850c1", "instruction set unknown"),  # vpdpbusd ymm0, ymm2, ymm1
    ],
)
@pytest.mark.parametrize("place", ["llama-bench", "libggml-cpu.so"])
def test_the_machine_code_says_which_build_was_met(tmp_path: Path, code: str, words: str, place: str) -> None:
    binary = llama_bench(tmp_path)
    (tmp_path / place).write_bytes(b"\x90" * 9 + bytes.fromhex(code) * 16)
    assert peer.Peer(binary).instructions == words


# Op by op


@pytest.mark.parametrize("family", [qwen3moe, deepseek2])
def test_a_profile_holds_every_entry_and_the_work_of_every_op(tmp_path: Path, family: Any) -> None:
    path = family(tmp_path / "m.gguf", format="Q8_0")
    asked = request.read_request(path, prompt="40", generate="3", depth="5", repeat=2, threads="2")
    profiles = roofline.run(asked)
    assert [step.step.name for step in profiles.steps] == ["pp40 @ d5", "tg1 @ d5"]
    subject = measure.Subject(asked, asked.settings[0], None, None)
    for profile, test in zip(profiles.steps, (request.Test("pp", 40, 5), request.Test("tg", 1, 5)), strict=True):
        whole = subject.work(test)
        total = sum((row.work for row in profile.rows), work.Work())
        assert (total.nbytes, total.ops) == pytest.approx((whole.nbytes, whole.ops))
        tokens = 1 if test.kind == "tg" else subject.model.chunk
        plan = subject.model.device.compile(subject.model.network.program(tokens))
        assert sum(row.entries for row in profile.rows) == len(plan.entries())
        kernels = {row.op: row.kernels for row in profile.rows}
        assert "route" in kernels["route"]
        assert {name for names in kernels.values() for name in names} == set(plan.entries())
    subject.model.close()


def test_an_entry_run_by_itself_computes_what_the_tape_computes(file: Path) -> None:
    asked = request.read_request(file, prompt="0", generate="1", threads="2")
    model = measure.Subject(asked, asked.settings[0], None, None).model
    plan = model.device.compile(model.network.program(1))
    expected = plan.run(np.array([7], np.int32), 0)
    for index in range(len(plan.entries())):
        plan.run_entry(index)
    assert plan._output.tobytes() == expected.tobytes()
    model.close()


def test_the_cost_of_calling_entries_one_by_one_is_taken_out() -> None:
    assert roofline.without_calls(np.array([5.0, 2.0, 0.5]), 6.0).tolist() == [4.5, 1.5, 0]
    assert roofline.without_calls(np.array([5.0, 2.0]), 8.0).tolist() == [5, 2]


def test_a_device_without_a_tape_has_no_profile(file: Path) -> None:
    with pytest.raises(SettingError, match="'reference' has no tape"):
        roofline.run(request.read_request(file, generate="1", device="reference"))


# The yardsticks


@pytest.mark.parametrize(("name", "distance"), limits.READ_FORMS)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_read_loop_loads_every_byte_exactly_once(threads: int, name: str, distance: int) -> None:
    device = CpuDevice(16, "f16", threads)
    yardstick = Limits(device)
    data = yardstick.data
    data[:] = np.random.default_rng(0).integers(0, 256, data.size, np.uint8)
    assert yardstick._seconds(name, data.ctypes.data, data.size, distance) > 0
    found = yardstick._results.view(np.int32)[:: 64 // 4][:threads]
    lanes = device.kernels.isa.lanes
    lines = data.view(np.int32).reshape(-1, 8 * lanes)  # what one turn of the loop reads
    cuts = [len(lines) * t // threads for t in range(threads + 1)]
    parts = [lines[a:b].reshape(-1, lanes) for a, b in pairwise(cuts)]
    expected = [np.bitwise_xor.reduce(part).astype(np.int64).sum().astype(np.int32) for part in parts]
    assert found.tolist() == expected
    device.close()


def test_the_fastest_pass_of_the_fastest_form_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CpuDevice(16, "f16", 1)
    yardstick = Limits(device)
    pairs = [(0, 9)] * (3 * len(limits.READ_FORMS) - 2) + [(0, 2), (0, 5)]
    times: Iterator[float] = iter([moment for pair in pairs for moment in pair])
    monkeypatch.setattr(limits, "perf_counter", lambda: next(times))
    assert yardstick.read_nbytes_per_second() == (1 << 20) / 2
    times = iter([0, 4, 10, 18, 20, 21])
    assert yardstick.float_ops_per_second() == 2 * 10 * device.kernels.isa.lanes * (1 << 12)
    times = iter([0, 4, 10, 18, 20, 21])
    assert yardstick.integer_ops_per_second() == 4 * 2 * 10 * device.kernels.isa.lanes * (1 << 12)
    device.close()


@pytest.mark.parametrize("name", runnable())
def test_every_instruction_set_has_yardsticks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LOCALMOE_ISA", name)
    device = CpuDevice(16, "f16", 2)
    rates = Limits(device).rates()
    assert device.kernels.isa.name == name
    assert all(math.isfinite(rate) and rate > 0 for rate in (rates.read, rates.float_ops, rates.integer_ops))
    device.close()


@pytest.mark.parametrize(
    ("isa", "kernel", "instruction"),
    [
        ("avx512", "limit_dot", r"vpdpbusd\s.*zmm"),
        ("avx512", "limit_fma", r"vfmadd\d+ps\s.*zmm"),
        ("avx2", "limit_dot", r"vpmaddubsw\s.*ymm"),
        ("avx2", "limit_fma", r"vfmadd\d+ps\s.*ymm"),
    ],
)
def test_the_chains_of_a_yardstick_are_left_in_its_code(isa: str, kernel: str, instruction: str) -> None:
    if isa not in runnable():
        pytest.skip(f"no {isa} here")
    assert len(re.findall(instruction, assembly(kernel, named(isa)))) >= limits.CHAINS


# What is printed


@pytest.mark.usefixtures("clock")
def test_json_has_the_columns_of_llama_bench_and_ours(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(llama_bench(tmp_path))
    words = (str(file), "-p", "0", "-n", "4", "-d", "3", "-t", "2", "-r", "2", "--json")
    assert bench(*words, "--against", script) == 0
    ours, *theirs = json.loads(capsys.readouterr().out)
    columns = {
        "model_filename": str(file), "model_type": "qwen3moe Q8_0", "n_threads": 2, "type_k": "f16", "type_v": "f16",
        "n_prompt": 0, "n_gen": 4, "n_depth": 3, "avg_ts": 8.0, "stddev_ts": 0.0, "samples_ts": [8.0, 8.0],
        "avg_ns": 500000000, "stddev_ns": 0, "samples_ns": [500000000, 500000000],
    }  # fmt: skip
    assert {key: ours[key] for key in columns} == columns
    assert (ours["engine"], ours["limit"], ours["ratio"], ours["ratio_against"]) == (
        "localmoe", "memory", 2.0, "llama.cpp repacked",
    )  # fmt: skip
    assert ours["model_n_params"] > 0 and ours["model_size"] > 0 and ours["test_time"].endswith("Z")
    assert [(t["engine"], t["avg_ts"], t["repack"], t["build_number"]) for t in theirs] == [
        ("llama.cpp", 2.0, False, 7), ("llama.cpp repacked", 4.0, True, 7),
        ("llama.cpp no-fa", 2.0, False, 7), ("llama.cpp repacked no-fa", 4.0, True, 7),
    ]  # fmt: skip
    assert set(columns) <= set(theirs[0])


@pytest.mark.usefixtures("clock")
def test_markdown_has_a_column_for_what_is_varied_and_a_row_for_each_engine(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(llama_bench(tmp_path))
    assert bench(str(file), "-p", "0", "-n", "4", "-t", "1,2", "-r", "2", "--markdown", "--against", script) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("| test | threads | engine | tokens/s | range | ± MAD | of the limit | limits seen | ratio |")
    assert lines[2:5] == [
        "| tg4 | 1 | localmoe | 8.00 | 8.00…8.00 | 0.00 | 60 % of memory | 0.0…0.0 GB/s | 2.00 (2.00…2.00) |",
        "| tg4 | 1 | llama.cpp | 2.00 | 2.00…2.00 | 0.00 | 15 % of memory | 0.0…0.0 GB/s |  |",
        "| tg4 | 1 | llama.cpp repacked | 4.00 | 4.00…4.00 | 0.00 | 30 % of memory | 0.0…0.0 GB/s | better |",
    ]
    assert lines[-1] == "- ratio: localmoe over the better of its settings, round by round"


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's tokens choose 8 experts, of which 6 are there; a fresh one costs 1 MB, and half of the time."""
    totals: dict[int, Counts] = {}
    forward = Model.forward

    def counted(self: Model, tokens: list[int], position: int, *rest: Any, **how: Any) -> Any:
        n = len(tokens)
        more = Counts(1, n, 8 * n, 6 * n, nbytes_read=2_000_000 * n, waited_seconds=0.5, seconds=1.0)
        totals[id(self)] = totals.get(id(self), Counts()) + more
        return forward(self, tokens, position, *rest, **how)

    monkeypatch.setattr(Model, "forward", counted)
    monkeypatch.setattr(Model, "counts", lambda self: totals.get(id(self), Counts()))
    monkeypatch.setattr(Model, "residency_mode", property(lambda self: "slots"))


@pytest.mark.usefixtures("clock", "counting")
def test_where_experts_are_counted_there_are_columns_for_them(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(str(file), "-p", "6", "-n", "4", "-t", "2", "-r", "3", "--markdown", "--memory", "8GiB") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("| test | tokens/s | range | ± MAD | hits | GB/token | reading |")
    assert lines[2:4] == [
        "| pp6 | 12.00 | 12.00…12.00 | 0.00 | 75.0 % | 0.002 | 50 % |",
        "| tg4 | 8.00 | 8.00…8.00 | 0.00 | 75.0 % | 0.002 | 50 % |",
    ]
    assert "loading auto (slots)" in lines[-1]


@pytest.mark.usefixtures("clock", "counting")
def test_json_says_what_became_of_the_experts_in_all_rounds(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(str(file), "-p", "0", "-n", "4", "-t", "2", "-r", "3", "--json", "--memory", "8GiB") == 0
    (found,) = json.loads(capsys.readouterr().out)
    told = {
        "load_mode": "auto", "loaded_as": "slots", "memory_budget": 8 << 30, "expert_hit_rate": 0.75,
        "expert_nbytes_per_token": 2e6, "reading_share": 0.5,
    }  # fmt: skip
    assert {key: found[key] for key in told} == told
    assert (found["expert_counts"]["tokens"], found["expert_counts"]["chosen"]) == (12, 96)
    assert found["limit"] is None


@pytest.mark.usefixtures("counting")
def test_with_slots_each_round_has_tokens_of_its_own_behind_the_same_ones(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request.read_request(file, prompt="6", generate="0", depth="4", threads="1")
    subject = measure.Subject(asked, asked.settings[0], None, None)
    texts = []
    for _ in range(2):
        subject.tokens_per_second(asked.tests[0])
        texts.append(list(subject.model.cached))
    assert texts[0][:4] == texts[1][:4] == subject.ids[:4]
    assert texts[0][4:] != texts[1][4:]
    subject.model.close()


@pytest.mark.usefixtures("counting")
def test_steps_that_wait_for_reads_are_not_looked_into(file: Path) -> None:
    with pytest.raises(SettingError, match="--ops is for steps that never wait for reads"):
        roofline.run(request.read_request(file, generate="1", prompt="0"))


@pytest.mark.usefixtures("clock")
def test_a_table_without_a_peer_is_short(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(str(file), "-p", "0", "-n", "4", "-t", "2", "-r", "1", "--plot") == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].split() == "test tokens/s range ± MAD of the limit limits seen".split()
    assert lines[1].split() == "tg4 8.00 8.00…8.00 0.00 60 % of memory 0.0…0.0 GB/s".split()
    assert lines[-2] == "tg4"
    assert lines[-1].split() == ["localmoe", "█" * 40, "8.00", "tokens/s"]


@pytest.mark.usefixtures("clock")
def test_saving_names_the_machine_and_appends(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(file), "-p", "0", "-n", "4", "-r", "1")
    for _ in range(2):
        assert bench(*words, "--save", str(tmp_path / "results")) == 0
    (saved,) = (tmp_path / "results").iterdir()
    assert saved.name.endswith("-tiny.md")
    text = saved.read_text()
    assert text.count("# tiny.gguf, ") == text.count("| tg4 |") == 2
    assert all(f"- {key}: " in text for key in ("processor", "instruction set", "cores", "memory", "system", "Python"))
    assert f"saved in {saved}" in capsys.readouterr().err
    assert bench(*words, "--save", str(tmp_path / "mine.md")) == 0
    assert (tmp_path / "mine.md").read_text().startswith("# tiny.gguf, ")


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("flag", ["--save", "--svg"])
def test_a_file_that_cannot_be_written_is_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    (tmp_path / "file").touch()
    assert bench(str(file), "-p", "0", "-n", "2", "-r", "1", flag, str(tmp_path / "file" / "x.md")) == 2
    assert f"localmoe: {flag} {tmp_path / 'file' / 'x.md'}: " in capsys.readouterr().err


def test_the_svg_is_sound_and_asks_nothing_of_the_network(file: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "bars.svg"
    assert bench(str(file), "-p", "9", "-n", "0", "-r", "1", "--svg", str(drawing)) == 0
    text = drawing.read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "pp9" in text and "█" in text
    assert text.count("://") == 1  # the name of the format


def test_ops_prints_a_table_a_step(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(str(file), "-p", "9", "-n", "3", "-r", "2", "-t", "2", "--ops", "--markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if line.endswith("in one piece")] == [
        "pp9, 2 threads, KV f16", "tg1, 2 threads, KV f16",
    ]  # fmt: skip
    assert lines.count("| op | time | share | GB/s | GOPS | of the limit | entries |") == 2
    assert bench(str(file), "-p", "9", "-n", "0", "-r", "2", "--ops", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert {"linear Q8_0", "experts Q8_0", "attention", "route"} <= {record["op"] for record in records}


def test_ops_and_a_peer_do_not_go_together(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(str(file), "--ops", "--against", str(llama_bench(tmp_path))) == 2
    assert "leave --against out" in capsys.readouterr().err


def test_bars_of_a_group_share_a_scale(file: Path) -> None:
    asked = request.read_request(file, prompt="9", generate="2", repeat=1)
    report = report_of_profiles(roofline.run(asked))
    assert {bar.group.split(",")[0] for bar in report.bars} == {"pp9", "tg1"}
    assert all(isinstance(bar, Bar) and bar.value >= 0 for bar in report.bars)


def test_the_machine_is_described_even_where_the_system_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg")
    read = Path.read_text

    def silent(path: Path, *arguments: str, **named: str) -> str:
        if path.is_relative_to("/proc") or path.is_relative_to("/sys"):
            raise OSError(path)
        return read(path, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", silent)
    told = machine.description()
    assert told["load average"] == "unknown"
    assert all(told.values())
