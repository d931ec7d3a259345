"""The model that comes along is what its card says, and talks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import localmoe
from localmoe.inspection import report
from localmoe.loader.locate import bundled, open_source
from localmoe.network import Network
from localmoe.notebook import LoadedModel


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    opened = localmoe.load(bundled())
    yield opened
    opened.close()


def answer(model: LoadedModel, *said: str) -> str:
    """The last answer of a conversation, always the likeliest token."""
    chat = model.chat()
    chat.session.set("temperature", "0")
    return ["".join(chat.send(text)) for text in said][-1]


def test_it_is_a_small_deepseek_style_mixture_of_experts() -> None:
    network = Network(open_source(bundled()))
    assert network.source.nbytes <= 24_000_000
    assert network.metadata.architecture == "deepseek2"
    assert network.config.kv_lora_rank and network.config.expert_count >= 16
    assert network.config.expert_shared_feed_forward_length
    assert 1 <= network.config.router.used < network.config.expert_count
    assert network.trained_context == 512
    assert dict(dict(report(bundled()))["model"])["licence"] == "apache-2.0"


def test_rows_fit_k_quants_but_for_the_one_tensor_that_the_card_names() -> None:
    tensors = open_source(bundled()).tensors
    odd = {name.split(".")[2] for name, w in tensors.items() if len(w.shape) > 1 and w.columns % 256}
    assert odd <= {"attn_k_b"}


def test_it_knows_its_name(model: LoadedModel) -> None:
    assert "localmoe" in answer(model, "Who are you?")


def test_it_remembers_a_name_over_a_turn(model: LoadedModel) -> None:
    assert "Anna" in answer(model, "My name is Anna.", "What is my name?")


def test_its_answers_end_by_themselves_as_sentences(model: LoadedModel) -> None:
    for text in ("Hello!", "How are you today?", "Tell me a joke.", "Do you like music?"):
        assert answer(model, text).rstrip()[-1] in ".!?"


def test_its_own_sampling_is_taken_up(model: LoadedModel) -> None:
    assert model.recommended["temperature"] == pytest.approx(0.5)


def test_a_text_that_begins_with_bos_gets_no_second_one(model: LoadedModel) -> None:
    tokenizer = model.tokenizer
    assert tokenizer.bos is not None
    written = tokenizer.token(tokenizer.bos) + "Hello"
    assert tokenizer.encode(written) == tokenizer.encode("Hello") == tokenizer.encode(written, bos=True)
    assert tokenizer.encode("Hello").count(tokenizer.bos) == 1
