"""An opened model: where the loader, a family, a device, the tokenizer and the template are joined; knows no
conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from localmoe.errors import DeviceError, SettingError
from localmoe.experts.history import History
from localmoe.experts.loading import Loading
from localmoe.experts.residence import Residence, expert_ops, looked_up, make, read_all, settle, tracing
from localmoe.experts.sizes import Sizes
from localmoe.experts.telemetry import Counts, Room
from localmoe.formats import Bytes
from localmoe.kernels.cache_state import CacheState
from localmoe.kernels.open import Device, Plan, cache_format, open_device
from localmoe.kernels.program import Floats, Progress, Watcher
from localmoe.kernels.shifting import obstacle, refuse
from localmoe.kernels.states import States
from localmoe.loader.locate import open_source
from localmoe.loader.soundness import Soundness
from localmoe.memory import resident
from localmoe.network import CHUNK, Network
from localmoe.pages import let_go, read_by_rows
from localmoe.prefault import Prefault
from localmoe.settings import recommended
from localmoe.template import Template, reasoning_markers, without_template

if TYPE_CHECKING:
    from localmoe.experts.trace import TraceWriter
    from localmoe.experts.usage import Usage
    from localmoe.tokenizer import Tokenizer

SCORE_CHUNK, SCORE_NBYTES = 64, 1 << 27  # all logits of a scoring step are kept: at least 64 rows, at most 128 MB


class Model:
    """A model on a device, with a KV cache of `context` tokens."""

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        pin: str | None = None,
        loading: Loading = Loading(),  # noqa: B008 - it is frozen
        context: int | None = None,
        kv_format: str = "f16",
        quantize: str | None = None,
        for_chat: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Open a GGUF file or a Hugging Face folder. `progress` hears (what, done, total) of anything that takes time.
        `quantize`: the weights of a folder are quantised to that file type first, as `localmoe convert` writes them.
        `for_chat`: refused before anything takes time where it has no chat template.
        `pin`: threads stay on CPUs, as `pinned_cpus` reads it.

        Raises LocalMoeError subclasses: a broken or unsupported file, a device that is not there, a context that does
        not fit.
        """
        self.source = open_source(path)
        if for_chat and not self.has_template:
            raise without_template(self.name)
        self._soundness = Soundness(self.source.files)
        if quantize is None:
            self.network = Network(self.source)
        else:
            from localmoe.quantisation.planning import plan_folder, quantised  # a usual start need not wait for it
            from localmoe.quantisation.quantiser import Quantiser

            with Quantiser(threads, progress) as quantiser:
                self.source = quantised(plan_folder(self.source, quantize), quantiser, progress)
                self.network = Network(self.source)  # which asks for every tensor
        self.path = self.source.path
        self.context = self.network.fitting_context(context, kv_format)
        self.kv_format = kv_format
        self.chunk = min(CHUNK, self.context)
        self._progress = progress
        self.device: Device = open_device(
            device, context=self.context, kv_format=kv_format, threads=threads, pin=pin, progress=progress
        )
        self.cached: list[int] = []  # the tokens whose keys and values stand in the cache
        self._shifted: int | None = None  # from which of them on they are not what reading them gives
        self._states = States(self.network.program(1).state_slots)
        self._residence: Residence | None = None
        self._trace: TraceWriter | None = None
        self._made: list[Bytes] = []  # weights that are in memory, as the files do not hold them as they are
        self._learned = loading.learned
        self._prefault = Prefault(())
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._soundness.check()
        self.change_loading(loading)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.source.metadata

    @property
    def architecture(self) -> str:
        return self.network.metadata.architecture

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return self.source.nbytes

    def cache_nbytes(self, tokens: int) -> int:
        """Bytes of the KV cache that so many tokens fill, with the recurrent states, which do not grow."""
        program = self.network.program(1)
        return tokens * program.cache_nbytes(cache_format(self.kv_format)) + program.state_slots * program.state_nbytes

    @property
    def trained_context(self) -> int:
        """Tokens of the longest text that the model was trained on."""
        return self.network.trained_context

    @property
    def left_out(self) -> str:
        """Which parts of the file are not run, in words; empty where there are none."""
        return self.network.left_out

    @property
    def threads(self) -> int:
        return self.device.threads

    @property
    def residency_mode(self) -> str:
        """What runs: "off", "mmap" or "slots"."""
        return self._running.mode

    @property
    def loading_reason(self) -> str:
        """What was chosen and why, in one line."""
        return self._running.why

    def change_loading(self, loading: Loading, progress: Progress | None = None) -> None:
        """Load in another way from now on; what stands in the KV cache stays. `progress` hears of what takes time, as
        from opening on. Raises LocalMoeError: then the old way goes on."""
        self._soundness.begin()
        before, lengths = self._residence, sorted({1, self.chunk})
        with tracing(self._trace, loading, self.source, expert_ops(self.network.program(1))) as trace:
            found = self._settled(loading, trace)
            try:
                if found.mode == "off":
                    read_all(self.source, progress or self._progress)
                # Compiled now, under the progress bar, and not when the first answer is awaited.
                made = make(self.network.program(1), found, progress or self._progress)
                plans = self.device.compile_all([self.network.program(n) for n in lengths], found.experts)
                self._soundness.check()  # norms and biases have been copied
            except BaseException:
                found.close()
                raise
            self._prefault.stop()
            compiled = {(n, False): plan for n, plan in zip(lengths, plans, strict=True)}
            self.loading, self._residence, self._plans, self._made = loading, found, compiled, made
        self._trace = trace
        if before and found.mode == "slots":
            let_go(weight for op in expert_ops(self.network.program(1)) for weight in op.matrices)
        ahead = found.mode == "slots" or (loading.mode == "auto" and found.fits)
        weights = self.network.weights_by_use(experts=found.mode != "slots") if ahead else ()
        self._prefault = Prefault(weights, tidy=found.tidy)
        read_by_rows(looked_up(self.network.program(1)), by_rows=found.mode == "slots")
        if before:
            before.close()
        found.preload()

    def _settled(self, loading: Loading, trace: TraceWriter | None) -> Residence:
        program, network = self.network.program(1), self.network
        sizes, own = Sizes.of(network.tensors, program), resident().anonymous if self._residence else 0
        needed = lambda: network.needed(self.context, self.kv_format).resident  # noqa: E731
        return settle(loading, self.source, program, sizes, needed, lambda: self._history, trace, own)

    def counts(self) -> Counts:
        """What became of the experts that were chosen since the mode was taken up; zeros where nobody counts."""
        return self._running.counts()

    def room(self) -> Room | None:
        """None unless experts are in slots."""
        return self._running.room()

    @property
    def expert_blocks(self) -> list[int]:
        """The blocks that have experts, by the numbers of their tensors: the rows of `uses`."""
        ops = expert_ops(self.network.program(1))
        return [int(op.weights[0].name.split(".")[1]) for op in ops]

    def uses(self) -> npt.NDArray[np.int64] | None:
        """Tokens that chose each expert since opening, (layers, experts); None where nobody counts."""
        return self._running.uses()

    @property
    def _running(self) -> Residence:
        assert self._residence is not None
        return self._residence

    @property
    def loading_problem(self) -> str:
        """What went wrong beside the loading, in a line: a trace or what is learned cannot be kept. Mostly empty."""
        return self._running.problem or (self._usage.problem if "_usage" in self.__dict__ else "")

    @cached_property
    def _usage(self) -> Usage:
        from localmoe.experts.usage import Usage

        ops = expert_ops(self.network.program(1))
        return Usage(self.source, len(ops), max(op.weights[0].shape[0] for op in ops))

    @cached_property
    def _history(self) -> History:
        """What is known of the experts' use, when somebody counts it."""
        ops = expert_ops(self.network.program(1))
        shape = len(ops), max(op.weights[0].shape[0] for op in ops)
        return History(*shape, self._usage.prior if self._learned else None)

    def _learn(self) -> None:
        if self._learned and "_history" in self.__dict__:
            self._usage.learn(self._history.uses)
            self._learned = False  # whoever closes twice learns once

    @property
    def name(self) -> str:
        path = self.source.path
        return str(self.metadata.get("general.name") or path.stem or path.name)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Built when first asked for. Raises TokenizerError, and FileFormatError where the file has changed."""
        from localmoe.tokenizer import Tokenizer

        self._soundness.begin()
        folder = self.source.tokenizer_folder
        made = Tokenizer.from_folder(folder) if folder else Tokenizer.from_gguf(self.metadata)
        self._soundness.check()
        return made

    @property
    def has_template(self) -> bool:
        """Whether the file has a chat template; it is not compiled for this."""
        source = self.metadata.get("tokenizer.chat_template")
        return isinstance(source, str) and bool(source.strip())

    @cached_property
    def template(self) -> Template | None:
        """The model's own chat template, if the file has one. Raises TemplateError when it does not parse."""
        if not self.has_template:
            return None
        source = self.metadata["tokenizer.chat_template"]
        token, bos, eos = self.tokenizer.token, self.tokenizer.bos, self.tokenizer.eos
        return Template(
            source, name="the model's own", bos="" if bos is None else token(bos), eos="" if eos is None else token(eos)
        )

    @property
    def reasoning(self) -> tuple[str, str] | None:
        """The markers around a reasoning block, when the template has them."""
        source = self.metadata.get("tokenizer.chat_template")
        return reasoning_markers(source) if isinstance(source, str) else None

    @property
    def recommended(self) -> dict[str, float | int]:
        """The sampling settings that the file itself recommends (`general.sampling.*`)."""
        return recommended(self.metadata)

    @property
    def score_chunk(self) -> int:
        """Tokens of a step that keeps all logits."""
        rows: int = SCORE_NBYTES // (4 * self.network.config.vocabulary)
        return min(self.chunk, max(SCORE_CHUNK, rows))

    def forward(
        self, tokens: Sequence[int], position: int, all_logits: bool = False, *, prompt: bool = False
    ) -> Floats:
        """Run tokens at cache positions position… -> logits of the last (1, V), or of all (T, V).

        One token by itself is a decoding step, whose inputs a device may round to 8 bits; as part of a `prompt` it runs
        as a chunk does, so that a prompt's bits do not depend on how it is cut or on what of it was cached. Where the
        recurrent states of that position are not kept, the tokens from the nearest ones on are run again (`resumes`).
        Raises DeviceError beyond the context, SettingError for ids outside the vocabulary, FileFormatError where a file
        has changed since it was opened, ReadError where a part of it could not be read: of that step nothing is kept.
        """
        assert position <= len(self.cached), "a hole in the cache"
        ids = np.asarray(tokens, np.int64)
        vocabulary = self.network.config.vocabulary
        if ids.size == 0 or ids.min() < 0 or ids.max() >= vocabulary:
            raise SettingError(f"token ids must be between 0 and {vocabulary - 1}, and at least one")
        if position + ids.size > self.context:
            raise DeviceError(
                f"{position + ids.size} tokens do not fit the context of {self.context}; open with a larger context"
            )
        if (start := self.resumes(position)) < position:
            self.forward(self.cached[start:position], start, prompt=True)
        # Forgotten before and remembered after: an interrupt in between leaves a list that is short, never wrong.
        del self.cached[position:]
        self._states.forget(position)
        self._shifted = None if self._shifted is None or position <= self._shifted else self._shifted
        step = self.score_chunk if all_logits else self.chunk
        decoding = ids.size == 1 and not all_logits and not prompt
        pieces = []
        for start in range(0, ids.size, step):
            piece = ids[start : start + step].astype(np.int32)
            self._soundness.begin()
            plan, at = self._plan(1 if decoding else step, all_rows=all_logits), position + start
            slots = self._states.begin(at, piece.size, marked=not decoding)
            begun = perf_counter()
            pieces.append(plan.run(piece, at, slots))
            self._running.step(perf_counter() - begun)
            self._soundness.check()
            self._states.finish(slots, at, piece.size)
            self.cached.extend(piece.tolist())
        return np.concatenate(pieces) if all_logits else pieces[-1]

    def resumes(self, position: int) -> int:
        """The last position, of those up to `position`, from which a step goes on without running any token again."""
        return self._states.nearest(position)

    @property
    def unshifted(self) -> int:
        """How many leading tokens of `cached` have the keys and values that reading them afresh gives."""
        return len(self.cached) if self._shifted is None else min(self._shifted, len(self.cached))

    @cached_property
    def shift_obstacle(self) -> str:
        """Why `shift` is not possible with this model, in words; empty where it is."""
        return obstacle(self.network.program(1), cache_format(self.kv_format))

    def shift(self, start: int, stop: int) -> None:
        """Take the tokens start:stop out of `cached`: later ones move down with the keys and values that they have, the
        keys turned to the new positions, and no token runs again.

        What they took from the tokens that went stays in them: what follows is near to what reading them afresh gives,
        and not the same. The first tokens must stay, as attention rests on them (Xiao et al. 2023, StreamingLLM); so
        `start` is best behind the system prompt. After an interrupt the tokens before `start` are left. Raises
        SettingError where there is a `shift_obstacle`, and for a range that is not cached.
        """
        program, end, kept = self.network.program(1), len(self.cached), self.cached[stop:]
        refuse(program, cache_format(self.kv_format), self.name, start, stop, end)
        self._shifted = min(start, self.unshifted)
        del self.cached[start:]
        self.device.shift(program, start, stop, end)
        self.cached.extend(kept)

    def watch(self, tokens: Sequence[int], see: Watcher) -> Floats:
        """All logits (T, V) of a text that starts at position 0; `see` hears of every op, piece by piece."""
        del self.cached[:]
        self._states.forget(0)
        self._shifted = None
        pieces = []
        for start in range(0, len(tokens), self.score_chunk):
            piece = np.asarray(tokens[start : start + self.score_chunk], np.int32)
            self._soundness.begin()
            pieces.append(self._plan(self.score_chunk, all_rows=True).watch(piece, start, see))
            self._soundness.check()
            self.cached.extend(piece.tolist())
        return np.concatenate(pieces)

    @property
    def cache_state(self) -> CacheState:
        """What stands in the cache as bytes, to be kept elsewhere and put back; not to be held longer than the model is
        open."""
        return CacheState(*self.device.cache_bytes(self.network.program(1)), self.cached, self._states)

    def wait_for_weights(self) -> None:
        """Returns when all weights that are read ahead have been read, so that nothing else runs beside a step."""
        self._prefault.wait()

    def close(self) -> None:
        """Stop the device's threads and free the cache."""
        self._prefault.stop()
        self.cached.clear()
        self._states.clear()
        self._plans.clear()
        self._made.clear()
        self._running.close()
        if self._trace:
            self._trace.close()
        self._learn()
        self.device.close()
        self._soundness.close()

    def _plan(self, tokens: int, *, all_rows: bool) -> Plan:
        key = (tokens, all_rows)
        if key not in self._plans:
            program = self.network.program(tokens, all_rows=all_rows)
            plan = self.device.compile(program, self._running.experts)
            self._soundness.check()  # before anyone uses the norms and biases that it has copied
            self._plans[key] = plan
        return self._plans[key]
