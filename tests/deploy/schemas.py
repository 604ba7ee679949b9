"""Strict checks of manifests without a cluster: a field that a schema doesn't name is an error, as on the server."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}


def record(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def list_of(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def one_of(*names: str) -> Schema:
    return {"enum": list(names)}


LABELS: Schema = {"type": "object", "additionalProperties": TEXT}
SELECTOR = record(matchLabels=LABELS)
PORTS = list_of(
    record(("protocol", "port"), protocol=one_of("TCP", "UDP"), port={"type": ["integer", "string"]})
)
PEERS = list_of(record(podSelector=SELECTOR, namespaceSelector=SELECTOR))

# The fields of the plain kinds that we use, by the Kubernetes and Prometheus operator's references.
PLAIN: dict[tuple[str, str], Schema] = {
    ("v1", "PersistentVolumeClaim"): record(
        ("accessModes", "resources"),
        accessModes=list_of(one_of("ReadWriteOnce", "ReadWriteMany")),
        resources=record(("requests",), requests=record(("storage",), storage=TEXT)),
        storageClassName=TEXT,
    ),
    ("networking.k8s.io/v1", "NetworkPolicy"): record(
        ("podSelector", "policyTypes"),
        podSelector=SELECTOR,
        policyTypes=list_of(one_of("Ingress", "Egress")),
        ingress=list_of(record(ports=PORTS, **{"from": PEERS})),
        egress=list_of(record(to=PEERS, ports=PORTS)),
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): record(
        ("selector", "podMetricsEndpoints"),
        selector=SELECTOR,
        podMetricsEndpoints=list_of(
            record(
                ("port",),
                port=TEXT,
                interval=TEXT,
                relabelings=list_of(record(sourceLabels=list_of(TEXT), targetLabel=TEXT)),
                metricRelabelings=list_of(
                    record(sourceLabels=list_of(TEXT), regex=TEXT, action=one_of("keep", "drop"))
                ),
            )
        ),
    ),
}


def plain_schemas() -> dict[tuple[str, str], Schema]:
    return {kind: _whole(spec) for kind, spec in PLAIN.items()}


@cache
def crd_schemas(folder: Path) -> dict[tuple[str, str], Schema]:
    """(apiVersion, kind) → strict schema, of every custom resource definition in a folder."""
    schemas = {}
    for path in sorted(folder.glob("*.yaml")):
        # libyaml's loader: these files have tens of thousands of lines.
        crd = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)["spec"]
        for version in crd["versions"]:
            spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
            schemas[f"{crd['group']}/{version['name']}", crd["names"]["kind"]] = _whole(_strict(spec))
    return schemas


def errors(document: dict[str, Any], schemas: dict[tuple[str, str], Schema]) -> list[str]:
    """What is wrong with a manifest, each as path: message. An unknown kind is wrong."""
    kind = document["apiVersion"], document["kind"]
    if kind not in schemas:
        return [f"no schema for {kind}"]
    found = jsonschema.Draft4Validator(schemas[kind]).iter_errors(document)
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in found]


def _whole(spec: Schema) -> Schema:
    metadata = record(("name",), name=TEXT, labels=LABELS)
    return record(
        ("apiVersion", "kind", "metadata", "spec"), apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec
    )


def _strict(schema: Any) -> Any:
    """Kubernetes' dialect in JSON Schema's terms, with unknown fields refused wherever fields are named."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not open_ended:
        schema["additionalProperties"] = False
    return schema
