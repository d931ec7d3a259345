"""What of a model stays in memory and what may come and go: bytes of dense weights and of experts; reads no weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from localmoe.formats import Weight
from localmoe.kernels.program import Program

ROWS_NBYTES = 64 << 20  # of the rows of an embedding that a conversation looks up: nothing is read ahead there


@dataclass(frozen=True, slots=True)
class Routed:
    """The experts of one layer: how many there are, how many a token uses, and the bytes of one (gate, up, down)."""

    count: int
    used: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of weights. `dense` stays in memory; of `looked_up`, an embedding that is nothing else, a token reads a
    row, which counts for nothing."""

    dense: int
    looked_up: int
    layers: tuple[Routed, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Weight], program: Program) -> Sizes:
        """Of a model's tensors and the Program of one token."""
        routed = [op for op in program.ops if op.name == "experts"]
        multiplied = {weight.name for op in program.ops if op.name != "embed" for weight in op.weights}
        rows = {weight.name for op in program.ops if op.name == "embed" for weight in op.weights} - multiplied
        looked_up = sum(tensors[name].nbytes for name in rows if name in tensors)
        layers = tuple(
            Routed(op.weights[0].shape[0], op.inputs[1].shape[1], sum(w.nbytes // w.shape[0] for w in op.matrices))
            for op in routed
        )
        experts = sum(layer.count * layer.nbytes for layer in layers)
        return cls(sum(weight.nbytes for weight in tensors.values()) - experts - looked_up, looked_up, layers)

    @property
    def experts(self) -> int:
        return sum(layer.count * layer.nbytes for layer in self.layers)

    @property
    def stays(self) -> int:
        """What is kept in memory in any case when experts are in slots."""
        return self.dense + min(self.looked_up, ROWS_NBYTES)

    @property
    def weights(self) -> int:
        return self.dense + self.looked_up + self.experts

    @property
    def token_experts(self) -> int:
        """Of the experts that one token uses."""
        return sum(layer.used * layer.nbytes for layer in self.layers)

    @property
    def least_experts(self) -> int:
        """Of the smallest slots that work: as many as a token uses in one layer, of each size of expert."""
        used: dict[int, int] = {}
        for layer in self.layers:
            used[layer.nbytes] = max(used.get(layer.nbytes, 0), layer.used)
        return sum(nbytes * count for nbytes, count in used.items())

    @property
    def least(self) -> int:
        """The least to keep that works at all."""
        return self.stays + self.least_experts

    @property
    def useful(self) -> int:
        """The least to keep that makes sense: below one token's working set nothing is found in memory again."""
        return self.stays + self.token_experts
