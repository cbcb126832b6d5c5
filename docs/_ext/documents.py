"""
The protocol as documents that machines read, made from the message types: JSON Schema, OpenAPI 3.1 and AsyncAPI 3.0.

Nothing here needs Sphinx, so that the tests can look at the documents without it.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec

from commsmgr import messages
from commsmgr._version import __version__

JSON = dict[str, Any]

FROM_AGENT: tuple[type[msgspec.Struct], ...] = get_args(messages.FromAgent)
FROM_BACKEND: tuple[type[msgspec.Struct], ...] = get_args(messages.FromBackend)
BODIES: tuple[type[msgspec.Struct], ...] = (
    messages.Heartbeat,
    messages.HeartbeatAnswer,
    messages.Inventory,
    messages.InventoryAnswer,
    messages.ResultBody,
)
GROUPS = {"bodies": BODIES, "from-agent": FROM_AGENT, "from-backend": FROM_BACKEND}
ALL = tuple(dict.fromkeys((*BODIES, *FROM_AGENT, *FROM_BACKEND)))

INVENTORY_DATA: JSON = {
    "title": "InventoryData",
    "description": "What the machine is. A source of the agent's own may add to it.",
    "type": "object",
    "properties": {
        "system": {
            "description": "hostname, platform, architecture, os_version, uptime (seconds)",
            "type": "object",
        },
        "hardware": {
            "description": "cpu {model, cores, usage}, memory {total, used, used_percent}, "
            "disk [{device, mountpoint, size, used, used_percent}]; sizes in bytes",
            "type": "object",
        },
        "software": {
            "description": "installed_applications, running_processes, running_services",
            "type": "object",
        },
        "network": {"description": "interfaces", "type": "object"},
    },
}


def documents() -> dict[str, JSON]:
    """Return all documents by file name."""
    return {"schema.json": json_schema(), "openapi.json": openapi(), "asyncapi.json": asyncapi()}


def schemas(prefix: str) -> JSON:
    """
    Return the JSON Schema of every message and of what they contain, by name.

    :param prefix: what stands before the name in a reference, such as ``#/$defs/``.
    """
    _, found = msgspec.json.schema_components(ALL, ref_template=prefix + "{name}")
    # What the code passes on as bytes has a shape all the same.
    found["InventoryData"] = INVENTORY_DATA
    found["Inventory"]["properties"]["data"] = {"$ref": f"{prefix}InventoryData"}
    found["ResultEnvelope"]["properties"]["data"] = {"$ref": f"{prefix}ResultBody"}
    found["HeartbeatAnswer"]["properties"]["commands"]["items"] = {"$ref": f"{prefix}CommandEnvelope"}
    for schema in found.values():
        schema["description"] = _plain(schema["description"])
    return found


def shown(group: str) -> tuple[str, ...]:
    """Return the names of the types to show under ``group``; ``parts`` are those that stand within messages."""
    if group == "parts":
        whole = {kind.__name__ for kind in ALL}
        return tuple(name for name in schemas("") if name not in whole)
    return tuple(kind.__name__ for kind in GROUPS[group])


def summary(kind: type[msgspec.Struct]) -> str:
    """Return the docstring of a message as one line, without Sphinx's markup."""
    return _plain(inspect.getdoc(kind) or "")


def _plain(text: str) -> str:
    text = " ".join(text.split())
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def json_schema() -> JSON:
    """Return one JSON Schema (2020-12) that has every type among its definitions."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Messages of commsmgr {__version__}",
        "description": "Fields that a receiver does not know are ignored.",
        "$defs": schemas("#/$defs/"),
    }


def openapi() -> JSON:
    """Return the HTTP side as an OpenAPI 3.1 document, from the backend's point of view."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Backend of commsmgr: HTTP",
            "version": __version__,
            "description": "What an agent asks of its backend. Redirects are never followed.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "https://backend.example/api", "description": "the base URL, as set in backends[].url"}],
        "security": [{"bearer": []}],
        "paths": {
            "/heartbeat": _post("heartbeat", "The agent lives", messages.Heartbeat, messages.HeartbeatAnswer),
            "/inventory": _post("inventory", "What the machine is", messages.Inventory, messages.InventoryAnswer),
            "/commands/result": _post("result", "What became of a command", messages.ResultBody, None),
        },
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "parameters": {
                "IdempotencyKey": {
                    "name": "Idempotency-Key",
                    "in": "header",
                    "required": True,
                    "description": "The id of the message. Whoever has seen it answers again and does nothing else.",
                    "schema": {"type": "string", "maxLength": 200},
                }
            },
            "responses": {
                "Refused": {
                    "description": "Wrong for good: it is not sent again.",
                },
                "Unauthorized": {"description": "The token is wrong: another one is fetched, then tried slowly."},
                "Later": {
                    "description": "Not now: it is sent again after Retry-After, or else after a while.",
                    "headers": {
                        "Retry-After": {
                            "description": "seconds or a date (RFC 9110 section 10.2.3), obeyed up to a cap",
                            "schema": {"type": "string"},
                        }
                    },
                },
            },
            "schemas": schemas("#/components/schemas/"),
        },
    }


