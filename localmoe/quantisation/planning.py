"""Which format each tensor of a model will have in a file type, and sources that have them: unread, or quantised in
memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from localmoe.errors import DeviceError, SettingError, UnsupportedError
from localmoe.formats import BF16, F8_E4M3, F16, F32, Format, Weight
from localmoe.kernels.program import Progress
from localmoe.loader.source import LazyWeights, Source, shown
from localmoe.memory import available_nbytes, readable_size
from localmoe.quantisation.file_types import FileType, Sizes, file_type, formats
from localmoe.quantisation.gguf_form import gguf_form
from localmoe.quantisation.quantiser import Quantiser
from localmoe.quantisation.rearranging import without_bytes


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be: what it is now, and the format that it gets. `small` is the tensor itself where it has one
    axis."""

    name: str
    shape: tuple[int, ...]
    found: Format
    wanted: Format
    small: Weight | None
    scaled: bool = False  # by numbers that lie beside it

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements // self.wanted.elements * self.wanted.nbytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A model in the form of a GGUF file, and what becomes of each of its tensors, in the order of the file."""

    form: Source
    kind: FileType
    tensors: dict[str, Planned]

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def unread(self) -> Source:
        """A source of the planned shapes and formats whose matrices hold nothing and take no memory."""
        makers = {name: partial(_unread, tensor) for name, tensor in self.tensors.items()}
        return replace(self.form, tensors=LazyWeights(makers), nbytes=self.nbytes)


def plan(source: Source, kind: FileType, *, requantise: bool = False) -> Plan:
    """What `kind` makes of a model. Each tensor is made once, to learn its shape, and let go.

    Tensors of a folder that are quantised already (MXFP4, GPTQ) stay as they are, but for 8-bit floats; those of a GGUF
    file too, but only where that is what the type asks for. What has scales beside it, for which GGUF files of most
    formats have no place, is always written out.

    Raises: UnsupportedError for a tensor of a GGUF file that would be quantised again, unless `requantise`.
    """
    form = gguf_form(source)
    known = {name: _described(name, form.tensors[name]) for name in form.tensors}
    floats = (F32, F16, BF16, F8_E4M3)
    chosen = formats(kind, {name: tensor.shape for name, tensor in known.items()}, _sizes(form.metadata))
    tensors: dict[str, Planned] = {}
    for name, tensor in known.items():
        wanted = chosen.get(name, tensor.found if source.kind == "gguf" else F32)
        if tensor.found.elements == 1 and tensor.found not in floats:  # whole numbers: a table, no weights
            wanted = tensor.found
        if tensor.found.elements > 1 and not requantise:
            if source.kind == "gguf" and wanted is not tensor.found:
                again = f"tensor {shown(name)} is {tensor.found.name} already; as {wanted.name} it loses once more"
                raise UnsupportedError(f"{source.path}: {again}: --allow-requantize does it nevertheless")
            wanted = tensor.found
        if tensor.scaled and wanted is tensor.found:
            wanted = F32
        tensors[name] = replace(tensor, wanted=wanted)
    return Plan(form, kind, tensors)


def plan_folder(source: Source, type: str) -> Plan:
    """What a file type makes of a folder's weights on loading. Raises SettingError for another name, or for a GGUF
    file."""
    kind = file_type(type)
    if source.kind == "gguf":
        raise SettingError(f"{source.path}: --quantize is for folders; of a GGUF file, localmoe convert makes another")
    return plan(source, kind)


def quantised(planned: Plan, quantiser: Quantiser, progress: Progress | None = None) -> Source:
    """The model with its tensors as planned, each encoded when it is first asked for and then kept in memory.

    Raises DeviceError where memory lacks.
    """
    needed = sum(t.nbytes for t in planned.tensors.values() if t.wanted is not t.found)
    if needed > available_nbytes():
        sizes = f"{readable_size(needed)} are needed for it, {readable_size(available_nbytes())} are free"
        raise DeviceError(f"{planned.form.path}: as {planned.kind.name} it does not fit into memory: {sizes}")
    made: dict[str, Weight] = {}
    finished = 0

    def report(done: int) -> None:
        if progress:
            progress(f"quantising to {planned.kind.name}", finished + done, planned.elements)

    def make(name: str) -> Weight:
        nonlocal finished
        if name not in made:
            made[name] = quantiser.weight(planned.form.tensors[name], planned.tensors[name].wanted, report)
            finished += planned.tensors[name].elements
        return made[name]

    makers = {name: partial(make, name) for name in planned.tensors}
    return replace(planned.form, tensors=LazyWeights(makers), nbytes=planned.nbytes)


def _described(name: str, weight: Weight) -> Planned:
    small = weight if len(weight.shape) == 1 else None
    return Planned(name, weight.shape, weight.format, weight.format, small, bool(weight.scales))


def _unread(tensor: Planned) -> Weight:
    if tensor.small is not None:
        return tensor.small
    return without_bytes(tensor.name, tensor.shape, tensor.wanted)


def _sizes(metadata: Mapping[str, Any]) -> Sizes:
    """Read leniently: a file of an architecture that is not run here can be converted too."""
    architecture = str(metadata.get("general.architecture", ""))

    def number(key: str) -> int:
        found = metadata.get(f"{architecture}.{key}", 0)
        return max(np.ravel(found).tolist(), default=0) if not isinstance(found, str) else 0

    heads, keys = number("attention.head_count"), number("attention.head_count_kv")
    return Sizes(architecture, number("block_count"), number("expert_count"), heads // keys if keys else 1)
