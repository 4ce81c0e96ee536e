"""The published JSON schema of ``report.json``, made of the dataclasses that it holds."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from detr_conformance import findings
from detr_conformance.report.files import FORMAT

NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}


def schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12. A number that is not finite is one of "nan", "inf" and "-inf"."""
    definitions: dict[str, Any] = {}
    of = _type(findings.Report, definitions)
    said = {"verdict": {"enum": list(findings.WORDS)}, "conformant": {"type": "boolean"}}
    report = definitions["Report"]
    report["properties"] = {**said, "complete": {"type": "boolean"}, **report["properties"]}
    report["required"] = [*said, "complete", *report["required"]]
    definitions["Finding"]["properties"]["verdict"] = {"enum": list(findings.VERDICTS)}
    properties = {
        "format": {"const": FORMAT},
        "written": {"type": "string", "description": "ISO 8601"},
        "complete": {"type": "boolean", "description": "false where a check that was asked for was not reached"},
        "reports": {"type": "array", "items": of, "description": "one a candidate"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": FORMAT,
        "title": "What detr-conformance found out about criterions",
        **_object(properties, list(properties)),
        "$defs": definitions,
    }


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _type(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of an annotated type; dataclasses go into ``definitions``."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if dataclasses.is_dataclass(hint):
        name = hint.__name__  # type: ignore[union-attr]
        if name not in definitions:
            definitions[name] = {}
            hints = typing.get_type_hints(hint)
            properties = {f.name: _type(hints[f.name], definitions) for f in dataclasses.fields(hint)}
            words = " ".join((hint.__doc__ or "").split())
            definitions[name] = {"description": words, **_object(properties, list(properties))}
        return {"$ref": f"#/$defs/{name}"}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type(i, definitions) for i in inner]}
    if origin in (list, tuple):
        if origin is tuple and inner[-1] is not ...:
            items = [_type(i, definitions) for i in inner]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "items": _type(inner[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(inner[1], definitions)}
    known: dict[Any, dict[str, Any]] = {
        str: {"type": "string"},
        bool: {"type": "boolean"},
        int: {"type": "integer"},
        float: NUMBER,
        type(None): {"type": "null"},
    }
    return known[hint]
