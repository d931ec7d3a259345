"""`localmoe perplexity`: llama-perplexity's windows, figures and file of logits; hostile files; what Ctrl+C leaves."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import qwen3moe

import localmoe
from localmoe.cli import main
from localmoe.errors import FileFormatError, LocalMoeError, SettingError
from localmoe.evaluation.perplexity import Chunk, read_request, run, score, scores_of
from localmoe.evaluation.saved_logits import HEAD, LogitsWriter, Rows, SavedLogits, rounded, saving
from localmoe.evaluation.statistics import Estimate, Scores
from localmoe.evaluation.summary import is_told
from localmoe.evaluation.windows import Windows, cut
from localmoe.model import Model

TEXT = "".join(f"the {i}th sentence says that {i * i} is a square. " for i in range(60))
# llama-perplexity (xllamacpp 2026.10.11549) -c 512 -fa off -ctk f32 -ctv f32, stories260K-f32.gguf, WikiText-2
GOLDEN = [191.8601, 187.2289, 167.7641, 170.7928, 179.7435, 171.8042, 199.8006, 207.0802]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3moe(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    opened = localmoe.load(path, context=64, kv_format="f32")
    yield opened
    opened.close()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["perplexity", *map(str, words)])
    code = caught.value.code
    return code if isinstance(code, int) else 0


def scored(model: Model, **how: Any) -> Scores:
    asked = read_request(**how)
    return Scores.joined([chunk.scores for chunk in run(model, asked, asked.windows(model.tokenizer))])


def hand_made(
    context: int = 8, vocabulary: int = 3, chunks: int = 2, tokens: list[int] | None = None, rows: bytes | None = None
) -> bytes:
    """Context 8 scores three positions of a chunk; three tokens of vocabulary are filled up to four."""
    ids = tokens if tokens is not None else [0, 1, 2, 0, 1, 2, 0, 1] * 2
    row = struct.pack("<2f4H", 0.5, -4.0, 0, 2, 6, 9) + 2 * struct.pack("<2f4H", 0.25, -8.0, 4, 8, 12, 9)
    head = b"_logits_" + struct.pack("<3i", context, vocabulary, chunks) + struct.pack(f"<{len(ids)}i", *ids)
    return head + (rows if rows is not None else 2 * row)


def test_a_saved_file_is_tokens_and_rows_of_scaled_steps(tmp_path: Path) -> None:
    file = tmp_path / "saved"
    file.write_bytes(hand_made())
    saved = SavedLogits(file)
    assert (saved.context, saved.vocabulary, saved.chunks, saved.scored) == (8, 3, 2, 3)
    assert saved.tokens.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] * 2
    assert saved.chunk(1).values().tolist() == [[-4.0, -3.0, -1.0], [-7.0, -6.0, -5.0], [-7.0, -6.0, -5.0]]


def test_what_is_written_is_read_again_byte_for_byte(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    first.write_bytes(hand_made())
    saved = SavedLogits(first)
    with again.open("wb") as file:
        writer = LogitsWriter(file, Windows(saved.tokens, 8, 8, 3, 2, None), 3)
        for number in range(2):
            writer.write(saved.chunk(number))
    padding = np.zeros(again.stat().st_size, bool)
    padding[HEAD + 4 * 16 :].reshape(6, 16)[:, -2:] = True
    assert np.array_equal(
        np.frombuffer(first.read_bytes(), np.uint8)[~padding], np.frombuffer(again.read_bytes(), np.uint8)[~padding]
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GGUF" + bytes(40), "expected b'_logits_'"),
        (b"_logits_", "expected b'_logits_'"),
        (hand_made()[:-1], "was it saved to its end"),
        (hand_made() + b"\0", "was it saved to its end"),
        (hand_made(context=2**31 - 1, vocabulary=2**31 - 1, chunks=2**31 - 1), "was it saved to its end"),
        (hand_made(context=-8), "not possible"),
        (hand_made(context=2), "not possible"),
        (hand_made(vocabulary=0), "not possible"),
        (hand_made(chunks=0), "not possible"),
        (hand_made(tokens=[0, 1, 3] + [0] * 13), "tokens outside its vocabulary"),
        (hand_made(tokens=[0, 1, -1] + [0] * 13), "tokens outside its vocabulary"),
    ],
)
def test_a_hostile_file_is_refused_by_its_head(data: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "base"
    file.write_bytes(data)
    with pytest.raises(FileFormatError, match=said) as caught:
        SavedLogits(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_no_number_is_refused(number: float, tmp_path: Path) -> None:
    file = tmp_path / "base"
    file.write_bytes(hand_made(rows=6 * struct.pack("<2f4H", number, -1.0, 0, 0, 0, 0)))
    with pytest.raises(FileFormatError, match="chunk 1 has a scale"):
        SavedLogits(file).chunk(0)


def test_saved_logits_end_16_nats_below_the_best_and_move_by_half_a_step() -> None:
    logits = np.array([[3.0, -2.0, -40.0, 0.1234567], [5.0, 5.0, 5.0, 5.0]], np.float32)
    kept = rounded(logits).values()
    right = np.maximum(logits, logits.max(axis=1, keepdims=True) - 16)
    right -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert np.abs(kept - right).max() <= 16 / 65535 / 2 + 4e-6
    assert kept[1] == pytest.approx([-np.log(4)] * 4)


def test_a_score_is_the_paper_s_figure() -> None:
    """p = (3/4, 1/4) against q = (1/4, 3/4), then against itself; the text goes on with token 0, then with 1."""
    p = np.log(np.array([[3.0, 1.0]] * 2, np.float32))
    q = np.stack([p[0, ::-1], p[1]])
    found = scores_of(q, np.array([0, 1]), rounded(p))
    assert found.surprise == pytest.approx([np.log(4), np.log(4)])
    assert found.base_surprise == pytest.approx([np.log(4 / 3), np.log(4)], abs=1e-4)
    assert found.divergence == pytest.approx([0.5 * np.log(3), 0], abs=1e-4)
    assert found.difference == pytest.approx([-0.5, 0], abs=1e-4)
    assert found.same_best.tolist() == [0, 1]


def test_errors_of_ratios_know_that_both_sides_go_together() -> None:
    random = np.random.default_rng(1)
    base = random.random(500)
    scores = Scores(base + 0.01 * random.random(500), base, base * 0, base * 0, np.ones(500))
    a, b = Estimate.mean(scores.surprise).error, Estimate.mean(base).error
    covariance = np.cov(scores.surprise, base, ddof=0)[0, 1] / 499
    assert scores.log_ratio().error == pytest.approx((a * a + b * b - 2 * covariance) ** 0.5)
    assert scores.log_ratio().error < 0.05 * a
    ours, theirs = scores.perplexity(), scores.base_perplexity()
    paired = ours.error**2 + theirs.error**2 - 2 * ours.value * theirs.value * covariance
    assert scores.perplexity_difference().error == pytest.approx(paired**0.5)
    assert scores.correlation() == pytest.approx(np.corrcoef(scores.surprise, base)[0, 1])


def test_windows_lie_side_by_side_and_begin_with_bos() -> None:
    windows = cut(np.arange(100, 139, dtype=np.int32), 9, 0, None, 1, "text")
    assert [w.tolist() for w in windows][1] == [1, *range(110, 118)]
    assert (windows.count, windows.first, windows.scored) == (4, 4, 4)
    assert cut(windows.tokens, 9, 0, 2, None, "text").count == 2
    assert windows.tokens[0] == 100, "BOS is put into a copy"


def test_windows_of_a_stride_overlap_and_score_each_token_once() -> None:
    windows = cut(np.arange(40, dtype=np.int32), 16, 8, None, None, "text")
    targets = [w[windows.first + 1 :].tolist() for w in windows]
    assert targets == [list(range(8, 16)), list(range(16, 24)), list(range(24, 32))]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"context": 21}, "--context 20 or less"),
        ({"context": 7}, "at least 8"),
        ({"context": 16, "stride": 16}, "below 16"),
    ],
)
def test_windows_that_are_not_possible_are_refused(how: dict[str, int], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        cut(np.zeros(41, np.int32), **{"stride": 0, "chunks": None, "bos": None, "origin": "t", **how})


def test_perplexity_is_that_of_the_second_halves(model: Model, text: Path) -> None:
    found = scored(model, text=text, context=32, chunks=3)
    surprise: list[float] = []
    ids = model.tokenizer.encode(TEXT.removesuffix("\n"), special=False)
    for start in (0, 32, 64):
        logits = model.forward(ids[start : start + 32], 0, all_logits=True).astype(np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        surprise += [-np.log(chances[i, ids[start + i + 1]]) for i in range(16, 31)]
    assert found.surprise == pytest.approx(surprise, rel=1e-5)
    assert found.perplexity().value == pytest.approx(np.exp(np.mean(surprise)))


def test_scores_do_not_depend_on_how_many_logits_are_kept_at_once(
    model: Model, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scored(model, text=text, context=64)
    monkeypatch.setattr(Model, "score_chunk", 7)
    monkeypatch.setattr("localmoe.evaluation.perplexity.BLOCK", 1)
    assert np.array_equal(scored(model, text=text, context=64).surprise, whole.surprise)


def test_a_model_beside_its_own_logits_differs_by_rounding_alone(model: Model, text: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    first = scored(model, text=text, context=32, chunks=4, kl_base=base)
    again = scored(model, text=text, kl_base=base)
    assert np.array_equal(first.surprise, again.surprise)
    assert abs(again.mean_divergence().value) < 1e-5
    assert again.agreement().value == 1
    assert abs(again.log_ratio().value) < 1e-4
    assert np.array_equal(scored(model, text=None, kl_base=base, chunks=4).divergence, again.divergence)
    assert scored(model, text=None, kl_base=base, chunks=2).surprise.size == 30


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": 16}, "saved with a context of 32"),
        ({"stride": 4}, "leave --stride out"),
        ({"text": "other"}, "differ from number 24 on"),
        ({"text": "short"}, "differ from number 40 on"),
    ],
)
def test_a_base_of_something_else_is_refused(
    change: dict[str, Any], said: str, model: Model, text: Path, tmp_path: Path
) -> None:
    scored(model, text=text, context=32, chunks=4, kl_base=tmp_path / "base")
    if "text" in change:
        ids = TEXT[:24] + "?" + TEXT[25:] if change["text"] == "other" else TEXT[:40]
        change = {"text": tmp_path / "other.txt"}
        change["text"].write_text(ids)
    with pytest.raises(LocalMoeError, match=said):
        scored(model, **{"text": text, "kl_base": tmp_path / "base", **change})


def test_a_base_of_another_vocabulary_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(hand_made())
    with pytest.raises(SettingError, match="saved by a model with 3 tokens"):
        scored(model, text=None, kl_base=tmp_path / "base")


def test_the_first_chunks_are_llama_perplexity_s_to_its_last_digit(conformance: Path) -> None:
    whole = (conformance / "corpora" / "wikitext2-valid.txt").read_bytes()[:300_000].decode()
    model = localmoe.load(conformance / "models" / "stories260K" / "stories260K-f32.gguf", context=512, kv_format="f32")
    windows = cut(
        np.asarray(model.tokenizer.encode(whole, special=False), np.int32), 512, 0, 8, model.tokenizer.bos, "text"
    )
    parts: list[Scores] = []
    for chunk in score(model, windows):
        parts.append(chunk.scores)
        assert Scores.joined(parts).perplexity().value == pytest.approx(GOLDEN[chunk.number], abs=2e-4)
    assert Scores.joined(parts).perplexity().error == pytest.approx(20.3349, abs=1e-3)
    model.close()


def test_the_command_prints_estimates_and_ends_with_the_whole(
    path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(path, text, "-c", 16, "--chunks", 12) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[1] == "12 chunks of 16, the last 7 scored"
    assert [line.split()[0] for line in lines[2:-1]] == [str(n) for n in range(1, 11)]
    assert lines[-1].startswith("PPL = ")
    assert "(12 of 12 chunks" in lines[-1]


def test_the_command_beside_a_base_fits_80_columns(
    path: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(path, text, "-c", 16, "--kl-base", tmp_path / "base") == 0
    capsys.readouterr()
    assert call(path, "--kl-base", tmp_path / "base") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for said in ("KL divergence, mean", "99.9 %", "median", "same best token     ", "100.000 ± 0.000 %", "root mean"):
        assert said in out


def test_json_has_every_figure_and_every_estimate(
    path: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(path, text, "-c", 16, "--kl-base", tmp_path / "base", "--json")
    saved = json.loads(capsys.readouterr().out)
    assert saved["saved"] == str(tmp_path / "base")
    call(path, text, "--kl-base", tmp_path / "base", "--json", "--chunks", 3)
    found = json.loads(capsys.readouterr().out)
    assert (found["chunks"], found["chunks_done"], found["context"], len(found["running"])) == (3, 3, 16, 3)
    assert found["same_best_token"] == {"value": 1.0, "error": 0.0}
    assert found["running"][-1] == found["perplexity"]
    assert [q["share"] for q in found["quantiles"]][:3] == [1.0, 0.999, 0.99]


def test_ctrl_c_prints_the_estimate_so_far_and_leaves_no_half_a_file(
    path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: Any) -> Iterator[Chunk]:
        chunks = score(*given)
        yield next(chunks)
        yield next(chunks)
        raise KeyboardInterrupt

    monkeypatch.setattr("localmoe.evaluation.perplexity.score", interrupted)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert call(path, text, "-c", 16, "--kl-base", folder / "base") == 130
    assert "(2 of 169 chunks" in capsys.readouterr().out.splitlines()[-1]
    assert list(folder.iterdir()) == []


def test_a_disk_without_room_is_said_before_the_work(
    model: Model, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 1000, 0))
    with pytest.raises(SettingError, match="0 B are free"):
        scored(model, text=text, context=32, kl_base=tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    windows = Windows(np.zeros(16, np.int32), 8, 8, 3, 2, None)
    with pytest.raises(SettingError, match=f"{tmp_path / 'base'}: No space"), saving(tmp_path / "base", windows, 3):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_finite_are_said_to_be() -> None:
    class Broken:
        score_chunk = 8

        def forward(self, tokens: list[int], *_: object, **__: object) -> Any:
            return np.full((len(tokens), 3), np.nan, np.float32)

    with pytest.raises(FileFormatError, match="chunk 1: the model's logits are not finite"):
        list(score(Broken(), cut(np.zeros(32, np.int32), 8, 0, None, None, "t")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.txt"], "missing.txt: no such file"),
        (["."], "is a folder"),
        ([], "a FILE with text is wanted"),
        (["short.txt"], "a context of 512 needs 1024"),
        (["binary.txt"], "not UTF-8 at byte 1"),
        (["text.txt", "--kl-base", "binary.txt"], "expected b'_logits_'"),
        (["text.txt", "--kl-base", "no/folder/base"], "there is no folder 'no/folder'"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    words: list[str],
    said: str,
    path: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary.txt").write_bytes(b"a\xff\xfe" + bytes(2000))
    monkeypatch.chdir(tmp_path)
    assert call(path, *words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_lines_come_more_seldom_as_the_estimate_moves_less() -> None:
    assert [n for n in range(1, 400) if is_told(n)] == [*range(1, 11), *range(20, 101, 10), 200, 300]


def test_rows_of_saved_logits_can_be_taken_in_parts() -> None:
    rows = rounded(np.arange(12, dtype=np.float32).reshape(4, 3))
    part: Rows = rows.part(slice(1, 3))
    assert np.array_equal(part.values(), rows.values()[1:3])
