"""Claims about what ends an answer: the token that a template writes behind one, or its text where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vocabularies import byte_tokenizer, fitting_tokenizer

from localmoe.endings import Endings, endings, stop_texts, stop_tokens
from localmoe.named_templates import NAMED
from localmoe.template import Template
from localmoe.template_fit import fitted, fitting, single_token
from localmoe.tokenizer import Tokenizer
from localmoe.turns import turns_of

# What ends an answer under each named template; <EOS> is the file's own end.
ENDS = {
    "alpaca": "<EOS>", "chatml": "<|im_end|>", "command-r": "<|END_OF_TURN_TOKEN|>", "deepseek": "<EOS>",
    "deepseek-r1": "<EOS>", "deepseek-v2": "<EOS>", "gemma": "<end_of_turn>", "glm4": "<|user|>",
    "granite": "<|end_of_text|>", "llama2": "<EOS>", "llama3": "<|eot_id|>", "llama4": "<|eot|>",
    "mistral-v1": "<EOS>", "mistral-v3": "<EOS>", "mistral-v3-tekken": "<EOS>", "mistral-v7": "<EOS>",
    "mistral-v7-tekken": "<EOS>", "phi3": "<|end|>", "phi4": "<|im_end|>", "phi4-mini": "<|end|>", "vicuna": "<EOS>",
    "zephyr": "<EOS>", "gpt-oss": "<|end|>",
}  # fmt: skip


def named(name: str, eos: str = "<EOS>") -> Template:
    return Template(NAMED[name], name=name, bos="<BOS>", eos=eos)


def test_every_named_template_is_spoken_of() -> None:
    assert sorted(ENDS) == sorted(NAMED)


@pytest.mark.parametrize("name", sorted(ENDS))
def test_a_vocabulary_that_has_the_token_stops_at_it(name: str) -> None:
    tokenizer = fitting_tokenizer(NAMED[name], "<|user|><|end|><|im_end|>" + ENDS[name])
    found = endings(tokenizer, named(name))
    assert {tokenizer.token(id) for id in found.tokens - tokenizer.stop} <= {ENDS[name]}
    assert single_token(tokenizer, ENDS[name]) in found.tokens
    assert found.texts == ()


def test_a_vocabulary_without_the_token_stops_at_its_text() -> None:
    tokenizer = byte_tokenizer(["<EOS>"], eos="<EOS>")
    assert endings(tokenizer, named("chatml")) == Endings(tokenizer.stop, ("<|im_end|>", "<|im_start|>user"))
    assert stop_texts(tokenizer, named("gemma")) == ("<end_of_turn>", "<start_of_turn>user")
    assert stop_texts(tokenizer, named("glm4")) == ("<|user|>",)
    assert stop_texts(tokenizer, named("vicuna", eos="")) == ("\nUSER:",)
    assert stop_texts(tokenizer, named("alpaca", eos="")) == ("\n\n### Instruction:",)
    assert stop_tokens(tokenizer, named("chatml")) == tokenizer.stop


def test_a_token_that_is_not_marked_as_control_is_an_end_too() -> None:
    tokenizer = byte_tokenizer(["<EOS>"], normal=["<|im_end|>"], eos="<EOS>")
    assert [tokenizer.token(id) for id in stop_tokens(tokenizer, named("chatml")) - tokenizer.stop] == ["<|im_end|>"]


def test_gpt_oss_goes_on_after_the_end_of_a_message() -> None:
    markers = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"]
    tokenizer = byte_tokenizer(markers, eos="<|return|>")
    found = endings(tokenizer, named("gpt-oss"))
    assert {tokenizer.token(id) for id in found.tokens} == {"<|return|>", "<|call|>"}
    assert found.texts == ()


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[-1].content }}",
        "",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_tells_nothing_adds_nothing(source: str) -> None:
    tokenizer = byte_tokenizer(["<EOS>"], eos="<EOS>")
    assert endings(tokenizer, Template(source, name="t")) == Endings(tokenizer.stop)


def test_the_parts_of_a_conversation() -> None:
    found = turns_of(named("chatml"))
    assert (found.before, found.between) == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    assert (found.marker, found.head) == ("<|im_end|>", "<|im_start|>user")
    assert found.end == "<|im_end|>\n<|im_start|>assistant\n"


# which template a vocabulary was made for


@pytest.mark.parametrize("name", "chatml command-r deepseek gemma granite llama3 llama4 phi3 phi4 glm4 gpt-oss".split())
def test_the_tokens_tell_the_family(name: str) -> None:
    more = {"gpt-oss": "<|return|>", "command-r": "<|CHATBOT_TOKEN|>", "phi3": "<|user|>"}.get(name, "")
    assert name in fitting(fitting_tokenizer(NAMED[name], more))


def test_bytes_alone_tell_nothing() -> None:
    assert fitting(byte_tokenizer(["<EOS>", "<|im_start|>"])) == ()
    assert fitting(byte_tokenizer(["<|im_start|>"], normal=["<|im_end|>"])) == ("chatml",)


def test_an_alias_means_the_form_for_the_vocabulary() -> None:
    plain = byte_tokenizer(["<s>", "</s>"])
    assert [fitted(name, plain) for name in ("mistral", "phi", "deepseek", "qwen", "llama2")] == [
        "mistral-v1", "phi3", "deepseek-v2", "chatml", "llama2"
    ]  # fmt: skip
    assert fitted("mistral", byte_tokenizer(["[INST]", "[/INST]"])) == "mistral-v3-tekken"
    assert fitted("mistral", byte_tokenizer(["[INST]", "[/INST]", "[SYSTEM_PROMPT]"])) == "mistral-v7-tekken"
    assert fitted("phi", byte_tokenizer(["<|im_start|>", "<|im_sep|>", "<|im_end|>"])) == "phi4"
    assert fitted("deepseek", byte_tokenizer(["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"])) == "deepseek"


@pytest.mark.parametrize("version", [1, 3])
def test_mistrals_form_for_the_vocabulary_gives_the_published_ids(
    conformance: Path, tmp_path: Path, version: int
) -> None:
    folder = conformance / "tokenizers" / "mistral"
    model = "tokenizer.model.v1" if version == 1 else "mistral_instruct_tokenizer_240323.model.v3"
    (tmp_path / "tokenizer.model").write_bytes((folder / model).read_bytes())
    tokenizer = Tokenizer.from_folder(tmp_path)
    name = fitted("mistral", tokenizer)
    template = Template(NAMED[name], name=name, bos="<s>", eos="</s>")
    sample = folder / "samples" / "no_tools"
    messages = json.loads((sample / "sample.json").read_text())["messages"]
    ids = json.loads((sample / f"tokens_v{version}.json").read_text())["tokens"]
    assert tokenizer.encode_prompt(template.render(messages)) == ids
