"""Hugging Face folders read as if they were GGUF files: keys, tensor names and experts mapped, nothing copied."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from localmoe.errors import FileFormatError
from localmoe.formats import Weight
from localmoe.loader.checkpoint import stacked
from localmoe.loader.files import by_address
from localmoe.loader.huggingface_config import FAMILIES, config_keys, quantization_of, text_settings
from localmoe.loader.quantised import Integers, Stored, joined
from localmoe.loader.safetensors import PACKED, Entry, read_json, read_shards
from localmoe.loader.source import LazyWeights, Source, read_small_file, shown

SMALL, LARGE = 1 << 24, 1 << 26
EXPERT = re.compile(r"(?P<head>.*\.experts)\.(?P<number>\d{1,6})\.(?P<tail>[^.]+)\.(?P<suffix>weight|bias)")
LAYER = re.compile(r"(?P<head>model\.layers|(?:transformer\.)?h)\.(?P<number>\d{1,6})\.(?P<rest>.*)")
# A text model beside a vision model, whose own tensors the checkpoint skips as GGUF's "v." ones.
TEXT = re.compile(r"^(?:model\.language_model|language_model\.model)\.|^language_model\.(?=lm_head)")
VISION = re.compile(
    r"(?:model\.)?"
    r"(?:vision_model|vision_tower|multi_modal_projector|visual|audio_tower|embed_vision|embed_audio)\."
)
# A multi-token-prediction layer outside the numbered ones (Qwen3-Next and Qwen3.5).
PREDICTION = re.compile(r"(?:model\.)?mtp\.")
# Rope frequencies that old checkpoints store although config.json implies them.
IMPLIED = re.compile(r".*\.rotary_emb\.inv_freq")
# Names that the gguf package's map lacks: fused experts, and transformers' names without suffix.
FUSED = {
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight", "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.gate_up_proj_bias": "ffn_gate_up_exps.bias", "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    "mlp.experts.gate_up_proj_blocks": "ffn_gate_up_exps.blocks",
    "mlp.experts.gate_up_proj_scales": "ffn_gate_up_exps.scales",
    "mlp.experts.down_proj_blocks": "ffn_down_exps.blocks", "mlp.experts.down_proj_scales": "ffn_down_exps.scales",
    "feed_forward.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "feed_forward.experts.down_proj": "ffn_down_exps.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight", "experts.down_proj": "ffn_down_exps.weight",
    "router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale",
    "layer_scalar": "layer_output_scale.weight",
    "block_sparse_moe.input_linear.weight": "ffn_gate_up_exps.weight",
    "shared_mlp.input_linear.weight": "ffn_gate_up_shexp.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
}  # fmt: skip
# Architectures that the gguf package does not know yet, and one whose tensors have the same names.
NAMED_AS = {"deepseek32": "glm-dsa"}
# Families whose map has no output of its own (Gemma, Command R), as every released file ties it to the embedding.
UNTIED = {"lm_head.weight": "output.weight"}
# generation_config.json's names for the sampling settings that GGUF keeps under general.sampling.
SAMPLING = {
    "temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat",
}  # fmt: skip


def open_folder(path: Path) -> Source:
    """Opens a folder with config.json and safetensors; reads headers and small JSON files only.

    Metadata has GGUF's keys; what GGUF has no key for is named in its spirit (see huggingface_config). Experts of one
    layer and projection are one stack with a slab each, whatever the file's form.

    Raises: FileFormatError (broken, a shard or tensor missing), UnsupportedError (model_type, dtype or config value).
    """
    config = text_settings(read_json(path / "config.json", SMALL))
    origin = str(path / "config.json")
    config_keys(config, origin)  # before hundreds of files are opened
    return folder_source(path, "folder", config, origin, read_shards(path))


def folder_source(
    path: Path,
    kind: Literal["folder", "mistral"],
    config: Mapping[str, Any],
    origin: str,
    entries: Mapping[str, Entry],
    more: Mapping[str, Any] | None = None,
) -> Source:
    """The Source of a folder whose settings and tensors go by Hugging Face's names; `more` are GGUF keys that count."""
    architecture, keys, tied = config_keys(config, origin)
    keys |= {f"{architecture}.{name}": value for name, value in (more or {}).items()}
    makers = _gguf_named(
        path, joined(entries, quantization_of(config, origin)), architecture, keys[f"{architecture}.block_count"]
    )
    rewrite = FAMILIES[config["model_type"]].rewrite
    if rewrite:
        rewrite(makers, {name.removeprefix(f"{architecture}."): value for name, value in keys.items()})
    if tied:
        makers.pop("output.weight", None)
    elif tied is False and "output.weight" not in makers:
        raise FileFormatError(
            f"{path}: lm_head.weight is missing, though config.json says tie_word_embeddings is false"
        )
    metadata: dict[str, Any] = {"general.architecture": architecture, "general.name": path.resolve().name, **keys}
    metadata.update(_sampling(path / "generation_config.json"))
    metadata.update(_chat_templates(path))
    files = by_address(entry.file for entry in entries.values())
    nbytes = sum(file.nbytes for file in files)
    return Source(path, kind, metadata, LazyWeights(makers), nbytes, tokenizer_folder=path, files=files)


