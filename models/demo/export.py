"""Write a training checkpoint as GGUF (`deepseek2`, Q8_0) and read such a file back into torch; knows no training.

    python export.py CHECKPOINT DATA OUT.gguf [--golden OUT.npz]

Matrices are Q8_0; norms, routers and the selection bias float32. --golden saves a prompt's ids and the logits of its
last position, computed in torch, in float32, from the tensors of the file just written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import model
import numpy as np
import torch
from gguf import GGMLQuantizationType, TokenType
from model import Shape, Weights
from tokenizers import Tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DESCRIPTION = (
    "A very small DeepSeek-style mixture-of-experts model for simple English small talk, trained from scratch on two "
    "processor cores to try out localmoe. It knows few facts and makes mistakes."
)
GOLDEN_PROMPT = (
    "<|bos|><|user|>Hello, how are you today?<|end|><|assistant|>I'm fine, thanks! And you?<|end|>"
    "<|user|>I like music.<|end|><|assistant|>"
)


def write_metadata(writer: gguf.GGUFWriter, s: Shape) -> None:
    writer.add_name("localmoe demo")
    writer.add_basename("localmoe-demo")
    writer.add_size_label("17M")
    writer.add_license("apache-2.0")
    writer.add_description(DESCRIPTION)
    writer.add_tags(["text-generation", "conversational", "small-talk"])
    writer.add_languages(["en"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_sampling_temp(0.5)
    writer.add_sampling_top_k(40)
    writer.add_sampling_top_p(0.9)
    writer.add_sampling_min_p(0.05)

    writer.add_context_length(s.context)
    writer.add_vocab_size(s.vocabulary)
    writer.add_embedding_length(s.hidden)
    writer.add_block_count(s.layers)
    writer.add_leading_dense_block_count(s.dense_layers)
    writer.add_feed_forward_length(s.dense_width)
    writer.add_layer_norm_rms_eps(s.epsilon)
    writer.add_rope_freq_base(s.theta)
    writer.add_rope_dimension_count(s.rope)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(s.latent)
    writer.add_key_length(s.latent + s.rope)
    writer.add_value_length(s.latent)
    writer.add_key_length_mla(s.nope + s.rope)
    writer.add_value_length_mla(s.value)
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.used)
    writer.add_expert_shared_count(s.shared)
    writer.add_expert_feed_forward_length(s.expert_width)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(1.0)


def write_tokenizer(writer: gguf.GGUFWriter, path: Path) -> None:
    """The BPE of tokenizer.json as `gpt2` tokens and merges; its five control tokens come first."""
    content = json.loads(path.read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    control = {token["id"] for token in content["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if ids[token] in control else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(ids["<|bos|>"])
    writer.add_eos_token_id(ids["<|end|>"])
    writer.add_eot_token_id(ids["<|end|>"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write(path: Path, s: Shape, weights: Weights, tokenizer: Path) -> None:
    """The whole file; the tied head is stored a second time, as `output.weight`, which some readers require."""
    writer = gguf.GGUFWriter(path, "deepseek2")
    write_metadata(writer, s)
    write_tokenizer(writer, tokenizer)
    for name, tensor in (weights | {"output.weight": weights["token_embd.weight"]}).items():
        values = tensor.detach().float().contiguous().numpy()
        if values.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, values)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_weights(path: Path) -> Weights:
    """All tensors of a GGUF file in float32, dequantised by the `gguf` package."""
    reader = gguf.GGUFReader(path)
    weights: Weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in reversed(tensor.shape)])
        weights[tensor.name] = torch.from_numpy(np.array(values, np.float32))
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="folder written by data.py, for its tokenizer")
    parser.add_argument("out", type=Path)
    parser.add_argument("--golden", type=Path)
    arguments = parser.parse_args()

    state = torch.load(arguments.checkpoint)
    shape = Shape(**state["shape"])
    write(arguments.out, shape, state["weights"], arguments.data / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(arguments.data / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(GOLDEN_PROMPT, add_special_tokens=False).ids])
    with torch.no_grad():
        stored = model.logits(shape, read_weights(arguments.out), ids)[0, -1]
        trained = model.logits(shape, state["weights"], ids)[0, -1]
    difference = float((stored - trained).norm() / trained.norm())
    size, following = arguments.out.stat().st_size / 1e6, tokenizer.decode([int(stored.argmax())])
    print(f"{arguments.out.name}: {size:.1f} MB, step {state['step']}, {state['tokens']:,} tokens seen")
    print(f"logits, file against checkpoint: relative difference {difference:.2e}, next token {following!r}")
    if arguments.golden:
        np.savez(arguments.golden, ids=ids[0].numpy(), logits=stored.numpy())


if __name__ == "__main__":
    main()
