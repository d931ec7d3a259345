"""The models of a chat: the one that answers, and those that it left and may come back to; draws nothing, knows no
session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from localmoe.engine import KeptState
from localmoe.errors import DeviceError
from localmoe.experts.loading import Loading
from localmoe.repl.residency import ResidentModel
from localmoe.session import ChatModel

KEPT = 2  # models besides the one that answers: their weights are pages of files, their KV caches are memory


class OpenedModel(ChatModel, ResidentModel, Protocol):
    """What a session talks with, its weights somewhere."""

    @property
    def path(self) -> Path: ...
    @property
    def architecture(self) -> str: ...


class Kept(KeptState, Protocol):
    """What keeps a model's KV state on disk."""

    def take_messages(self) -> list[str]: ...
    def forget(self, tokens: Sequence[int]) -> int: ...
    def prepare(self) -> None: ...
    def close(self) -> None: ...


Load = Callable[[Path, Loading], OpenedModel]
Keep = Callable[[OpenedModel], Kept | None]


class OpenModels:
    """`current` answers; others stay open until there are more than KEPT, or memory is needed."""

    def __init__(
        self,
        current: OpenedModel,
        load: Load,
        keep: Keep = lambda model: None,
        opening: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`load` opens a model, its weights loaded as it is told; raises LocalMoeError. `keep` gives what keeps its KV
        state. `opening` is how all of them are opened, as far as someone asked."""
        self.opening = opening
        self.current = current
        self._load, self._keep = load, keep
        self._states: dict[int, Kept | None] = {}  # by the id of a model that is open
        self._kept: dict[Path, OpenedModel] = {}

    @property
    def all(self) -> list[OpenedModel]:
        """Those that are open, the one that answers first."""
        return [self.current, *self._kept.values()]

    def kept(self, model: OpenedModel) -> Kept | None:
        """What keeps the KV state of a model that is open."""
        if id(model) not in self._states:
            self._states[id(model)] = self._keep(model)
        return self._states[id(model)]

    def open(self, path: Path) -> OpenedModel:
        """A model that was left, as it was, else a new one; `current` goes on until `take`. Raises LocalMoeError."""
        key = _key(path)
        if key == _key(self.current.path):
            return self.current
        if key not in self._kept:
            self._close_all_but(KEPT)  # those that could not take over count as well
            asked = self.current.loading
            loading = Loading(memory=asked.memory, policy=asked.policy, learned=asked.learned)
            try:
                self._kept[key] = self._load(path, loading)
            except DeviceError:
                if not self._kept:
                    raise
                self._close_all_but(0)
                self._kept[key] = self._load(path, loading)
        return self._kept[key]

    def take(self, model: OpenedModel) -> None:
        """`model`, which `open` gave, answers from now on; the one before stays open where nothing bounds its
        memory."""
        if model is self.current:
            return
        before, self.current = self.current, model
        self._kept = {key: other for key, other in self._kept.items() if other is not model}
        if before.residency_mode == "slots" or before.loading.memory is not None:
            self.close_one(before)
        else:
            self._kept[_key(before.path)] = before
        self._close_all_but(KEPT)

    def reopen(self) -> OpenedModel:
        """The current model opened once more, beside the old one. Raises LocalMoeError."""
        return self._load(self.current.path, replace(self.current.loading, trace=None))

    def replace(self, model: OpenedModel) -> None:
        """`model`, which `reopen` gave, answers from now on; the old one is closed."""
        before, self.current = self.current, model
        self.close_one(before)

    def close_one(self, model: OpenedModel) -> None:
        """Close a model, its state first."""
        if kept := self._states.pop(id(model), None):
            kept.close()
        model.close()

    def close(self) -> None:
        self._close_all_but(0)
        self.close_one(self.current)

    def _close_all_but(self, count: int) -> None:
        """Of the models that were left, the newest stay."""
        while len(self._kept) > count:
            self.close_one(self._kept.pop(next(iter(self._kept))))


def _key(path: Path) -> Path:
    return path.expanduser().resolve()
