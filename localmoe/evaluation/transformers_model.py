"""A Hugging Face folder run by transformers' own modules in float32, with one layer in memory at a time; must not know
how localmoe computes.

The model is built without memory (torch's meta device). transformers' loader, given the tensors of one part at a time,
renames, merges and converts them as it does for a whole checkpoint; hooks call it before a part runs, and let the
part's weights go after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.errors import FileFormatError, LocalMoeError, UnsupportedError
from localmoe.evaluation.windows import Ids
from localmoe.kernels.program import Floats, Progress
from localmoe.loader.safetensors import read_shards
from localmoe.loader.source import listed, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

DEQUANTIZED = ("fp8", "mxfp4")
ROUTERS = ("Router", "MoEV1Gate")  # endings of the names of transformers' router classes


@dataclass(slots=True)
class Pass:
    """One run over T tokens: logits (T, V), the residual stream behind each layer (T, D), and the experts (T, k) that
    the layers with a router chose."""

    logits: Floats
    layers: list[Floats] = field(default_factory=list)
    experts: dict[int, Ids] = field(default_factory=dict)


def load_transformers() -> Any:
    """The module, quiet. Raises UnsupportedError where it or torch is not installed."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise UnsupportedError(
            f"verify compares with transformers, and {error.name} is not installed: pip install 'localmoe[oracle]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


class StreamedModel:
    """transformers' model of a folder, on the CPU."""

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        """Raises UnsupportedError for what transformers does not know, or weights quantised otherwise than DEQUANTIZED;
        FileFormatError for a broken folder."""
        transformers = load_transformers()
        self.folder, self.version, self._progress = folder, str(transformers.__version__), progress
        self.entries = read_shards(folder)
        with refused(folder):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            quantizer = dequantizer(config, folder)
            self._model = built(transformers, config, quantizer)
            self._load = PartLoader(self._model, folder, {entry.path for entry in self.entries.values()}, quantizer)
        self._layers = decoder_layers(self._model)
        embedding = self._model.get_input_embeddings()
        self._embedding = next(name for name, module in self._model.named_modules() if module is embedding)
        self._hook()

    @property
    def layer_count(self) -> int:
        return len(self._layers)

    def run(self, tokens: Sequence[int]) -> Pass:
        """Teacher-forced over token ids, from position 0."""
        import torch

        self._pass = Pass(np.empty((0, 0), np.float32))
        self._load(self._embedding)  # some models ask for its device before they call it
        with torch.no_grad(), refused(self.folder):
            found = self._model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        self._pass.logits = found.float().numpy()
        return self._pass

    def _hook(self) -> None:
        """Every part of the model, a layer or a module outside of them, gets its weights for as long as it runs."""
        for name, module in parts(self._model, self._layers):
            module.register_forward_pre_hook(lambda module, inputs, name=name: self._load(name))
            module.register_forward_hook(lambda module, inputs, outputs, name=name: self._load.release(name))
        for number, layer in enumerate(self._layers.values()):
            layer.register_forward_hook(partial(self._see_layer, number))
            for module in layer.modules():
                if type(module).__name__.endswith(ROUTERS):
                    module.register_forward_hook(partial(self._see_router, number))

    def _see_layer(self, number: int, module: Any, inputs: Any, outputs: Any) -> None:
        stream = outputs[0] if isinstance(outputs, tuple) else outputs
        self._pass.layers.append(stream[0].float().numpy().copy())
        if self._progress:
            self._progress("transformers, layer by layer", number + 1, len(self._layers))

    def _see_router(self, number: int, module: Any, inputs: Any, outputs: Any) -> None:
        self._pass.experts[number] = expert_ids(module, outputs)


def expert_ids(module: Any, outputs: Any) -> Ids:
    """The ids (T, k) among a router's outputs; Llama 4's gives scores and logits alone, the chosen are the best."""
    found = [o for o in outputs if not o.is_floating_point()] or [outputs[-1].topk(module.top_k).indices]
    return np.asarray(found[0], np.int32)


def dequantizer(config: Any, folder: Path) -> Any:
    """What turns quantised weights into floats while they are loaded, None where they are not quantised."""
    said = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if said is None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    method = said.get("quant_method") if isinstance(said, dict) else said.quant_method
    if method not in DEQUANTIZED:
        known = ", ".join(DEQUANTIZED)
        raise UnsupportedError(f"{folder}: weights quantised by {shown(method)}; verify can compare floats, {known}")
    config.quantization_config = AutoHfQuantizer.merge_quantization_configs(said, None)
    config.quantization_config.dequantize = True
    return AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)


