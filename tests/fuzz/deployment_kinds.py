"""Kinds of input that are files of a deployment, under their old seal or a new one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from fuzz.deployed import Deployed, ask, manifest_text, seal_text
from fuzz.kind import Files, Kind
from fuzz.mutations import dump_json, mutate_bytes, mutate_json, mutate_safetensors, mutate_text, mutate_value, pick
from fuzz.outcomes import Outcome, digest, observe
from fuzz.protobuf import mutate_protobuf
from fuzz.words import TEMPLATE_WORDS
from numpy.random import Generator

from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.runtime.storage.manifest_io import read_manifest


class _InDeployment(Kind):
    """A file of a deployment, with the seal renewed."""

    deployment: ClassVar[str] = "text"
    images: ClassVar[list[str] | None] = None

    @cached_property
    def deployed(self) -> Deployed:
        return Deployed(self.corpus / self.deployment / "deployment", self.work / self.deployment)

    @cached_property
    def paths(self) -> list[str]:
        return sorted(read_manifest(self.corpus / self.deployment / "deployment").files)

    def original(self, path: str) -> bytes:
        return self.read(f"{self.deployment}/deployment/{path}")

    def ask(self) -> dict[str, Any]:
        return ask(self.deployed.folder, self.images and [self.read(path) for path in self.images])

    @cached_property
    def expected(self) -> str:
        return digest(self.ask())

    def use(self, files: Files) -> Outcome:
        expected = self.expected
        with self.deployed.exchanged(files, is_sealed=True):
            return observe(self.ask, expected)


class FileOfADigest(_InDeployment):
    """Any file of a deployment, not sealed again: a single changed byte must be refused."""

    name, weight = "file", 6

    def make(self, rng: Generator) -> Files:
        path = pick(rng, self.paths)
        return {path: mutate_bytes(rng, self.original(path))}

    def use(self, files: Files) -> Outcome:
        expected = self.expected
        is_changed = any(data != self.original(path) for path, data in files.items())
        with self.deployed.exchanged(files, is_sealed=False):
            return observe(self.ask, expected, is_vouched=is_changed)


class RawManifest(_InDeployment):
    """``manifest.json`` under its old digest."""

    name, weight = "manifest", 6

    def make(self, rng: Generator) -> Files:
        return {MANIFEST_FILE: mutate_json(rng, self.original(MANIFEST_FILE))}

    def use(self, files: Files) -> Outcome:
        expected = self.expected
        is_changed = files[MANIFEST_FILE] != self.original(MANIFEST_FILE)
        with self.deployed.exchanged(files, is_sealed=False):
            return observe(self.ask, expected, is_vouched=is_changed)


class SealedManifest(_InDeployment):
    """``manifest.json`` with one to three other fields, under a digest that fits."""

    name, weight = "manifest-sealed", 8

    def make(self, rng: Generator) -> Files:
        manifest = json.loads(self.original(MANIFEST_FILE))
        for _ in range(int(rng.integers(1, 4))):
            try:
                mutate_value(rng, manifest)
            except (KeyError, IndexError, TypeError):
                continue
        text = dump_json({**manifest, "digest": ""}, indent=2, sort_keys=False)
        return {MANIFEST_FILE: seal_text(text) if text != b"null" else manifest_text({})}

    def use(self, files: Files) -> Outcome:
        expected = self.expected
        with self.deployed.exchanged(files, is_sealed=False):
            return observe(self.ask, expected)


class VisionManifest(SealedManifest):
    """The same of a deployment that takes images."""

    name, weight, deployment = "manifest-vision", 3, "vision"
    images: ClassVar[list[str] | None] = ["images/picture.png"]


class Tensors(_InDeployment):
    """The embedding table or the weights of a task."""

    name, weight = "safetensors", 6

    def make(self, rng: Generator) -> Files:
        path = pick(rng, [path for path in self.paths if path.endswith(".safetensors")])
        return {path: mutate_safetensors(rng, self.original(path))}


class Graphs(_InDeployment):
    """The base's graph or that of the adapters."""

    name, weight = "onnx", 6

    def make(self, rng: Generator) -> Files:
        used = [path for path in self.paths if path.endswith(".onnx") and not path.startswith("tasks/")]
        path = pick(rng, used)
        return {path: mutate_protobuf(rng, self.original(path))}


class TaskGraph(Kind):
    """The graph of a task, as export checks it."""

    name, weight = "task-graph", 6
    path = "text/deployment/tasks/beta/adapter.onnx"

    def make(self, rng: Generator) -> Files:
        return {"adapter.onnx": mutate_protobuf(rng, self.read(self.path))}

    @staticmethod
    def run(graph: bytes) -> Any:
        from adalink.export.adapter.session import OpenGraph

        return OpenGraph(graph, "float32").run(np.ones((1, 3, 48)), {})

    @cached_property
    def expected(self) -> str:
        return digest(self.run(self.read(self.path)))

    def use(self, files: Files) -> Outcome:
        def run() -> Any:
            found = self.run(files["adapter.onnx"])
            return np.nan_to_num(found)  # numbers that are not finite: it is export that compares them

        return observe(run, self.expected)


class Tokenizers(_InDeployment):
    """``tokenizer.json``."""

    name, weight = "tokenizer", 5

    def make(self, rng: Generator) -> Files:
        return {"base/tokenizer.json": mutate_json(rng, self.original("base/tokenizer.json"))}


class Templates(_InDeployment):
    """The chat template."""

    name, weight = "template", 5

    def make(self, rng: Generator) -> Files:
        path = "base/chat_template.jinja"
        return {path: mutate_text(rng, self.original(path), TEMPLATE_WORDS, b"}")}


class VisionFiles(_InDeployment):
    """The preprocessor, the tower's graph or its config."""

    name, weight, deployment = "preprocessor", 4, "vision"
    images: ClassVar[list[str] | None] = ["images/picture.png"]

    def make(self, rng: Generator) -> Files:
        path = pick(rng, [path for path in self.paths if path.startswith("base/vision/")])
        mutate: Callable[[Generator, bytes], bytes] = mutate_json if path.endswith(".json") else mutate_protobuf
        return {path: mutate(rng, self.original(path))}
