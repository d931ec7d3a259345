"""Tokens taken out of the middle of a KV cache: keys at their new positions against the forward pass itself, for every
family, device and format."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from programs import distance, exactly
from registry import BY_ARCHITECTURE, MODELS, written
from tiny import IDS, Tiny

from localmoe.errors import SettingError
from localmoe.formats import F16, F32, FORMATS, KV_FORMATS
from localmoe.kernels import reference, shifting
from localmoe.kernels.cache_blocks import decoded
from localmoe.kernels.ops import Ops, trace
from localmoe.kernels.program import CacheLayer, Op, RopeTable, Tensor
from localmoe.kernels.reference_weights import values
from localmoe.model import Model

Array = npt.NDArray[Any]
SHIFTED = [name for name in MODELS if not shifting.obstacle(MODELS[name]().network().program(1), F32)]
START, STOP, CONTEXT = 5, 12, 40
LOSS = {"f32": 2e-6, "f16": 1e-3, "q8_0": 0.02, "q4_0": 0.3}  # of a key that is rounded once more


def cached_rows(model: Model) -> list[tuple[Array, Array | None]]:
    """Keys and values of each layer as floats, (K, tokens, d), copied."""
    found, count = [], len(model.cached)
    for layer in model.network.program(1).cache:
        if model.device.name == "reference":
            keys, kept = model.device.caches[layer.index]  # type: ignore[attr-defined]
            found.append((keys[:, :count].copy(), None if kept is None else kept[:, :count].copy()))
            continue
        keys, kept = model.device.cache(layer)  # type: ignore[attr-defined]
        kind = KV_FORMATS[model.kv_format]
        both = ((keys, layer.key_width), (kept, layer.value_width))
        found.append(tuple(None if x is None else decoded(x[:, :count], kind, width or 0) for x, width in both))  # type: ignore[arg-type]
    return found


class Recorded:
    """What every op of a reference pass over a text gave, from which keys can be computed at other positions."""

    def __init__(self, path: Path, tokens: list[int]) -> None:
        self.model = Model(path, device="reference", context=CONTEXT, kv_format="f32")
        self.outputs: dict[int, tuple[Op, Array]] = {}
        self.appended: list[Op] = []
        self.model.watch(tokens, self.see)

    def see(self, op: Op, inputs: list[Array], outputs: list[Array]) -> None:
        for tensor, output in zip(op.outputs, outputs, strict=True):
            self.outputs[tensor.buffer] = (op, np.array(output))
        if op.name == "cache_append":
            self.appended.append(op)

    def rows(self, tensor: Tensor, at: slice, position: int) -> Array:
        """The tokens of `at` of a tensor, computed as if they stood from `position` on: the norms, rope and concat
        behind the last matrix run once more."""
        op, output = self.outputs[tensor.buffer]
        rows = np.ascontiguousarray(output[at])
        if op.name in ("rope", "concat", "rms_norm", "layer_norm"):
            inputs = [self.rows(x, at, position) for x in op.inputs]
            (rows,) = reference._TWINS[op.name](self.model.device, op, inputs, position)  # type: ignore[arg-type]
        flat = np.ascontiguousarray(rows, np.float32).reshape(-1)[tensor.offset :]
        shape, strides = (len(rows), *tensor.shape[1:]), tuple(4 * s for s in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, shape, strides).copy()

    def keys(self, position: int, first: int) -> list[Array]:
        """Those of the tokens from `first` on, (K, tokens, d), as if they stood from `position` on."""
        at = slice(first, len(self.model.cached))
        return [self.rows(op.inputs[0], at, position).transpose(1, 0, 2) for op in self.appended]


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", SHIFTED)
def test_later_keys_are_those_of_the_same_hidden_states_at_the_lower_position(
    name: str, device: str, tmp_path: Path
) -> None:
    path = written(MODELS[name](), tmp_path / "tiny.gguf")
    recorded = Recorded(path, IDS)
    expected, unmoved = recorded.keys(START, STOP), recorded.keys(STOP, STOP)
    assert any(distance(a, b) > 0.1 for a, b in zip(unmoved, expected, strict=True)), "positions count for nothing"
    model = Model(path, device=device, context=CONTEXT, kv_format="f32", threads=2)
    model.forward(IDS, 0)
    before = cached_rows(model)
    model.shift(START, STOP)
    assert model.cached == IDS[:START] + IDS[STOP:]
    assert model.unshifted == START
    for (keys, kept), (old, old_kept), keys_there in zip(cached_rows(model), before, expected, strict=True):
        assert np.array_equal(keys[:, :START], old[:, :START])
        assert distance(keys[:, START:], keys_there) <= 2e-5
        if kept is not None and old_kept is not None:
            assert np.array_equal(kept, np.delete(old_kept, slice(START, STOP), axis=1))
    for one in (model, recorded.model):
        one.close()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3", "deepseek32", "phi3"])
def test_both_devices_turn_alike_and_lose_what_their_format_loses(name: str, kv_format: str, tmp_path: Path) -> None:
    path = written(MODELS[name](), tmp_path / "tiny.gguf")
    expected = Recorded(path, IDS).keys(START, STOP)
    found = {}
    for device in ("reference", "cpu"):
        model = Model(path, device=device, context=CONTEXT, kv_format=kv_format, threads=1)
        model.forward(IDS, 0)
        model.shift(START, STOP)
        found[device] = cached_rows(model)
        model.close()
    first = True
    for (ours, _), (twins, _), keys in zip(found["cpu"], found["reference"], expected, strict=True):
        if first:  # of later layers, the hidden states have met rounded keys before
            assert distance(ours[:, START:], keys) <= LOSS[kv_format]
            # A value at the border of two steps may fall to either side.
            assert np.median(np.abs(ours - twins)) <= 1e-6 * np.abs(ours).max()
        first = False


def with_one_layer(tiny: Tiny) -> Tiny:
    kept = {name: x for name, x in tiny.tensors.items() if not name.startswith("blk.") or name.startswith("blk.0.")}
    return tiny.with_tensors(kept).with_keys(block_count=1)


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "phi3", "command_r", "hunyuan", "mistral3", "deepseek_v3"])
def test_with_one_layer_a_shifted_cache_answers_as_the_shorter_text(name: str, device: str, tmp_path: Path) -> None:
    """Keys and values of a first layer depend on token and position alone, so that nothing is lost."""
    path = written(with_one_layer(MODELS[name]()), tmp_path / "tiny.gguf")
    answers = []
    for shifted in (True, False):
        model = Model(path, device=device, context=CONTEXT, kv_format="f32", threads=1)
        model.forward(IDS if shifted else IDS[:START] + IDS[STOP:], 0)
        if shifted:
            model.shift(START, STOP)
        answers.append(model.forward([*IDS[:9], 3], len(model.cached), all_logits=True))
        model.close()
    assert distance(*answers) <= 1e-4


def test_a_long_cache_moves_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(MODELS["llama"](), tmp_path / "tiny.gguf")
    moved = []
    for piece in (3, 1000):
        monkeypatch.setattr(shifting, "PIECE", piece)
        model = Model(path, context=CONTEXT)
        model.forward(IDS, 0)
        model.shift(2, 4)
        model.shift(6, 7)
        moved.append(cached_rows(model))
        model.close()
    for (keys, kept), (others, other_kept) in zip(*moved, strict=True):
        assert np.array_equal(keys, others)
        assert np.array_equal(kept, other_kept)  # type: ignore[arg-type]


def test_what_stands_after_a_shift_is_told_from_what_was_read(tmp_path: Path) -> None:
    model = Model(written(MODELS["llama"](), tmp_path / "tiny.gguf"), context=CONTEXT)
    model.forward(IDS[:20], 0)
    assert model.unshifted == 20
    model.shift(8, 10)
    model.forward(IDS[:4], 18)
    assert (len(model.cached), model.unshifted) == (22, 8)
    model.shift(4, 6)
    assert model.unshifted == 4
    model.forward(IDS[:2], 10)  # behind the shift: what stands before is as it was
    assert (len(model.cached), model.unshifted) == (12, 4)
    model.forward(IDS[:9], 3)
    assert (len(model.cached), model.unshifted) == (12, 12)
    model.close()


def test_an_interrupted_shift_leaves_what_stands_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(written(MODELS["llama"](), tmp_path / "tiny.gguf"), context=CONTEXT, kv_format="f32")
    right = model.forward(IDS, 0, all_logits=True).copy()
    real = shifting.Turn.back

    def interrupted(*how: Any) -> Any:
        monkeypatch.setattr(shifting.Turn, "back", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(shifting.Turn, "back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.shift(START, STOP)
    assert model.cached == IDS[:START]
    again = model.forward(IDS[START:], START, all_logits=True)
    assert np.array_equal(again, right[START:])
    assert model.unshifted == len(IDS)
    model.close()


def test_ctrl_c_ends_a_shift_when_none_of_its_threads_moves_anything_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(written(MODELS["llama"](), tmp_path / "tiny.gguf"), context=CONTEXT, threads=2)
    model.forward(IDS, 0)
    real, inside = shifting.Turn.back, []

    def slow(*how: Any) -> Any:
        inside.append(1)
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.3)
        inside.pop()
        return real(*how)

    monkeypatch.setattr(shifting.Turn, "back", slow)
    with pytest.raises(KeyboardInterrupt):
        model.shift(START, STOP)
    assert inside == []
    assert model.cached == IDS[:START]
    model.close()


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("gpt2", "learned positions"), ("qwen3next", "recurrent states"), ("qwen35", "recurrent states")],
)
def test_what_cannot_be_turned_is_refused_with_what_is_possible(architecture: str, why: str, tmp_path: Path) -> None:
    model = Model(written(MODELS[BY_ARCHITECTURE[architecture][0]](), tmp_path / "tiny.gguf"), context=CONTEXT)
    model.forward(IDS, 0)
    assert why in model.shift_obstacle
    with pytest.raises(SettingError, match=f"cannot be shifted: .*{why}.*'drop'"):
        model.shift(START, STOP)
    assert model.cached == IDS
    model.close()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 3), (20, 29), (0, 29)])
def test_a_range_that_is_not_cached_is_refused(start: int, stop: int, tmp_path: Path) -> None:
    model = Model(written(MODELS["llama"](), tmp_path / "tiny.gguf"), context=CONTEXT)
    model.forward(IDS, 0)
    with pytest.raises(SettingError, match=f"tokens {start} to {stop} cannot be taken out of 28 cached ones"):
        model.shift(start, stop)
    assert (model.cached, model.unshifted) == (IDS, 28)
    model.close()


def obstacle_of(finish: Any) -> str:
    """Of a Program whose keys `finish` makes of heads (T, 2, 8) that rope has turned by 3 pairs."""
    table = RopeTable(np.ones(3, np.float32), "halves")

    def forward(ops: Ops) -> Tensor:
        heads = ops.embed(exactly(np.ones((4, 16))), ops.input).heads(2)
        layer: CacheLayer = ops.cache.append(finish(ops, ops.rope(heads, table)), heads)
        return ops.attention(heads.columns(0, layer.key_width), layer, scale=1.0).flat()

    return shifting.obstacle(trace(forward, 1), F32)


def test_only_what_commutes_with_rope_may_follow_it() -> None:
    table, ones = RopeTable(np.ones(1, np.float32), "pairs"), exactly(np.ones(8))
    assert obstacle_of(lambda ops, k: k) == ""
    assert obstacle_of(lambda ops, k: ops.rms_norm(k, ones, 1e-5)) == ""
    assert obstacle_of(lambda ops, k: k.columns(0, 6)) == ""
    assert obstacle_of(lambda ops, k: k.columns(0, 7)) == ""
    assert obstacle_of(lambda ops, k: k.columns(6, 8)) == ""
    assert "a part of what rope turns" in obstacle_of(lambda ops, k: k.columns(1, 8))
    assert "a part of what rope turns" in obstacle_of(lambda ops, k: k.columns(0, 5))
    assert "layer_norm follows rope" in obstacle_of(lambda ops, k: ops.layer_norm(k, ones, None, 1e-5))
    assert "rope follows rope" in obstacle_of(lambda ops, k: ops.rope(k, table))
    assert "weights of zero" in obstacle_of(lambda ops, k: ops.rms_norm(k, exactly(np.eye(8)[0]), 1e-5))


def test_a_norm_with_weights_behind_rope_is_undone_around_the_turn() -> None:
    program = MODELS["hunyuan"]().network().program(1)
    (layer, (turn,)), *_ = shifting.turns(program, F16)
    assert layer.key_width == turn.factors.size
    assert any(np.array_equal(values(op.weights[0]), turn.factors) for op in program.ops if op.name == "rms_norm")
    assert turn.stretch > shifting.STRETCH
    assert "Q8_0 has rounded cannot be turned by a norm's weights" in shifting.obstacle(program, FORMATS["Q8_0"])