def _post(name: str, text: str, body: type[msgspec.Struct], answer: type[msgspec.Struct] | None) -> JSON:
    def content(kind: type[msgspec.Struct]) -> JSON:
        return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}

    accepted: JSON = {"description": "Taken: for the agent this is the receipt."}
    if answer is not None:
        accepted["content"] = content(answer)
    responses: JSON = {"200": accepted}
    responses |= {code: {"$ref": "#/components/responses/Refused"} for code in ("400", "413", "422")}
    if body is messages.ResultBody:
        responses["404"] = {"description": "The command is not known here; the result is not sent again."}
    responses["401"] = {"$ref": "#/components/responses/Unauthorized"}
    responses |= {code: {"$ref": "#/components/responses/Later"} for code in ("429", "503")}
    return {
        "post": {
            "operationId": name,
            "summary": text,
            "parameters": [{"$ref": "#/components/parameters/IdempotencyKey"}],
            "requestBody": {"required": True, "content": content(body)},
            "responses": dict(sorted(responses.items())),
        }
    }


def asyncapi() -> JSON:
    """Return the WebSocket side as an AsyncAPI 3.0 document, from the agent's point of view."""
    kinds = dict.fromkeys((*FROM_AGENT, *FROM_BACKEND))
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "commsmgr: WebSocket",
            "version": __version__,
            "description": "One JSON object per text message, in UTF-8. The subprotocol commsmgr.v1 is offered; a "
            "backend that does not select it speaks the plain dialect, without ack, nack, goaway, settings and "
            "loss receipts.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "backend": {
                "host": "backend.example",
                "pathname": "/api",
                "protocol": "wss",
                "description": "as set in backends[].url or backends[].websocket_url",
                "security": [{"$ref": "#/components/securitySchemes/bearer"}],
            }
        },
        "channels": {
            "websocket": {
                "address": "/ws",
                "servers": [{"$ref": "#/servers/backend"}],
                "messages": {kind.__name__: {"$ref": f"#/components/messages/{kind.__name__}"} for kind in kinds},
            }
        },
        "operations": {
            f"{action}{kind.__name__}": {
                "action": action,
                "channel": {"$ref": "#/channels/websocket"},
                "summary": summary(kind),
                "messages": [{"$ref": f"#/channels/websocket/messages/{kind.__name__}"}],
            }
            for action, group in (("send", FROM_AGENT), ("receive", FROM_BACKEND))
            for kind in group
        },
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "messages": {
                kind.__name__: {
                    "name": kind.__struct_config__.tag,
                    "title": kind.__name__,
                    "summary": summary(kind),
                    "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
                }
                for kind in kinds
            },
            "schemas": schemas("#/components/schemas/"),
        },
    }


def write(directory: Path) -> None:
    """Write all documents into ``directory``, which is made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, document in documents().items():
        (directory / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")


def in_words(schema: JSON) -> str:
    """Say in a few words what a schema allows."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(in_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"``{json.dumps(value)}``" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {in_words(schema.get('items', {}))}"
    limits = [
        f"{words} {schema[key]:,}".replace(",", " ")
        for key, words in (
            ("minimum", "from"),
            ("maximum", "to"),
            ("minLength", "at least"),
            ("maxLength", "at most"),
        )
        if key in schema
    ]
    return " ".join([kind, *limits]) + (f" ({schema['description']})" if "description" in schema else "")
