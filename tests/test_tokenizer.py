"""Claims about vocabularies: ids as in llama.cpp and Hugging Face, text that comes back, refusals that name things."""

from __future__ import annotations

import base64
import gzip
import heapq
import json
import random
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.errors import FileFormatError, TokenizerError, UnsupportedError
from localmoe.loader.gguf import open_gguf
from localmoe.pretokenizers import PRETOKENIZERS
from localmoe.tokenizer import Tokenizer
from localmoe.vocabulary import Kind, merges_from_scores, read_sentencepiece

SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
ALPHABET = {b: chr(b) for b in SHOWN} | {b: chr(0x100 + n) for n, b in enumerate(HIDDEN)}


def in_alphabet(data: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in data)


def gguf_folder(conformance: Path) -> Path:
    return conformance / "tokenizers" / "ggml-vocab"


def from_gguf_file(conformance: Path, name: str) -> Tokenizer:
    return Tokenizer.from_gguf(open_gguf(gguf_folder(conformance) / f"ggml-vocab-{name}.gguf").metadata)


def golden_blocks(conformance: Path, name: str) -> list[tuple[str, list[int]]]:
    stem = gguf_folder(conformance) / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    rows = [[int(id) for id in line.split()] for line in Path(f"{stem}.out").read_text().split("\n")]
    while rows and not rows[-1]:
        rows.pop()
    assert texts[len(rows) :] in ([], [""])
    assert len(rows) == 46
    return list(zip(texts, rows, strict=False))


def wrong(tokenizer: Tokenizer, blocks: list[tuple[str, list[int]]]) -> list[str]:
    return [text for text, ids in blocks if tokenizer.encode(text, special=False, bos=False) != ids]


# golden data


@pytest.mark.parametrize("name", ["deepseek-llm", "gpt-2", "llama-spm", "refact"])
def test_a_gguf_vocabulary_gives_the_golden_ids(conformance: Path, name: str) -> None:
    assert wrong(from_gguf_file(conformance, name), golden_blocks(conformance, name)) == []


@pytest.mark.parametrize("name", ["baichuan", "deepseek-llm", "gpt-2", "gpt-neox", "llama-spm", "refact"])
def test_long_texts_are_cut_as_llama_cpp_cuts_them_and_come_back(conformance: Path, name: str) -> None:
    golden = json.loads((conformance / "tokenizers" / "golden_libllama.json").read_text())
    tokenizer = from_gguf_file(conformance, name)
    for text, ids in zip(golden["texts"], golden["ids"][name], strict=True):
        assert tokenizer.encode(text, special=False, bos=False) == ids
        assert tokenizer.decode(ids) == text


def test_a_wordpiece_vocabulary_is_refused_by_name(conformance: Path) -> None:
    with pytest.raises(UnsupportedError, match=r'"bert" \(WordPiece, for encoders\).*"gpt2", "llama"'):
        from_gguf_file(conformance, "bert-bge")


@pytest.mark.parametrize("golden", ["qwen2", "deepseek-r1-qwen"])
def test_qwen2_from_vocab_and_merges_gives_the_golden_ids(conformance: Path, golden: str) -> None:
    tokenizer = Tokenizer.from_folder(conformance / "tokenizers" / "qwen2")
    assert wrong(tokenizer, golden_blocks(conformance, golden)) == []
    assert {tokenizer.token(id) for id in tokenizer.stop} == {"<|im_end|>", "<|endoftext|>"}
    assert not tokenizer.add_bos
    assert tokenizer.bos is None