def _gguf_named(
    path: Path, entries: Mapping[str, Stored], architecture: str, layers: int
) -> dict[str, Callable[[], Weight]]:
    """Makers of tensors by GGUF name. Names without a place keep their own, for the checkpoint to refuse."""
    rename = _renaming(architecture, layers)
    makers: dict[str, Callable[[], Weight]] = {}
    experts: dict[str, dict[int, Stored]] = {}
    for name, entry in entries.items():
        if IMPLIED.fullmatch(name):
            continue
        if isinstance(entry, Entry) and not (name.endswith(("_blocks", "_scales")) and entry.dtype in PACKED):
            entry.require_readable()
        single = EXPERT.fullmatch(name)
        if single:
            stack = rename(f"{single['head']}.{single['tail']}.{single['suffix']}")
            if experts.setdefault(stack, {}).setdefault(int(single["number"]), entry) is not entry:
                raise FileFormatError(
                    f"{entry.path}: tensor {shown(name)} is a second expert {single['number']} of {shown(stack)}"
                )
            continue
        renamed = rename(name)
        _add(makers, renamed, entry, partial(entry.weight, renamed))
    for name, found in experts.items():
        missing = next((number for number in range(len(found)) if number not in found), None)
        if missing is not None:
            raise FileFormatError(f"{path}: {shown(name)} has {len(found)} experts, but expert {missing} is missing")
        ordered = [found[number] for number in range(len(found))]
        _add(makers, name, ordered[0], partial(_stack, name, ordered))
    return makers


def gguf_names(names: Iterable[str], architecture: str, layers: int) -> frozenset[str]:
    """The GGUF names that a folder's tensors get, experts stacked and fused ones taken apart."""
    rename, found = _renaming(architecture, layers), set()
    for name in names:
        single = EXPERT.fullmatch(name)
        plain = f"{single['head']}.{single['tail']}.{single['suffix']}" if single else name
        if IMPLIED.fullmatch(name):
            continue
        renamed = rename(plain)
        head, _, last = renamed.rpartition(".")
        renamed = f"{head}.weight" if last in ("blocks", "scales") else renamed
        renamed = f"{renamed}.weight" if renamed.endswith("attn_sinks") else renamed
        found.update({renamed.replace("gate_up", half) for half in ("gate", "up")})
    return frozenset(found)


def _add(makers: dict[str, Callable[[], Weight]], name: str, entry: Stored, maker: Callable[[], Weight]) -> None:
    if name in makers:
        raise FileFormatError(f"{entry.path}: tensor {shown(entry.name)} is a second {shown(name)}")
    makers[name] = maker


def _stack(name: str, entries: list[Stored]) -> Weight:
    first = entries[0].weight(entries[0].name)  # whose format the others have to have
    others = (e.weight(e.name, first.format) if isinstance(e, Integers) else e.weight(e.name) for e in entries[1:])
    return stacked(name, [first, *others])


def _renaming(architecture: str, layers: int) -> Callable[[str], str]:
    """A function from Hugging Face's tensor names to GGUF's, by the gguf package's map of a model with one layer."""
    import gguf  # late: it takes 80 ms, and GGUF files do without

    architecture = NAMED_AS.get(architecture, architecture)
    known = next(id for id, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(known, 1)

    def lookup(name: str) -> str | None:
        plain = name.replace("e_score_correction_bias", "e_score_correction.bias")
        found: str | None = table.get_name(plain, try_suffixes=(".weight", ".bias"))
        return found

    @cache
    def rename(name: str) -> str:
        if VISION.match(name):
            return f"v.{name}"
        if PREDICTION.match(name):
            return f"blk.{layers}.nextn.{name}"
        name = TEXT.sub(lambda found: "" if found[0] == "language_model." else "model.", name)
        layer = LAYER.fullmatch(name)
        if not layer:
            return lookup(name) or UNTIED.get(name, name)
        number, rest = int(layer["number"]), layer["rest"]
        if number >= layers:
            return f"blk.{number}.nextn.{rest}"  # a multi-token-prediction layer
        inner = FUSED.get(rest) or (lookup(f"{layer['head']}.0.{rest}") or "").removeprefix("blk.0.")
        return f"blk.{number}.{inner}" if inner else name

    return rename


def _sampling(path: Path) -> dict[str, Any]:
    """The model's recommended sampling, where generation_config.json asks for sampling at all."""
    found = read_json(path, SMALL) if os.path.isfile(path) else {}
    if found.get("do_sample") is not True:
        return {}
    numbers = {name: found.get(name) for name in SAMPLING}
    return {f"general.sampling.{SAMPLING[name]}": n for name, n in numbers.items() if type(n) in (int, float)}


def _chat_templates(path: Path) -> dict[str, str]:
    """Chat templates under GGUF's keys; a file of its own goes before tokenizer_config.json, as in transformers."""
    own = path / "chat_template.jinja"
    if os.path.isfile(own):
        try:
            return {"tokenizer.chat_template": read_small_file(own, SMALL).decode("utf-8")}
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{own}: not UTF-8 at byte {error.start}") from None
    for file in (path / "chat_template.json", path / "tokenizer_config.json"):
        found = read_json(file, LARGE).get("chat_template") if os.path.isfile(file) else None
        if isinstance(found, str):
            return {"tokenizer.chat_template": found}
        if isinstance(found, list):
            named = {
                t["name"]: t["template"] for t in found if isinstance(t, dict) and {"name", "template"} <= t.keys()
            }
            return {
                "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}": template
                for name, template in named.items()
                if isinstance(name, str) and isinstance(template, str)
            }
    return {}
