"""The weights and settings of one model file, and the Programs that its family traces; holds no device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localmoe.arch.table import family
from localmoe.errors import DeviceError, FileFormatError, SettingError
from localmoe.experts import budget
from localmoe.formats import Weight
from localmoe.kernels.open import cache_format
from localmoe.kernels.ops import Ops, trace
from localmoe.kernels.program import Program, Tensor
from localmoe.loader.checkpoint import Checkpoint, summary
from localmoe.loader.metadata import Metadata
from localmoe.loader.source import Source
from localmoe.memory import available_nbytes, readable_size

CHUNK = 512  # tokens of a prefill step: weights are unpacked once for so many, and an expert sees enough of them
DEFAULT_CONTEXT = 8192


class Network:
    """The weights and settings of one model file, and the Programs that its family traces; holds no device."""

    def __init__(self, source: Source) -> None:
        """Raises UnsupportedError for what no family here implements, FileFormatError for tensors that do not fit
        it."""
        self.source = source
        self.metadata = Metadata(source.metadata, str(source.path))
        self._programs: dict[tuple[int, bool], Program] = {}
        self.module = family(self.metadata.architecture, str(source.path))
        checkpoint = Checkpoint(source)
        try:
            self.config: Any = self.module.Config.read(self.metadata)
            self.weights: Any = self.module.load(self.config, checkpoint)
            self.program(1)
        except (ValueError, ArithmeticError) as error:  # each key is sound, but the sizes contradict each other
            raise FileFormatError(f"{source.path}: the model's sizes do not fit together: {error}") from error
        self.trained_context = self.metadata.int("context_length", DEFAULT_CONTEXT)
        self.metadata.finish()
        self.left_out = summary(checkpoint.finish())
        self.tensors: Mapping[str, Weight] = checkpoint.given

    def program(self, tokens: int, *, all_rows: bool = False) -> Program:
        """The family's forward pass for steps of up to `tokens` tokens, traced when first asked for."""
        if (tokens, all_rows) not in self._programs:

            def forward(ops: Ops) -> Tensor:
                result: Tensor = self.module.forward(ops, self.config, self.weights, ops.input, ops.cache)
                return result

            self._programs[tokens, all_rows] = trace(forward, tokens, all_rows=all_rows)
        return self._programs[tokens, all_rows]

    def weights_by_use(self, *, experts: bool = True) -> list[Weight]:
        """The matrices that one token reads, in the order of their use, and after them the experts, of which it may
        read any; of the embedding it reads one row."""
        ops = [op for op in self.program(1).ops if op.name != "embed" and (experts or op.name != "experts")]
        return [weight for op in sorted(ops, key=lambda op: op.name == "experts") for weight in op.matrices]

    def needed(self, context: int, kv_format: str) -> budget.Needed:
        """What a chat with a context of so many tokens needs beside the weights; compiles nothing."""
        programs = [self.program(tokens) for tokens in sorted({1, min(CHUNK, context)})]
        return budget.needed(programs, self.source.metadata, int(self.config.vocabulary), context, kv_format)

    def fitting_context(self, asked: int | None, kv_format: str) -> int:
        """The context to allocate: what was asked, else the trained one up to 8192. Raises SettingError for one that is
        not possible, DeviceError, with numbers, where memory lacks."""
        if asked is not None and asked < 1:
            raise SettingError(f"a context of {asked} tokens is not possible; at least 1 is")
        context, program = asked or min(self.trained_context, DEFAULT_CONTEXT), self.program(1)
        positions = [op.weights[0].rows for op in program.ops if op.name == "add_positions"]
        if positions and context > positions[0]:
            raise SettingError(f"a context of {context} tokens is not possible; the model has {positions[0]} positions")
        per_token, fixed = program.cache_nbytes(cache_format(kv_format)), program.state_slots * program.state_nbytes
        free = available_nbytes()
        if (needed := context * per_token + fixed) > free:
            what = "keys, values and recurrent states" if fixed else "keys and values"
            most = max(free - fixed, 0) // per_token if per_token else 0
            raise DeviceError(
                f"{self.source.path}: a context of {context} tokens needs {readable_size(needed)} for {what}, and "
                f"{readable_size(free)} are free; at most {most} tokens fit"
            )
        return context