def test_gpt2_from_vocab_and_merges_gives_the_golden_ids(conformance: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((conformance / "tokenizers" / "gpt2" / f"gpt2_{name}").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    assert wrong(Tokenizer.from_folder(tmp_path), golden_blocks(conformance, "gpt-2")) == []


def test_llama2_from_a_sentencepiece_model_gives_the_golden_ids(conformance: Path) -> None:
    tokenizer = Tokenizer.from_folder(conformance / "tokenizers" / "llama2-spm")
    assert wrong(tokenizer, golden_blocks(conformance, "llama-spm")) == []
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (1, 2, True)


def test_llama3_from_the_published_ranks_gives_the_golden_ids(conformance: Path) -> None:
    lines = (conformance / "tokenizers" / "llama3" / "tokenizer.model").read_bytes().splitlines()
    pieces = [in_alphabet(base64.b64decode(line.split()[0])) for line in lines]
    merges = merges_from_scores(pieces, [-rank for rank in range(len(pieces))], [Kind.NORMAL] * len(pieces))
    control = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    metadata = byte_level_metadata(pieces + control, [" ".join(pair) for pair in merges], "llama-bpe", control=3)
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.bos_token_id": 128000})
    assert wrong(tokenizer, golden_blocks(conformance, "llama-bpe")) == []
    assert tokenizer.encode("a<|eot_id|>") == [128000, 64, 128002]


def test_deepseek_r1_from_tokenizer_json_gives_the_ids_of_transformers(conformance: Path, tmp_path: Path) -> None:
    source = conformance / "tokenizers" / "deepseek-r1"
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    (tmp_path / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    tokenizer = Tokenizer.from_folder(tmp_path)
    cases = json.loads((source / "golden_hf.json").read_text())["cases"]
    assert len(cases) == 50
    assert [case["text"] for case in cases if tokenizer.encode(case["text"], bos=False) != case["ids"]] == []
    assert [case["text"] for case in cases if tokenizer.decode(case["ids"], special=True) != case["text"]] == []
    assert (tokenizer.bos, tokenizer.stop, tokenizer.add_bos) == (0, frozenset({1}), True)


def test_the_deepseek_v3_pre_tokenizer_gives_the_ids_of_transformers(conformance: Path) -> None:
    """The same vocabulary as a GGUF file would hold it: the pattern then comes from our table."""
    source = conformance / "tokenizers" / "deepseek-r1"
    saved = json.loads(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    ids = saved["model"]["vocab"] | {token["content"]: token["id"] for token in saved["added_tokens"]}
    pieces = sorted(ids, key=ids.__getitem__)
    assert [ids[piece] for piece in pieces] == list(range(len(pieces)))
    kinds = np.full(len(pieces), Kind.NORMAL, np.int32)
    for token in saved["added_tokens"]:
        kinds[token["id"]] = Kind.CONTROL if token["special"] else Kind.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    metadata = byte_level_metadata(pieces, merges, "deepseek-v3") | {"tokenizer.ggml.token_type": kinds}
    tokenizer = Tokenizer.from_gguf(metadata)
    cases = json.loads((source / "golden_hf.json").read_text())["cases"]
    assert [case["text"] for case in cases if tokenizer.encode(case["text"], bos=False) != case["ids"]] == []


@pytest.mark.parametrize("version", [1, 2, 3])
def test_mistral_conversations_give_the_published_ids(conformance: Path, tmp_path: Path, version: int) -> None:
    """The samples show the pieces: U+2581 for spaces, and one in front of what follows a control token."""
    folder = conformance / "tokenizers" / "mistral"
    model = "tokenizer.model.v1" if version == 1 else "mistral_instruct_tokenizer_240323.model.v3"
    (tmp_path / "tokenizer.model").write_bytes((folder / model).read_bytes())
    tokenizer = Tokenizer.from_folder(tmp_path)
    control = "|".join(re.escape(tokenizer.token(id)) for id in range(1000) if tokenizer.is_special(id))
    samples = sorted(folder.glob(f"samples/*/text_v{version}.txt"))
    assert len(samples) == (1 if version == 1 else 6)
    for sample in samples:
        pieces = sample.read_text().replace(" ", "\u2581")
        text = re.sub("(?:<0x..>)+", lambda run: bytes.fromhex(re.sub("<0x|>", "", run[0])).decode(), pieces)
        text = re.sub(f"({control})\u2581", r"\1", text).replace("\u2581", " ")
        ids = json.loads((sample.parent / f"tokens_v{version}.json").read_text())["tokens"]
        assert tokenizer.encode_prompt(text) == ids, sample.parent.name


@pytest.mark.parametrize("name", ["baichuan", "llama-spm"])
def test_merging_by_list_equals_sentencepieces_rule_on_random_text(conformance: Path, name: str) -> None:
    metadata = open_gguf(gguf_folder(conformance) / f"ggml-vocab-{name}.gguf").metadata
    tokenizer = Tokenizer.from_gguf(metadata)
    columns = [metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")]
    scores = {piece: float(score) for piece, score, kind in zip(*columns, strict=True) if kind == Kind.NORMAL}
    ids = {piece: id for id, piece in enumerate(columns[0])}
    chance, pieces = random.Random(7), list(scores)
    texts = [" " * n + "x" for n in range(1, 70)] + ["=" * n for n in range(1, 70)]
    texts += ["".join(chance.choices(" ab-=*0o/\\.eE", k=30)) for _ in range(150)]
    texts += ["".join(chance.choices(pieces, k=8)).replace("\u2581", " ") for _ in range(150)]
    for text in texts:
        expected: list[int] = []
        for piece in merge_by_score("\u2581" + text.replace(" ", "\u2581"), scores):
            expected += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
        assert tokenizer.encode(text, special=False, bos=False) == expected, text


def merge_by_score(text: str, scores: Mapping[str, float]) -> list[str]:
    """SentencePiece's rule, word for word: best score first, then leftmost."""
    symbols, left, right = list(text), list(range(-1, len(text) - 1)), [*range(1, len(text)), -1]
    queue: list[tuple[float, int, int, str]] = []

    def offer(a: int, b: int) -> None:
        if a >= 0 <= b and (union := symbols[a] + symbols[b]) in scores:
            heapq.heappush(queue, (-scores[union], a, b, union))

    for at in range(len(symbols) - 1):
        offer(at, at + 1)
    while queue:
        _, a, b, union = heapq.heappop(queue)
        if symbols[a] and symbols[b] and symbols[a] + symbols[b] == union:
            symbols[a], symbols[b], right[a] = union, "", right[b]
            if right[b] >= 0:
                left[right[b]] = a
            offer(left[a], a)
            offer(a, right[a])
    return [symbol for symbol in symbols if symbol]


def test_a_vocabulary_of_a_hundred_thousand_tokens_loads_in_well_under_a_second(conformance: Path) -> None:
    metadata = open_gguf(gguf_folder(conformance) / "ggml-vocab-deepseek-llm.gguf").metadata
    start = time.process_time()
    Tokenizer.from_gguf(metadata)
    assert time.process_time() - start < 0.9


# vocabularies small enough to read


def byte_level_metadata(pieces: list[str], merges: list[str], pre: str, *, control: int = 0) -> dict[str, Any]:
    kinds = [Kind.NORMAL] * (len(pieces) - control) + [Kind.CONTROL] * control
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": merges,
    }


BYTES = [in_alphabet(bytes([byte])) for byte in range(256)]
CHAT = ["<s>", "<|im_end|>", "<|end|>"]


def byte_tokenizer(**more: Any) -> Tokenizer:
    """Tokens 0 to 255 are the bytes, 256 is <s>, 257 <|im_end|>, 258 <|end|>."""
    metadata = byte_level_metadata(BYTES + CHAT, [], "gpt-2", control=3)
    metadata |= {"tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 257}
    return Tokenizer.from_gguf(metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()})


READY = byte_tokenizer()


def spm_metadata(**more: Any) -> dict[str, Any]:
    """unk, <s>, </s>, the bytes, a few characters, "ab" before "bc", and <tool> that the user defined."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256]
    for piece in ("\u2581", "a", "b", "c", "ab", "bc", "\u2581ab"):
        pieces.append(piece)
        kinds.append(Kind.NORMAL)
    pieces.append("<tool>")
    kinds.append(Kind.USER_DEFINED)
    scores = np.zeros(len(pieces), np.float32)
    scores[[pieces.index("ab"), pieces.index("bc"), pieces.index("\u2581ab")]] = -1, -2, -3
    metadata = {"model": "llama", "tokens": pieces, "scores": scores, "token_type": np.array(kinds, np.int32)} | more
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def shown(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token(id) for id in ids]


def test_spm_merges_the_best_score_first_and_falls_back_to_bytes() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata())
    assert shown(tokenizer, tokenizer.encode("abc")) == ["<s>", " ab", "c"]
    assert shown(tokenizer, tokenizer.encode("\u00e9", bos=False)) == [" ", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc \u00e9")) == "abc \u00e9"


def test_gemma_4_merges_by_its_list_puts_no_space_before_and_always_begins_with_bos() -> None:
    """Spaces become U+2581, newlines are merged like letters, what is unknown falls back to bytes."""
    pieces = spm_metadata()["tokenizer.ggml.tokens"] + ["\n", "\n\n"]
    kinds = [*spm_metadata()["tokenizer.ggml.token_type"].tolist(), 1, 1]
    merges = ["b c", "a b", "\u2581 ab", "\n \n", "c c"]
    metadata = spm_metadata(model="gemma4", tokens=pieces, token_type=kinds, merges=merges, add_bos_token=False)
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.bos_token_id": 1})
    assert shown(tokenizer, tokenizer.encode("abc ab")) == ["<s>", "a", "bc", " ab"]
    assert shown(tokenizer, tokenizer.encode("a\n\n\n\u00e9", bos=False)) == ["a", "\n\n", "\n", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc  ab\n<tool>\u00e9")) == "abc  ab\n<tool>\u00e9"


def test_glm_takes_a_word_that_is_a_token_unmerged_and_its_first_version_does_not() -> None:
    pieces = [*BYTES, "abc"]
    for name, expected in (("glm4", ["abc"]), ("glm5", ["abc"]), ("chatglm-bpe", ["a", "b", "c"])):
        tokenizer = Tokenizer.from_gguf(byte_level_metadata(pieces, [], name))
        assert shown(tokenizer, tokenizer.encode("abc")) == expected


def test_spm_puts_a_space_after_every_special_token_unless_told_not_to() -> None:
    with_space = Tokenizer.from_gguf(spm_metadata())
    without = Tokenizer.from_gguf(spm_metadata(add_space_prefix=False))
    assert shown(with_space, with_space.encode("ab<tool>ab", bos=False)) == [" ab", "<tool>", " ab"]
    assert shown(without, without.encode("ab<tool>ab", bos=False)) == ["ab", "<tool>", "ab"]


def test_control_tokens_in_plain_text_are_text_but_user_defined_ones_are_always_found() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata())
    assert tokenizer.encode("</s>", bos=False) == [2]
    plain = tokenizer.encode("</s><tool>", special=False, bos=False)
    assert 2 not in plain
    assert shown(tokenizer, plain)[-1] == "<tool>"
    assert tokenizer.encode("</s>", bos=False) == [2]


def test_bos_is_added_as_the_file_says_and_never_twice() -> None:
    for add in (True, False):
        tokenizer = byte_tokenizer(add_bos_token=add)
        assert tokenizer.encode("a") == [256] * add + [97]
        assert tokenizer.encode("a", bos=False) == [97]
        assert tokenizer.encode("a", bos=True) == [256, 97]
        assert tokenizer.encode_prompt("a") == [256] * add + [97]
        assert tokenizer.encode_prompt("<s>a") == [256, 97]
        assert tokenizer.encode_prompt("<s><s>a<s>") == [256, 97, 256]
        assert tokenizer.encode_prompt("") == [256] * add


def test_eos_is_added_to_text_where_the_file_says_so_but_not_to_a_prompt() -> None:
    tokenizer = byte_tokenizer(add_eos_token=True)
    assert tokenizer.encode("a") == [97, 257]
    assert tokenizer.encode_prompt("a") == [97]


def test_stop_tokens_are_those_named_and_the_known_ones_of_control_type() -> None:
    assert byte_tokenizer().stop == {257, 258}
    assert byte_tokenizer(eot_token_id=7, eom_token_id=9).stop == {7, 9, 257, 258}
    typed_normal = byte_tokenizer(token_type=np.array([1] * 256 + [3, 3, 1], np.int32))
    assert typed_normal.stop == {257}


def test_end_of_message_is_no_end_of_turn_where_return_and_call_are() -> None:
    pieces = [*BYTES, "<|end|>", "<|return|>", "<|call|>"]
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pieces, [], "gpt-4o", control=3))
    assert tokenizer.stop == {257, 258}


def test_decode_drops_control_tokens_and_shows_them_when_asked() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([256, 104, 105, 257]) == "hi"
    assert tokenizer.decode([256, 104, 105, 257], special=True) == "<s>hi<|im_end|>"


def test_a_stream_gives_whole_characters_only_and_a_mark_for_one_left_open() -> None:
    stream = byte_tokenizer().stream()
    assert [stream.push(byte) for byte in "\u00e9\U0001f642".encode()] == ["", "\u00e9", "", "", "", "\U0001f642"]
    assert stream.push(0xE2) == ""
    assert stream.finish() == "\ufffd"


def test_a_stream_that_continues_a_text_keeps_its_first_space() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata())
    ids = tokenizer.encode("ab", bos=False)
    assert tokenizer.stream().push(ids[0]) == "ab"
    assert tokenizer.stream(continues=True).push(ids[0]) == " ab"


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    tokenizer = READY
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 300)))
def test_a_stream_together_is_what_decode_gives_for_any_tokens(ids: list[int]) -> None:
    tokenizer = READY
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_merges_without_a_token_are_passed_over() -> None:
    metadata = byte_level_metadata([*BYTES, "ab"], ["a b", "x y", "nonsense"], "gpt-2")
    assert Tokenizer.from_gguf(metadata).encode("abxy") == [256, 120, 121]


def test_llama3_takes_a_word_that_is_a_token_without_merging() -> None:
    pieces = [*BYTES, "ab", "bc", "abc"]
    whole = Tokenizer.from_gguf(byte_level_metadata(pieces, ["b c"], "llama-bpe"))
    merged = Tokenizer.from_gguf(byte_level_metadata(pieces, ["b c"], "qwen2"))
    assert whole.encode("abc") == [258]
    assert merged.encode("abc") == [97, 257]


@pytest.mark.parametrize("pre", sorted(PRETOKENIZERS))
def test_every_pre_tokenizer_compiles_and_loses_no_text(pre: str) -> None:
    text = "Don't say 12345 iPhones \u4f60\u597d,  \u0928\u092e\n\n\t\u00e9t\u00e9 \u2026 x=y+1;  \n"
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(BYTES, [], pre))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["I", "'", "LL", " we", "'ll", " 12345"]),
        ("llama-bpe", ["I", "'LL", " we", "'ll", " ", "123", "45", "\n\n", "x"]),
        ("qwen2", ["I", "'LL", " ", "1", "2", ".\n", "x"]),
        ("qwen35", ["\u0928\u0940", "1", "2"]),
        ("gpt-4o", ["get", "User", "Name's", " ", "123", "4", "/\n"]),
        ("tekken", ["get", "User", "Name", "'s", " ", "1", "2"]),
        ("kimi-k2", ["\u4e2d\u6587", "abc", "Def", "\u4e2d"]),
        ("deepseek-v3", ["123", "45", "\u4e2d\u3072", " x", ".\n"]),
        ("falcon", ["123", "4", " x"]),
        ("starcoder", ["1", "2", " x"]),
        ("tiny_aya", ["1", "234", "567"]),
    ],
)
def test_a_pre_tokenizer_cuts_where_its_model_does(pre: str, words: list[str]) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split

    cut = Sequence([Split(Regex(pattern), "isolated") for pattern in PRETOKENIZERS[pre].patterns])
    assert [word for word, _ in cut.pre_tokenize_str("".join(words))] == words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "rwkv"}, '"rwkv"'),
        ({"model": None}, "no vocabulary"),
        ({"pre": "no-such-words"}, '"no-such-words" is not known; known are .*qwen2'),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", "b", "a"]}, "'a' twice, as token 0 and 2"),
        ({"token_type": np.array([1, 1], np.int32)}, "token_type has 2 entries for 259"),
        ({"merges": None}, "tokenizer.ggml.merges"),
        ({"bos_token_id": "one"}, "bos_token_id is no whole number: 'one'"),
    ],
)
def test_a_broken_or_foreign_vocabulary_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    metadata = byte_level_metadata(BYTES + CHAT, [], "gpt-2", control=3)
    if isinstance(change.get("tokens"), list):
        del metadata["tokenizer.ggml.token_type"]
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises((TokenizerError, UnsupportedError), match=message):
        Tokenizer.from_gguf(metadata)


def test_ids_outside_the_vocabulary_are_ignored_as_flags_and_marked_as_text() -> None:
    tokenizer = byte_tokenizer(bos_token_id=9999, eot_token_id=-5, add_bos_token=True)
    assert (tokenizer.bos, tokenizer.add_bos, tokenizer.stop) == (None, False, frozenset({257, 258}))
    assert tokenizer.decode([104, 5000]) == "h\ufffd"


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(TokenizerError, match="cannot be tokenised"):
        byte_tokenizer().encode("\ud800")


# folders


def saved_tokenizer(folder: Path, prepare: Callable[[Any], None]) -> None:
    from tokenizers import Tokenizer as Engine
    from tokenizers import models, pre_tokenizers
    from tokenizers.decoders import ByteLevel

    engine = Engine(models.BPE(vocab={piece: id for id, piece in enumerate(BYTES)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = ByteLevel()
    engine.add_special_tokens(CHAT)
    prepare(engine)
    engine.save(str(folder / "tokenizer.json"))


def test_tokenizer_json_adds_bos_where_its_post_processor_does(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    def add_bos(engine: Any) -> None:
        engine.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
        engine.enable_truncation(3)
        engine.enable_padding(length=8)

    saved_tokenizer(tmp_path, add_bos)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 65]}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("hello") == [256, *b"hello"]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop) == (256, 257, frozenset({65, 257, 258}))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert Tokenizer.from_folder(tmp_path).encode("hello") == [*b"hello"]


def test_a_folder_without_a_tokenizer_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json, tokenizer\.model, or vocab\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(FileFormatError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"type": "BPE", "vocab": {"a": 0, "b": 4_000_000_000}, "merges": []},
            "token id 4000000000 in a vocabulary of 2",
        ),
        ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "model WordLevel is not supported"),
    ],
)
def test_a_tokenizer_json_that_is_hostile_or_of_another_kind_is_refused(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises((FileFormatError, UnsupportedError), match=message):
        Tokenizer.from_folder(tmp_path)


def test_vocab_and_merges_of_an_unknown_class_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UnsupportedError, match="missing; known: GPT2Tokenizer, Qwen2Tokenizer"):
        Tokenizer.from_folder(tmp_path)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_a_broken_sentencepiece_model_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises((FileFormatError, UnsupportedError)):
        read_sentencepiece(data, "tokenizer.model")
