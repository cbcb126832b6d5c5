"""The documents made from the message types: complete, consistent, and true to what the code validates."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
from twisted.trial.unittest import SynchronousTestCase

from commsmgr import messages

DOCS = Path(__file__).resolve().parent.parent / "docs"


def load() -> ModuleType:
    """Import the generator, which is part of the docs and not of the package."""
    spec = importlib.util.spec_from_file_location("commsmgr_documents", DOCS / "_ext" / "documents.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


documents = load()


def references(value: Any) -> Iterator[str]:
    """Yield every ``$ref`` in a document."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def resolve(document: Any, reference: str) -> Any:
    """Follow a reference within its document (RFC 6901)."""
    for part in reference.removeprefix("#/").split("/"):
        document = document[part.replace("~1", "/").replace("~0", "~")]
    return document


class Documents(SynchronousTestCase):
    """All three documents."""

    def test_written(self) -> None:
        """Three files of JSON are written, the same that the functions return."""
        directory = Path(self.mktemp())
        documents.write(directory)
        written = {path.name: json.loads(path.read_text("utf-8")) for path in directory.iterdir()}
        self.assertEqual(written, documents.documents())
        self.assertEqual(set(written), {"schema.json", "openapi.json", "asyncapi.json"})

    def test_references(self) -> None:
        """Every reference leads somewhere within its document."""
        for name, document in documents.documents().items():
            found = set(references(document))
            self.assertGreater(len(found), 5, name)
            for reference in found:
                self.assertTrue(reference.startswith("#/"), reference)
                self.assertIsInstance(resolve(document, reference), dict)

    def test_every_message_is_there(self) -> None:
        """Every message type of the code is among the definitions, with a description, and no markup is left in it."""
        definitions = documents.json_schema()["$defs"]
        kinds = {
            kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
        }
        in_hand = {messages.Command, messages.Result, messages.Push}  # the agent's own, never on the wire
        self.assertEqual(
            {kind.__name__ for kind in kinds - in_hand - {msgspec.Struct}}, set(definitions) - {"InventoryData"}
        )
        for name, schema in definitions.items():
            self.assertTrue(schema["description"], name)
            self.assertNotRegex(schema["description"], r":\w+:`|``")

    def test_no_hole(self) -> None:
        """Nothing that the code passes on unread is left as "anything" in the documents."""
        definitions = documents.schemas("#/$defs/")
        for name in ("Inventory", "ResultEnvelope"):
            self.assertIn("$ref", definitions[name]["properties"]["data"])
        self.assertIn("$ref", definitions["HeartbeatAnswer"]["properties"]["commands"]["items"])

    def test_patterns_are_portable(self) -> None:
        """Patterns are regular expressions that others can compile too."""
        text = json.dumps(documents.json_schema())
        for pattern in re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', text):
            re.compile(json.loads(pattern))

    def test_shown(self) -> None:
        """Each type is shown on the page in some group, and the words for its fields are words."""
        names = [name for group in (*documents.GROUPS, "parts") for name in documents.shown(group)]
        definitions = documents.schemas("#/$defs/")
        self.assertEqual(set(names), set(definitions))
        for schema in definitions.values():
            for field in schema["properties"].values():
                self.assertTrue(documents.in_words(field))
        self.assertEqual(documents.in_words({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/A"}]}), "null or A")
        self.assertEqual(documents.in_words({"type": "array", "items": {"enum": ["a"]}}), 'list of ``"a"``')


class Pages(SynchronousTestCase):
    """What the pages say of the repository."""

    def test_named_tests_exist(self) -> None:
        """Each module of tests that the threat model names is there."""
        named = re.findall(r"``(test_\w+)``", (DOCS / "threat-model.rst").read_text("utf-8"))
        self.assertGreater(len(named), 20)
        self.assertEqual([name for name in named if not (DOCS.parent / "tests" / f"{name}.py").is_file()], [])


class OpenAPI(SynchronousTestCase):
    """The HTTP side."""

    def test_shape(self) -> None:
        """What OpenAPI 3.1 requires is there: version, info, operations with responses, security that is defined."""
        document = documents.openapi()
        self.assertRegex(document["openapi"], r"^3\.1\.\d$")
        self.assertTrue(document["info"]["title"] and document["info"]["version"])
        self.assertEqual(set(document["paths"]), {"/heartbeat", "/inventory", "/commands/result"})
        names = set()
        for path in document["paths"].values():
            operation = path["post"]
            names.add(operation["operationId"])
            self.assertIn("application/json", operation["requestBody"]["content"])
            self.assertLessEqual({"200", "400", "401", "429", "503"}, set(operation["responses"]))
            for response in operation["responses"].values():
                response = resolve(document, response["$ref"]) if "$ref" in response else response
                self.assertTrue(response["description"])
        self.assertEqual(len(names), 3)
        for requirement in document["security"]:
            self.assertLessEqual(set(requirement), set(document["components"]["securitySchemes"]))
        self.assertIn("404", document["paths"]["/commands/result"]["post"]["responses"])


class AsyncAPI(SynchronousTestCase):
    """The WebSocket side."""

    def test_shape(self) -> None:
        """What AsyncAPI 3.0 requires is there: every operation has a channel and messages of that channel."""
        document = documents.asyncapi()
        self.assertEqual(document["asyncapi"], "3.0.0")
        self.assertTrue(document["info"]["title"] and document["info"]["version"])
        for server in document["servers"].values():
            self.assertTrue(server["host"] and server["protocol"])
        for operation in document["operations"].values():
            self.assertIn(operation["action"], ("send", "receive"))
            channel = operation["channel"]["$ref"]
            for message in operation["messages"]:
                self.assertTrue(message["$ref"].startswith(channel + "/messages/"))

    def test_directions(self) -> None:
        """Exactly the types that the code takes from a backend are received, and those that it sends are sent."""
        document = documents.asyncapi()

        def named(action: str) -> set[str]:
            return {name.removeprefix(action) for name in document["operations"] if name.startswith(action)}

        self.assertEqual(named("send"), {kind.__name__ for kind in messages.FromAgent.__args__})
        self.assertEqual(named("receive"), {kind.__name__ for kind in messages.FromBackend.__args__})

    def test_names_on_the_wire(self) -> None:
        """A message is named as its ``type`` says, and its schema demands that type."""
        document = documents.asyncapi()
        for message in document["components"]["messages"].values():
            schema = resolve(document, message["payload"]["$ref"])
            self.assertEqual(schema["properties"]["type"]["enum"], [message["name"]])
            self.assertIn("type", schema["required"])
