"""What to say of a field that a job does not have: where one of that name stands, or the one that was meant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from quantry.requests import JobRequest

MOST = 3  # places that are named
ALIKE = 0.8  # of difflib: a letter or two wrong


def unknown_field(name: str) -> str:
    """A sentence for a name that is no field of the object it stands in."""
    places = _places()
    if name in places:
        return f"no field of this name here; there is {_listed(places[name])}"
    meant = [place for match in get_close_matches(name, places, MOST, ALIKE) for place in places[match]]
    return f"no such field; did you mean {_listed(meant)}?" if meant else "no such field"


def _listed(places: list[str]) -> str:
    return ", ".join(places[:MOST])


@cache
def _places() -> dict[str, list[str]]:
    """The fields of a job by name: their paths, a step of the recipe by its method, nearest to the top first."""
    schema = JobRequest.model_json_schema()
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(set(_paths(schema, schema["$defs"], "")), key=lambda path: (path.count("."), path)):
        found[path.rpartition(".")[2]].append(path)
    return found


def _paths(node: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[str]:
    if "$ref" in node:
        yield from _paths(definitions[node["$ref"].rpartition("/")[2]], definitions, prefix)
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _paths(choice, definitions, prefix)
    if "items" in node:
        yield from _paths(node["items"], definitions, prefix)
    properties = node.get("properties", {})
    if method := properties.get("method", {}).get("const"):
        prefix = f"{prefix}{method}."
    for name, child in properties.items():
        yield prefix + name
        yield from _paths(child, definitions, f"{prefix}{name}.")
