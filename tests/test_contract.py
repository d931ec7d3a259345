"""What every family promises, each row of the table picked up by itself: a tiny model under its architecture's name.

Whole = chunked = token by token, taking back, refusals, loading modes, threads, and a chat with its real template.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from families import logits, relative_error
from registry import BY_ARCHITECTURE, MODELS, chatting, written
from rich.console import Console
from test_template import real_source
from tiny import Tiny

from localmoe.arch.table import FAMILIES
from localmoe.errors import UnsupportedError
from localmoe.evaluation.own_pass import own_pass
from localmoe.experts.loading import Loading
from localmoe.inspection import program_table, report
from localmoe.model import Model
from localmoe.network import Network
from localmoe.repl.input import LineReader
from localmoe.repl.loop import converse
from localmoe.repl.render import Screen
from localmoe.repl.talk import Talk
from localmoe.session import Session

IDS = np.random.default_rng(11).integers(0, 250, 40).tolist()
CLOSE = 1e-5  # decoding and reading a prompt are different kernels
CARRIED = 5e-5  # where a state carries rounding on, and narrow heads nearly cancel before they are normed

# architecture -> its real template among the conformance data: a file, or a name in llama.cpp's or ollama's list.
FILES = "templates/llama.cpp/"
TEMPLATES = {
    "llama": f"{FILES}meta-llama-Llama-3.1-8B-Instruct.jinja",
    "qwen2": f"{FILES}Qwen-Qwen2.5-7B-Instruct.jinja",
    "qwen3": f"{FILES}Qwen-Qwen3-0.6B.jinja",
    "qwen3moe": f"{FILES}Qwen3-Coder.jinja",
    "deepseek2": f"{FILES}deepseek-ai-DeepSeek-V3.1.jinja",
    "glm4": "ChatGLM4",
    "glm4moe": f"{FILES}GLM-4.6.jinja",
    "granite": f"{FILES}ibm-granite-granite-3.3-2B-Instruct.jinja",
    "granitemoe": "ibm-granite/granite-3.0-8b-instruct",
    "gemma2": f"{FILES}google-gemma-2-2b-it.jinja",
    "gemma4": f"{FILES}google-gemma-4-31B-it-interleaved.jinja",
    "phi3": "Phi-3-vision",
    "command-r": f"{FILES}CohereForAI-c4ai-command-r-plus-tool_use.jinja",
    "cohere2": f"{FILES}CohereForAI-c4ai-command-r7b-12-2024-tool_use.jinja",
    "starcoder2": "starcoder2-instruct",
}


@pytest.fixture(params=MODELS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return chatting(MODELS[request.param]())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_row_of_the_table_has_a_tiny_model(architecture: str) -> None:
    assert architecture in BY_ARCHITECTURE, f"no MODELS of a file tests/tiny*.py makes one of {architecture!r}"


def test_every_tiny_model_and_every_template_is_of_a_row_of_the_table() -> None:
    assert BY_ARCHITECTURE.keys() <= FAMILIES.keys()
    assert TEMPLATES.keys() <= FAMILIES.keys()


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_a_text_at_once_in_chunks_and_token_by_token_gives_the_same(tiny: Tiny, device: str) -> None:
    network = tiny.network()
    whole = logits(network, IDS, device)
    for chunk in (7, 1):
        assert relative_error(logits(network, IDS, device, chunk), whole) <= closeness(network)
    if device == "cpu":
        assert np.array_equal(logits(network, IDS, device, 7), logits(network, IDS, device, 16))


def test_taken_back_and_gone_on_is_as_if_it_had_never_been(tiny: Tiny, tmp_path: Path) -> None:
    model = Model(written(tiny, tmp_path / "tiny.gguf"), context=64)
    fresh = model.forward(IDS, 0).copy()
    after = model.forward(IDS[:1], len(IDS)).copy()
    model.forward([*IDS[:20], *IDS[:15]], 0)
    again = model.forward(IDS[20:], 20)
    assert np.array_equal(again, fresh)
    assert np.array_equal(model.forward(IDS[:1], len(IDS)), after)
    model.close()


def test_the_loading_mode_and_the_number_of_threads_leave_every_bit(tiny: Tiny, tmp_path: Path) -> None:
    path = written(tiny, tmp_path / "tiny.gguf")
    found = {}
    for lazy, threads in [("auto", 2), ("mmap", 2), ("off", 2), ("auto", 1), ("auto", 3)]:
        model = Model(path, loading=Loading(lazy), threads=threads, context=64)
        found[lazy, threads] = [model.forward(IDS, 0, all_logits=True), model.forward(IDS[:1], len(IDS))]
        model.close()
    right = found["auto", 2]
    for how, answer in found.items():
        assert all(map(np.array_equal, answer, right)), how


def test_inspect_and_verify_see_every_layer_and_who_was_chosen(tiny: Tiny, tmp_path: Path) -> None:
    path = written(tiny, tmp_path / "tiny.gguf")
    model = Model(path, device="reference", context=64)
    found, ops = own_pass(model, np.asarray(IDS, np.int32)), model.network.program(1).ops
    model.close()
    names = {weight.name.split(".")[1] for op in ops for weight in op.weights if weight.name.startswith("blk.")}
    facts = {what: value for _, rows in report(path) for what, value in rows}
    assert facts["blocks"] == str(len(names)) == str(len(found.layers))
    assert len(program_table(path)[1]) == len(ops)
    routers = [op.attributes["router"] for op in ops if op.name == "route"]
    for router, number in zip(routers, sorted(found.experts), strict=True):
        if router.groups == 1:
            best = np.argsort(-found.standing[number], axis=1)[:, : router.used]
            assert np.array_equal(np.sort(best), np.sort(found.experts[number]))


@pytest.mark.parametrize("value", [7, "spiral"])
def test_a_key_that_nobody_knows_is_refused_by_name_and_value(tiny: Tiny, value: object) -> None:
    with pytest.raises(UnsupportedError) as refused:
        tiny.with_keys(unheard_of=value).network()
    assert f"{tiny.architecture}.unheard_of" in str(refused.value)
    assert str(value) in str(refused.value)


def test_a_rope_scaling_that_is_not_implemented_is_refused_by_name_and_value(tiny: Tiny) -> None:
    with pytest.raises(UnsupportedError, match=r"rope\.scaling\.type.*spiral"):
        tiny.with_keys(rope__scaling__type="spiral").network()


def test_a_tensor_that_nobody_asks_for_is_refused_by_name(tiny: Tiny) -> None:
    extra = {**tiny.tensors, "blk.0.unheard_of.weight": np.ones((4, 4), np.float32)}
    with pytest.raises(UnsupportedError, match=r"blk\.0\.unheard_of\.weight"):
        tiny.with_tensors(extra).network()


def test_weights_in_bf16_are_read_as_what_they_stand_for(tiny: Tiny) -> None:
    """Matrices alone: norms, biases and routers of real files are float32."""
    rounded = {
        name: (array.view(np.uint32) & 0xFFFF0000).view(np.float32) if array.ndim > 1 else array
        for name, array in ((n, np.ascontiguousarray(a, np.float32)) for n, a in tiny.tensors.items())
    }
    small = tiny.with_tensors(rounded)
    stored = small.source(lambda name: "BF16" if rounded[name].ndim > 1 else "F32")
    network = small.network()
    assert relative_error(logits(Network(stored), IDS, "cpu"), logits(network, IDS, "reference")) <= closeness(network)


def closeness(network: Network) -> float:
    return CARRIED if network.program(1).states else CLOSE


def conversation(model: Model) -> str:
    """Two turns through the chat's own loop -> what the model saw in the end, as text."""
    console = Console(file=io.StringIO(), width=80, highlight=False)
    session = Session(model, settings={"temperature": 0, "max_tokens": 6})
    converse(Talk(session, Screen(console, console)), LineReader(io.StringIO("hello\nand then?\n/exit\n")))
    shown = console.file.getvalue()
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2, shown
    seen = model.tokenizer.decode(model.cached, special=True)
    assert model.template
    assert seen.startswith(model.template.render(session.messages[:-1])), shown
    return seen


def test_it_chats(tiny: Tiny, tmp_path: Path) -> None:
    model = Model(written(tiny, tmp_path / "tiny.gguf"), context=256)
    assert conversation(model).startswith("<|user|>hello<|end|><|assistant|>")
    model.close()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_it_chats_with_its_real_template(architecture: str, conformance: Path, tmp_path: Path) -> None:
    if architecture not in TEMPLATES:
        pytest.skip(f"no template of {architecture} among the conformance data")
    source = real_source(conformance, TEMPLATES[architecture])
    model = Model(written(MODELS[BY_ARCHITECTURE[architecture][0]](), tmp_path / "tiny.gguf", source), threads=2)
    seen = conversation(model)
    assert seen.index("hello") < seen.index("and then?")
    model.close()
