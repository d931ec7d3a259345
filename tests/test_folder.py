"""A Hugging Face folder, whole: weights, config, tokenizer.json and chat template become a model that chats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import localmoe
from localmoe.errors import TokenizerError

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


@pytest.fixture
def folder(conformance: Path, tmp_path: Path) -> Path:
    """The golden llama weights with a byte-level vocabulary of their 320 ids."""
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copyfile(conformance / "logits" / "llama" / file, tmp_path / file)
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_folder_opens_and_chats_with_its_own_template(folder: Path) -> None:
    model = localmoe.load(folder)
    chat = model.chat()
    chat.session.set("max_tokens", "12")
    chat.session.set("temperature", "0")
    first = "".join(chat.send("Hi"))
    prompt = [1, 3, *model.tokenizer.encode("Hi", bos=False), 4]
    assert model.cached[: len(prompt)] == prompt
    assert chat.session.messages[-1] == {"role": "assistant", "content": first}
    again = "".join(chat.send("Hi again"))
    assert chat.session.engine.stats.reused_tokens > len(prompt)
    assert again and 2 in model.tokenizer.stop
    model.close()


def test_a_folder_gives_the_same_text_on_both_devices(folder: Path) -> None:
    def text(device: str) -> str:
        model = localmoe.load(folder, device=device, kv_format="f32")
        chat = model.chat()
        chat.session.set("max_tokens", "20")
        chat.session.set("temperature", "0")
        said = "".join(chat.send("Tell me"))
        model.close()
        return said

    assert text("cpu") == text("reference")


def test_a_folder_without_a_tokenizer_says_so_when_text_is_wanted(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    model = localmoe.load(folder)
    assert model.logits([1, 2, 3]).shape == (3, 320)
    with pytest.raises(TokenizerError, match=str(folder)):
        model.tokenizer.encode("Hi")
    model.close()
