"""How weights are asked to be loaded: the same words from the command line and from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import qwen3moe

import localmoe
from localmoe.errors import SettingError
from localmoe.experts.loading import Loading, read_loading


def test_sizes_are_words_or_bytes() -> None:
    assert read_loading("slots", memory="8GiB", expert_cache=1 << 30) == Loading("slots", 8 << 30, 1 << 30)
    assert read_loading() == Loading()


def test_a_loading_is_taken_as_it_is_and_alone() -> None:
    asked = Loading("mmap", memory=1 << 30)
    assert read_loading(asked) is asked
    for more in ({"memory": "1GiB"}, {"trace": "t"}, {"lookahead": True}):
        with pytest.raises(SettingError, match=r"--\w+ is part of the Loading that was given"):
            read_loading(asked, **more)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"lazy": "eager"}, "loading mode 'eager' is not known; these are: auto, mmap, slots, off"),
        ({"memory": -1}, "--memory: a size is .* not '-1'"),
        ({"memory": True}, "--memory: a size is .* not 'True'"),
        ({"expert_policy": ""}, "expert policy '' is not known"),
        ({"lazy": "mmap", "expert_cache": "1GiB"}, "--expert-cache is for --lazy slots or auto, not for --lazy mmap"),
    ],
)
def test_what_cannot_be_is_refused(how: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        read_loading(**how)


def test_a_trace_is_for_every_mode_and_what_a_mode_has_no_use_for_waits() -> None:
    assert read_loading("off", trace="t") == Loading("off", trace=Path("t"))
    assert Loading("off", expert_cache=5).expert_cache == 5


def test_python_takes_the_same_words_or_a_loading(tmp_path: Path) -> None:
    file = qwen3moe(tmp_path / "tiny.gguf")
    for how in ({"memory": "4GiB", "expert_policy": "lru"}, {"lazy": Loading("auto", 4 << 30, policy="lru")}):
        model = localmoe.load(file, **how)
        assert model.loading == Loading("auto", 4 << 30, policy="lru")
        model.close()
    with pytest.raises(SettingError, match="--expert-cache 4GiB must be smaller than --memory 4GiB"):
        localmoe.load(file, memory="4GiB", expert_cache="4GiB")
