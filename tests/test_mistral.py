"""Mistral's own folders: params.json, the names of consolidated.safetensors, and tekken.json."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import logits, relative_error
from native_names import interleaved, native, write_native
from test_folder_formats import DEEPSEEK, FLOAT8, LLAMA, plain, shapes, write
from test_tokenizer import golden_blocks

from localmoe.errors import FileFormatError, LocalMoeError, UnsupportedError
from localmoe.loader.huggingface import open_folder
from localmoe.loader.huggingface_config import config_keys
from localmoe.loader.locate import open_source
from localmoe.loader.mistral import hugging_face, renamed
from localmoe.network import Network
from localmoe.pretokenizers import PRETOKENIZERS
from localmoe.tokenizer import Tokenizer

# Mistral Large 3 (facts transcribed by several independent projects); the vision encoder's own keys do not matter.
LARGE: dict[str, Any] = {
    "dim": 7168, "n_layers": 61, "n_heads": 128, "n_kv_heads": 128, "hidden_dim": 16384, "vocab_size": 131072,
    "norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 294912, "max_seq_len": 262144, "head_dim": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "tied_embeddings": False, "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
    "yarn": {
        "original_max_position_embeddings": 8192, "factor": 36, "apply_scale": False, "beta": 32, "alpha": 1,
    },
    "moe": {
        "expert_parallel": 1, "expert_model_parallel": 1, "route_every_n": 1, "first_k_dense_replace": 3,
        "num_experts": 128, "num_experts_per_tok": 4, "num_expert_groups": 1, "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0, "expert_hidden_dim": 4096, "num_shared_experts": 1,
    },
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    "vision_encoder": {"hidden_size": 1664, "num_hidden_layers": 48, "patch_size": 14},
}  # fmt: skip
SEVEN: dict[str, Any] = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "vocab_size": 32768, "rope_theta": 1000000.0,
}  # fmt: skip


def gguf_keys(params: dict[str, Any]) -> dict[str, Any]:
    config, more = hugging_face(params, "params.json")
    architecture, keys, _ = config_keys(config, "params.json")
    return {name.removeprefix(f"{architecture}."): value for name, value in keys.items()} | more | {"is": architecture}


def test_large_3s_keys_are_deepseeks_with_a_softmax_router_and_queries_that_warm() -> None:
    found = gguf_keys(LARGE)
    expected = {
        "is": "mistral4", "block_count": 61, "expert_count": 128, "expert_used_count": 4, "expert_shared_count": 1,
        "leading_dense_block_count": 3, "expert_gating_func": 1, "expert_weights_norm": True,
        "feed_forward_length": 16384, "expert_feed_forward_length": 4096, "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "attention.q_lora_rank": 1536, "rope.dimension_count": 64, "rope.scaling.type": "yarn",
        "rope.scaling.factor": 36, "rope.scaling.original_context_length": 8192, "attention.temperature_scale": 0.1,
        "attention.temperature_length": 8192, "attention.lora_norm_rms_epsilon": 1e-6, "context_length": 294912,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert "rope.scaling.yarn_log_multiplier" not in found  # apply_scale is false: the softmax is left as it is
    assert found["rope.scaling.attn_factor"] * (0.1 * np.log(36) + 1) == pytest.approx(1)  # and so are cos and sin
    scaled = gguf_keys({**LARGE, "yarn": {**LARGE["yarn"], "apply_scale": True}})
    assert scaled["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)


def test_dense_models_are_llamas_or_ministral_3s() -> None:
    assert gguf_keys(SEVEN)["is"] == "llama"
    assert "attention.sliding_window" not in gguf_keys(SEVEN)
    assert gguf_keys({**SEVEN, "sliding_window": 4096})["attention.sliding_window"] == 4096
    warm = gguf_keys({**SEVEN, "llama_4_scaling": LARGE["llama_4_scaling"], "yarn": LARGE["yarn"]})
    assert (warm["is"], warm["attention.temperature_length"]) == ("mistral3", 8192)
    mixtral = gguf_keys({**SEVEN, "moe": {"num_experts": 8, "num_experts_per_tok": 2}})
    assert (mixtral["is"], mixtral["expert_count"], mixtral["expert_used_count"]) == ("llama", 8, 2)


@pytest.mark.parametrize(
    ("params", "changes", "named"),
    [
        (SEVEN, {"rope_theta": None}, "rope_theta"), (SEVEN, {"use_biases": True}, "use_biases"),
        (SEVEN, {"activation": "gelu"}, "activation"), (SEVEN, {"new_key": 3}, "new_key"),
        (SEVEN, {"dim": "many"}, "hidden_size"), (SEVEN, {"yarn": [1]}, "yarn"), (SEVEN, {"moe": 8}, "moe"),
        (SEVEN, {"moe": {"num_experts": 8, "num_experts_per_tok": 2, "jitter": 1}}, "jitter"),
        (LARGE, {"moe": None}, "moe"), (LARGE, {"moe": {**LARGE["moe"], "route_every_n": 2}}, "route_every_n"),
        (LARGE, {"quantization": {"qformat_weight": "int4"}}, "qformat_weight"),
        (LARGE, {"yarn": {**LARGE["yarn"], "extra": 2}}, "extra"),
        (LARGE, {"yarn": {"factor": 36}}, "original_max_position_embeddings"),
        (LARGE, {"llama_4_scaling": {"beta": 0.1}}, "original_max_position_embeddings"),
    ],
)  # fmt: skip
def test_what_params_json_says_otherwise_is_refused_by_key(
    params: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises((UnsupportedError, FileFormatError), match=named):
        gguf_keys({**params, **changes})


def test_names_become_hugging_faces() -> None:
    expected = {
        "tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight", "layers.7.attention.wq.weight": "model.layers.7.self_attn.q_proj.weight",
        "layers.7.attention.wkv_a_with_mqa.qscale_weight": "model.layers.7.self_attn.kv_a_proj_with_mqa.qscale_weight",
        "layers.0.feed_forward.w2.weight": "model.layers.0.mlp.down_proj.weight",
        "layers.3.experts.99.w1.weight": "model.layers.3.mlp.experts.99.gate_proj.weight",
        "layers.3.feed_forward.experts.9.w3.weight": "model.layers.3.mlp.experts.9.up_proj.weight",
        "layers.3.gate.weight": "model.layers.3.mlp.gate.weight",
        "layers.3.shared_experts.w3.weight": "model.layers.3.mlp.shared_experts.up_proj.weight",
        "vision_encoder.ln_pre.weight": "vision_tower.vision_encoder.ln_pre.weight",
        "patch_merger.merging_layer.weight": "vision_tower.patch_merger.merging_layer.weight",
    }  # fmt: skip
    assert {name: renamed(name) for name in expected} == expected


IDS = [int(i) for i in np.random.default_rng(4).integers(0, 70, 19)]


def floats(config: dict[str, Any]) -> dict[str, np.ndarray]:
    r = np.random.default_rng(6)
    noise = {name: r.standard_normal(shape).astype(np.float32) for name, shape in shapes(config).items()}
    return {n: 1 + 0.3 * a if "norm" in n else a / a.shape[-1] ** 0.5 if "proj" in n else a for n, a in noise.items()}


def test_a_dense_folder_is_the_same_model_as_hugging_faces_with_its_rope_pairs_put_back(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e4}
    there = floats(config)
    theirs = Network(open_folder(write(tmp_path / "hf", {n: plain(a) for n, a in there.items()}, config)))
    for i in range(config["num_hidden_layers"]):
        for part, heads in (("q", 4), ("k", 2)):
            name = f"model.layers.{i}.self_attn.{part}_proj.weight"
            there[name] = interleaved(there[name], heads)
    own = {native(name): plain(a) for name, a in there.items()} | {"vision_encoder.x": plain(np.ones(3, np.float32))}
    params = {
        "dim": 160, "n_layers": 2, "head_dim": 32, "hidden_dim": 224, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
        "vocab_size": 70, "rope_theta": 1e4, "vision_encoder": {"hidden_size": 3},
    }  # fmt: skip
    ours = Network(open_source(write_native(tmp_path / "own", own, params)))
    assert ours.source.kind == "mistral"
    assert relative_error(logits(ours, IDS), logits(theirs, IDS)) <= 5e-6
    assert relative_error(logits(ours, IDS, "cpu"), logits(theirs, IDS)) <= 1e-5


def test_mixtrals_own_names_are_the_same_model_as_hugging_faces(tmp_path: Path) -> None:
    config = LLAMA | {
        "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 1,
        "num_key_value_heads": 4, "rope_theta": 1e6,
    }  # fmt: skip
    r = np.random.default_rng(9)
    there = {n: a for n, a in floats(config).items() if ".mlp." not in n}
    own = {native(n): a for n, a in there.items()}
    for part in ("q", "k"):
        own[f"layers.0.attention.w{part}.weight"] = interleaved(
            there[f"model.layers.0.self_attn.{part}_proj.weight"], 4
        )
    experts = {f"experts.{e}.w{w}": (224, 160) if w != 2 else (160, 224) for e in range(3) for w in (1, 2, 3)}
    for name, shape in {**experts, "gate": (3, 160)}.items():
        weight = r.standard_normal(shape).astype(np.float32) / 13
        there[f"model.layers.0.block_sparse_moe.{name}.weight"] = weight
        own[f"layers.0.feed_forward.{name}.weight"] = weight
    params = {
        "dim": 160, "n_layers": 1, "head_dim": 32, "hidden_dim": 224, "n_heads": 4, "n_kv_heads": 4, "norm_eps": 1e-5,
        "vocab_size": 70, "rope_theta": 1e6, "moe": {"num_experts": 3, "num_experts_per_tok": 2},
    }  # fmt: skip
    right = logits(Network(open_folder(write(tmp_path / "hf", {n: plain(a) for n, a in there.items()}, config))), IDS)
    ours = Network(open_source(write_native(tmp_path / "own", {n: plain(a) for n, a in own.items()}, params)))
    assert relative_error(logits(ours, IDS), right) <= 5e-6


def test_a_folder_that_has_both_forms_is_read_in_hugging_faces(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "mistral", "sliding_window": None}
    tensors = {n: plain(a) for n, a in floats(config).items()}
    write(write_native(tmp_path / "both", {}, SEVEN), tensors, config)
    assert open_source(tmp_path / "both").kind == "folder"
    (tmp_path / "both" / "model.safetensors").unlink()
    with pytest.raises(LocalMoeError):
        Network(open_source(tmp_path / "both"))


def test_large_3_in_8_bit_floats_is_read_from_its_own_names(tmp_path: Path) -> None:
    """Per-tensor scales called qscale_weight; activation scales and the vision model are left out."""
    r = np.random.default_rng(8)
    config = {k: v for k, v in DEEPSEEK.items() if k not in ("num_nextn_predict_layers", "n_group", "topk_group")}
    wanted = {n: s for n, s in shapes(config).items() if "correction" not in n}
    small, large = {}, {}
    for name, shape in wanted.items():
        if "proj" in name:
            parts, values = FLOAT8["Mistral's spelling"][1](r, shape)  # type: ignore[arg-type]
            small |= {native(name).replace("weight", last): plain(a, kind) for last, (kind, a) in parts.items()}
            small[native(name).replace("weight", "qscale_act")] = plain(np.ones((), np.float32))
        else:
            noise = r.standard_normal(shape).astype(np.float32)
            values = 1 + 0.3 * noise if "norm" in name else noise / 10
            small[native(name)] = plain(values)
        large[name] = plain(values)
    params = {
        "dim": 160, "n_layers": 3, "n_heads": 3, "n_kv_heads": 3, "hidden_dim": 200, "vocab_size": 70, "norm_eps": 1e-6,
        "rope_theta": 1e4, "q_lora_rank": 72, "kv_lora_rank": 130, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16,
        "v_head_dim": 40, "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}, "head_dim": 64,
        "moe": {
            "num_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "expert_hidden_dim": 136,
            "num_shared_experts": 1, "routed_scale": 2.5,
        },
    }  # fmt: skip
    small["vision_language_adapter.w_in.weight"] = plain(np.ones((2, 2), np.float32))
    theirs = config | {"model_type": "mistral4", "rope_theta": 1e4, "norm_topk_prob": True, "n_group": 1}
    right = logits(Network(open_folder(write(tmp_path / "hf", large, theirs))), IDS)
    ours = Network(open_source(write_native(tmp_path / "own", small, params)))
    assert relative_error(logits(ours, IDS), right) <= 1e-5
    assert relative_error(logits(ours, IDS, "cpu"), right) <= 1e-5


# tekken.json

PATTERN = PRETOKENIZERS["tekken"].patterns[0]


def tekken(tokens: list[bytes], special: int, pattern: str = PATTERN, **more: Any) -> dict[str, Any]:
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": t.decode("utf-8", "ignore") or None}
        for i, t in enumerate(tokens)
    ]
    config = {
        "pattern": pattern, "num_vocab_tokens": len(tokens) + 50, "default_vocab_size": len(tokens) + special,
        "default_num_special_tokens": special, "version": "v3",
    }  # fmt: skip
    return {"config": config, "vocab": vocab, **more}


def from_tekken(folder: Path, found: dict[str, Any]) -> Tokenizer:
    (folder / "tekken.json").write_text(json.dumps(found))
    return Tokenizer.from_folder(folder)


def test_merges_by_rank_give_llama_3s_golden_ids(conformance: Path, tmp_path: Path) -> None:
    """Llama 3's ranks are of the same kind; llama.cpp's ids of its golden texts, moved by the special tokens."""
    lines = (conformance / "tokenizers" / "llama3" / "tokenizer.model").read_text().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    tokenizer = from_tekken(tmp_path, tekken(tokens, 20, PRETOKENIZERS["llama-bpe"].patterns[0]))
    for text, ids in golden_blocks(conformance, "llama-bpe"):
        assert tokenizer.encode(text, special=False, bos=False) == [id + 20 for id in ids]


def slowly(piece: bytes, rank: dict[bytes, int]) -> list[int]:
    """tiktoken's rule, word for word: merge the neighbours whose union has the lowest rank, the leftmost of them."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]
        if piece in rank or not pairs:
            return [rank[piece]] if piece in rank else [rank[p] for p in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_words_are_merged_as_tiktoken_does(tmp_path: Path) -> None:
    r = random.Random(3)
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 700:
        made = r.choice(tokens[97:123] + tokens[256:]) + r.choice(tokens[97:123] + tokens[256:])
        if made not in tokens and len(made) < 8:
            tokens.append(made)
    rank = {token: i for i, token in enumerate(tokens)}
    tokenizer = from_tekken(tmp_path, tekken(tokens, 7))
    words = ["".join(r.choices("abcdefghij", k=r.randrange(1, 20))) for _ in range(400)]
    for word in words:
        assert tokenizer.encode(word, bos=False) == [7 + id for id in slowly(word.encode(), rank)]
        assert tokenizer.decode(tokenizer.encode(word)) == word


def test_special_tokens_are_named_by_the_file_or_numbered(tmp_path: Path) -> None:
    tokens = [bytes([b]) for b in range(256)]
    special = [
        {"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(["<unk>", "<s>", "</s>", "[INST]"])
    ]
    tokenizer = from_tekken(tmp_path, tekken([*tokens, b"beyond"], 6, special_tokens=special))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stop) == (1, 2, frozenset({2}))
    assert tokenizer.encode("[INST]a<SPECIAL_5>") == [1, 3, 6 + 97, 5]
    assert tokenizer.encode("[INST]", special=False, bos=False) == [6 + b for b in b"[INST]"]
    older = from_tekken(tmp_path, tekken(tokens, 30))
    assert older.encode("[SYSTEM_PROMPT]", bos=False) == [17]
    cut = tekken([*tokens, b"ab"], 6)
    cut["config"]["default_vocab_size"] = 6 + 256
    assert from_tekken(tmp_path, cut).encode("ab", bos=False) == [6 + 97, 6 + 98]


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"default_num_special_tokens": None}}, {"vocab": [{"rank": 0, "token_bytes": "!"}]},
        {"vocab": [{"rank": 1, "token_bytes": "YQ=="}]},
        {"vocab": 3}, {"special_tokens": [{"rank": "x"}]}, {"config": {"default_vocab_size": 1 << 60}},
        {"vocab": [{"rank": 0, "token_bytes": base64.b64encode(bytes(5000)).decode()}]},
    ],
)  # fmt: skip
def test_a_broken_tekken_json_is_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    found = tekken([bytes([b]) for b in range(256)], 5)
    with pytest.raises(LocalMoeError) as caught:
        from_tekken(
            tmp_path, {**found, **change, "config": {**found["config"], **change.get("config", {"pattern": "("})}}
        )
    assert "\n" not in str(caught.value)