def built(transformers: Any, config: Any, quantizer: Any) -> Any:
    """The model without weights; what is computed and not stored (rope's frequencies) is there."""
    import torch

    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    with torch.device("meta"):
        if named and named[0] is not None:
            model = named[0]._from_config(config, attn_implementation="eager", dtype=torch.float32)
        else:
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=torch.float32
            )
        if quantizer:
            quantizer.preprocess_model(model=model, dtype=torch.float32, device_map=None, use_kernels=False)
    model = model.eval().requires_grad_(False)
    # As `from_pretrained` does for what no checkpoint holds.
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)
    model._initialize_missing_keys(False)
    return model


def decoder_layers(model: Any) -> dict[str, Any]:
    """The layers of the text model by name, in order."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and name.endswith(("layers", ".h"))
    ]
    texts = [(name, module) for name, module in lists if "vision" not in name and "audio" not in name]
    if len(texts) != 1:
        raise UnsupportedError(f"{type(model).__name__} of transformers: its {count} layers are not found")
    name, module = texts[0]
    return {f"{name}.{i}": layer for i, layer in enumerate(module)}


def parts(model: Any, layers: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The layers, and each module outside of them that has tensors of its own."""
    yield from layers.items()
    inside = tuple(f"{name}." for name in layers)
    for name, module in model.named_modules():
        if (
            name not in layers
            and not name.startswith(inside)
            and next(module.parameters(recurse=False), None) is not None
        ):
            yield name, module


class PartLoader:
    """Gives a part of the model its tensors, and takes them away."""

    def __init__(self, model: Any, folder: Path, files: set[Path], quantizer: Any) -> None:
        from safetensors import safe_open
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._model, self._folder, self._quantizer = model, folder, quantizer
        self._mapping = get_model_conversion_mapping(model, None, quantizer)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        wanted = model.state_dict()
        self._sources: dict[str, list[tuple[str, Callable[[], Any]]]] = {}  # by the name that they get in the model
        for file in sorted(files):
            opened: Any = safe_open(file, framework="pt")
            for key in list(opened.keys()):
                name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
                if name not in wanted and key in wanted:
                    name = key
                self._sources.setdefault(name, []).append((key, partial(opened.get_slice, key)))
        self._tied = dict(model.all_tied_weights_keys)

    def __call__(self, part: str) -> None:
        """Raises FileFormatError for a tensor that is missing or of the wrong shape."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        module = self._model.get_submodule(part)
        names = [f"{part}.{name}" for name, weight in module.named_parameters() if weight.is_meta]
        if not names:
            return
        ties = {name: self._tied[name] for name in names if name not in self._sources and name in self._tied}
        inside = (f"{part}.", *ties.values())
        tensors = {key: get() for name, made in self._sources.items() if name.startswith(inside) for key, get in made}
        settings = LoadStateDictConfig(
            dtype=self._model.dtype, weight_mapping=self._mapping, hf_quantizer=self._quantizer
        )
        info, _ = convert_and_load_state_dict_in_model(self._model, tensors, settings)
        wrong = [f"{shown(name)} has shape {tuple(a)}, expected {tuple(b)}" for name, a, b in info.mismatched_keys]
        wrong += [f"{shown(name)}: {error}" for name, error in info.conversion_errors.items()]
        if wrong:
            raise FileFormatError(f"{self._folder}: transformers says: {listed(wrong, 3)}")
        for name, source in ties.items():
            self._put(name, self._model.get_parameter(source))
            self._forget(source)
        missing = [name for name, weight in module.named_parameters() if weight.is_meta]
        if missing:
            told = listed([shown(f"{part}.{name}") for name in missing])
            raise FileFormatError(f"{self._folder}: transformers finds no weights for {told}")

    def release(self, part: str) -> None:
        for name, _ in list(self._model.get_submodule(part).named_parameters()):
            self._forget(f"{part}.{name}")

    def _forget(self, name: str) -> None:
        import torch

        weight = self._model.get_parameter(name)
        self._put(name, torch.nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False))

    def _put(self, name: str, weight: Any) -> None:
        owner, _, last = name.rpartition(".")
        setattr(self._model.get_submodule(owner), last, weight)


@contextmanager
def refused(folder: Path) -> Iterator[None]:
    """What transformers raises for a folder, which may be anything, as one line."""
    try:
        yield
    except (LocalMoeError, MemoryError):
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(f"{folder}: transformers cannot run it: {first}") from error
