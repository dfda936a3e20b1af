"""Kinds of input: how one is mutated, and what the kit is asked with it.

A kind's ``make`` needs the corpus alone, so that any process can make an input again from its seed.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from fuzz.deployed import Deployed, ask, manifest_text, seal_text
from fuzz.mutations import (
    dump_json,
    mutate_bytes,
    mutate_json,
    mutate_safetensors,
    mutate_text,
    mutate_value,
    pick,
)
from fuzz.outcomes import Outcome, digest, observe, require
from fuzz.protobuf import mutate_protobuf
from numpy.random import Generator

from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.runtime.storage.manifest_io import read_manifest

Files = dict[str, bytes]
KINDS: dict[str, type[Kind]] = {}


class Kind:
    """One kind of input.

    Attributes:
        name: of the kind, by which it is chosen.
        weight: share of the inputs.
    """

    name: ClassVar[str] = ""
    weight: ClassVar[int] = 1

    def __init__(self, corpus: Path, work: Path) -> None:
        self.corpus, self.work = corpus, work

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.name:
            KINDS[cls.name] = cls

    def make(self, rng: Generator) -> Files:
        """The mutated files by relative path."""
        raise NotImplementedError

    def use(self, files: Files) -> Outcome:
        """Ask the kit with them."""
        raise NotImplementedError

    def read(self, path: str) -> bytes:
        return (self.corpus / path).read_bytes()


def generator_of(kind: str, seed: int) -> Generator:
    return np.random.default_rng([zlib.crc32(kind.encode()), seed])


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


_TEMPLATE_WORDS = (
    "{% break %}", "{% for x in range(10) %}", "{% endfor %}", "{{ messages }}", "{{ '\\ud800' }}", "{{ 1/0 }}", "{{ ''[9] }}",
    "{{ messages[5].x }}", "{{ ''.__class__.__mro__ }}", "{{ self }}", "{% set a = a ~ a %}", "{{ 'a' * 100000000 }}",
    "{% for i in range(9999999) %}{% endfor %}", "{{ range(100000)|list|length }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ lipsum(n=1000) }}", "{{ cycler.__init__.__globals__ }}", "{% include 'x' %}", "{{ messages|tojson }}", "{{ bos_token }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ 10**10000 }}", "{{ 'x'|center(99999999) }}", "{% if", "%}", "{{",
    "{{ namespace().x }}", "{% continue %}", "{% generation %}x{% endgeneration %}", "{{ none.x }}", "{{ messages.append(1) }}",
)  # fmt: skip


class Templates(_InDeployment):
    """The chat template."""

    name, weight = "template", 5

    def make(self, rng: Generator) -> Files:
        path = "base/chat_template.jinja"
        return {path: mutate_text(rng, self.original(path), _TEMPLATE_WORDS, b"}")}


class VisionFiles(_InDeployment):
    """The preprocessor, the tower's graph or its config."""

    name, weight, deployment = "preprocessor", 4, "vision"
    images: ClassVar[list[str] | None] = ["images/picture.png"]

    def make(self, rng: Generator) -> Files:
        path = pick(rng, [path for path in self.paths if path.startswith("base/vision/")])
        mutate: Callable[[Generator, bytes], bytes] = mutate_json if path.endswith(".json") else mutate_protobuf
        return {path: mutate(rng, self.original(path))}


class Images(Kind):
    """An image file of each format, in a prompt."""

    name, weight = "image", 10

    def make(self, rng: Generator) -> Files:
        path = pick(rng, sorted((self.corpus / "images").iterdir()))
        data = path.read_bytes()
        if path.suffix == ".png" and rng.integers(3) == 0:
            size = int(rng.choice([0, 1, 2**15, 2**31 - 1, 2**32 - 1])).to_bytes(4, "big")
            place = int(rng.choice([16, 20]))
            header = data[12:16] + (data[16:place] + size + data[place + 4 : 29])
            return {path.name: data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]}
        return {path.name: mutate_bytes(rng, data)}

    @cached_property
    def opened(self) -> Any:
        from adalink.runtime.deployment import Deployment

        return Deployment.open(self.corpus / "vision" / "deployment", threads=1)

    def ask(self, data: bytes) -> Any:
        row = self.opened.generate(["@a"], images=[[data]], max_new_tokens=2)[0]
        return row.text, list(row.token_ids)

    @cached_property
    def expected(self) -> str:
        return digest(self.ask(self.read("images/picture.png")))

    def use(self, files: Files) -> Outcome:
        (data,) = files.values()
        return observe(lambda: self.ask(data), self.expected)


class Adapters(Kind):
    """An adapter folder, added to an open deployment and run."""

    name, weight = "adapter", 10
    source = "text/adapters/beta"

    def make(self, rng: Generator) -> Files:
        files = {
            name: self.read(f"{self.source}/{name}") for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        name = pick(rng, sorted(files))
        files[name] = (mutate_json if name.endswith(".json") else mutate_safetensors)(rng, files[name])
        return files

    @cached_property
    def opened(self) -> Any:
        from adalink.runtime.deployment import Deployment

        return Deployment.open(self.corpus / "text" / "deployment", threads=1)

    def ask(self, files: Files) -> Any:
        folder = write_files(self.work / "adapter", files)
        self.opened.add_task(folder, "mutated")
        try:
            return np.asarray(self.opened.run(input_ids=[[5, 6, 7]], tasks="mutated")["logits"])
        finally:
            self.opened.remove_task("mutated")

    @cached_property
    def expected(self) -> str:
        return digest(self.ask({path.name: path.read_bytes() for path in (self.corpus / self.source).iterdir()}))

    def use(self, files: Files) -> Outcome:
        return observe(lambda: self.ask(files), self.expected)


class PeftFolders(Kind):
    """A folder that PEFT wrote, converted for the base."""

    name, weight = "peft", 8

    def make(self, rng: Generator) -> Files:
        folder = self.corpus / "peft" / pick(rng, ("lora", "soft"))
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        name = pick(rng, sorted(files))
        files[name] = (mutate_json if name.endswith(".json") else mutate_safetensors)(rng, files[name])
        return files

    @cached_property
    def base(self) -> Any:
        return read_manifest(self.corpus / "text" / "deployment").base

    def ask(self, files: Files) -> Any:
        from adalink.export.adapter.peft import convert_peft
        from adalink.runtime.storage.adapter import read_folder

        config, weights = read_folder(write_files(self.work / "peft", files))
        adapter = convert_peft(config, weights, self.base, "folder", assume_base=True)
        require(adapter.digest.startswith("sha256:"), f"digest {adapter.digest}")
        return adapter.digest, dict(adapter.weights)

    @cached_property
    def expected(self) -> set[str]:
        folders = [self.corpus / "peft" / name for name in ("lora", "soft")]
        return {digest(self.ask({path.name: path.read_bytes() for path in folder.iterdir()})) for folder in folders}

    def use(self, files: Files) -> Outcome:
        found = observe(lambda: self.ask(files), None)
        if found.kind == "accepted" and digest(self.ask(files)) in self.expected:
            return Outcome("same")
        return found


def write_files(folder: Path, files: Files) -> Path:
    """Write a folder anew with these files alone."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder
