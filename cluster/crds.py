"""Kubernetes documents against their schemas: CRDs' OpenAPI v3, and small ones for core kinds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

Document = dict[str, Any]
Schemas = dict[tuple[str, str], dict[str, Any]]

# As Kubernetes' own pattern for quantities.
QUANTITY = r"^[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?$"

_METADATA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}},
}
CORE: dict[str, dict[str, Any]] = {
    "PersistentVolumeClaim": {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "v1"},
            "kind": {},
            "metadata": _METADATA,
            "spec": {
                "type": "object",
                "additionalProperties": False,
                "required": ["accessModes", "resources"],
                "properties": {
                    "accessModes": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "enum": [
                                "ReadWriteOnce",
                                "ReadWriteMany",
                                "ReadOnlyMany",
                                "ReadWriteOncePod",
                            ]
                        },
                    },
                    "storageClassName": {"type": "string"},
                    "volumeName": {"type": "string"},
                    "volumeMode": {"enum": ["Filesystem", "Block"]},
                    "resources": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["requests"],
                        "properties": {
                            "requests": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["storage"],
                                "properties": {"storage": {"type": "string", "pattern": QUANTITY}},
                            }
                        },
                    },
                },
            },
        },
    },
    "ConfigMap": {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata"],
        "properties": {
            "apiVersion": {"const": "v1"},
            "kind": {},
            "metadata": _METADATA,
            "data": {"type": "object", "additionalProperties": {"type": "string"}},
            "binaryData": {"type": "object", "additionalProperties": {"type": "string"}},
            "immutable": {"type": "boolean"},
        },
    },
}


def load_schemas(folder: Path) -> Schemas:
    """(apiVersion, kind) of every served version of every CRD in the folder -> JSON schema."""
    schemas: Schemas = {}
    for file in sorted(folder.glob("*.yaml")):
        # Megabytes: the C parser, where there is one, takes a tenth of the time.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        for crd in yaml.load_all(file.read_text(), Loader=loader):
            if not crd or crd.get("kind") != "CustomResourceDefinition":
                continue
            for version in crd["spec"]["versions"]:
                if version["served"]:
                    key = (
                        f"{crd['spec']['group']}/{version['name']}",
                        crd["spec"]["names"]["kind"],
                    )
                    schemas[key] = closed(version["schema"]["openAPIV3Schema"])
    return schemas


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI v3 schema as the JSON schema that finds what an API server drops or rejects.

    Fields that it does not name are errors (the server drops them silently), `nullable` and
    integers' formats become what they mean. Lists' keys and CEL rules: see `_extensions`.
    """
    kept = dict(schema)
    if "properties" in kept:
        kept["properties"] = {name: closed(part) for name, part in kept["properties"].items()}
        if not kept.get("x-kubernetes-preserve-unknown-fields"):
            kept.setdefault("additionalProperties", False)
    for name in ("items", "additionalProperties", "not"):
        if isinstance(kept.get(name), dict):
            kept[name] = closed(kept[name])
    for name in ("anyOf", "oneOf", "allOf"):
        if name in kept:
            kept[name] = [closed(part) for part in kept[name]]
    if kept.get("nullable") and "type" in kept:
        kept["type"] = [kept["type"], "null"]
    bits = {"int32": 31, "int64": 63}.get(kept.get("format", ""))
    if bits and kept.get("type") == "integer":
        kept.setdefault("minimum", -(2**bits))
        kept.setdefault("maximum", 2**bits - 1)
    return kept


def check_schema(document: Document, schemas: Schemas) -> list[str]:
    """What the document's schema has against it; each line names the field."""
    kind = document.get("kind", "")
    schema = schemas.get((document.get("apiVersion", ""), kind), CORE.get(kind))
    if schema is None:
        return [f"no schema for {document.get('apiVersion')} {kind}; known: {_known(schemas)}"]
    errors = [
        f"{'.'.join(map(str, error.absolute_path)) or 'document'}: {error.message[:300]}"
        for error in Draft7Validator(schema).iter_errors(document)
    ]
    return errors + list(_extensions(document, schema, ""))


def _known(schemas: Schemas) -> str:
    return ", ".join(sorted({*(f"{api} {kind}" for api, kind in schemas), *CORE}))


def _extensions(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    """What `x-kubernetes-*` ask for: lists without twins. CEL rules are not evaluated, so a value
    that has one is reported rather than passed."""
    if schema.get("x-kubernetes-validations"):
        yield f"{path}: has rules in CEL, which this program does not evaluate"
    if isinstance(value, dict):
        for name, part in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if isinstance(inner, dict):
                yield from _extensions(part, inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        kind = schema.get("x-kubernetes-list-type")
        keys = schema["x-kubernetes-list-map-keys"] if kind == "map" else []
        if kind in ("map", "set"):
            names = [
                json.dumps([item.get(key) for key in keys] if keys else item, sort_keys=True)
                for item in value
            ]
            for twin in sorted({name for name in names if names.count(name) > 1}):
                yield f"{path}: two entries with {', '.join(keys) or 'the value'} {twin}"
        for index, item in enumerate(value):
            yield from _extensions(item, schema["items"], f"{path}.{index}")
