"""All models on this machine, each once; knows places and layouts, and opens no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from localmoe.discovery.caches import huggingface_models, llama_cpp_models, ollama_models, published_models
from localmoe.discovery.folders import MODELS_LIMIT, Found, Walk, models_below
from localmoe.discovery.places import Place, usual_places


@dataclass(frozen=True, slots=True)
class Search:
    """What was found, in the order of the places, and what could not be looked at, in a line each."""

    models: list[Found]
    notes: list[str]


def search(places: Sequence[Place] | None = None) -> Search:
    """Models of `places`, by default the usual ones. A file that is found twice is listed once, under both names."""
    by_identity: dict[tuple[int, int], Found] = {}
    notes: list[str] = []
    for place in usual_places() if places is None else places:
        walk = Walk(notes, place.entries)
        for found in islice(_models(walk, place), MODELS_LIMIT):
            known = by_identity.setdefault(found.identity, found)
            if known is not found:
                by_identity[found.identity] = replace(known, names=known.names | found.names)
    return Search(list(by_identity.values()), notes)


def find_models(places: Sequence[Place] | None = None) -> list[Found]:
    """The models of `search`."""
    return search(places).models


def _models(walk: Walk, place: Place) -> Iterator[Found]:
    match place.layout:
        case "folder":
            return models_below(walk, place.path, place.title, place.depth)
        case "published":
            return published_models(walk, place.path, place.title, place.depth)
        case "Hugging Face":
            return huggingface_models(walk, place.path, place.title)
        case "ollama":
            return ollama_models(walk, place.path, place.title)
        case "llama.cpp":
            return llama_cpp_models(walk, place.path, place.title)
