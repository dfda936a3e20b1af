"""Kinds of input that the kit reads from elsewhere: adapters, PEFT folders, checkpoints, GGUF files, pictures."""

from __future__ import annotations

import zlib
from functools import cached_property
from typing import Any

import numpy as np
from fuzz.kind import Files, Kind, write_files
from fuzz.mutations import mutate_bytes, mutate_json, mutate_safetensors, pick
from fuzz.outcomes import Outcome, digest, observe, require
from numpy.random import Generator

from adalink.runtime.storage.manifest_io import read_manifest


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


class Checkpoints(Kind):
    """A Hugging Face folder: config, tokenizer, weights."""

    name, weight = "hf", 2

    @cached_property
    def whole(self) -> Files:
        return {path.name: path.read_bytes() for path in sorted((self.corpus / "hf").iterdir()) if path.is_file()}

    def make(self, rng: Generator) -> Files:
        files = dict(self.whole)
        name = pick(rng, sorted(files))
        mutate = (
            mutate_json
            if name.endswith(".json")
            else mutate_safetensors
            if name.endswith(".safetensors")
            else mutate_bytes
        )
        files[name] = mutate(rng, files[name])
        return files

    def ask(self, files: Files) -> Any:
        from adalink.training.models.loading import base_fingerprint, load_base, load_tokenizer

        folder = write_files(self.work / "hf", files)
        model = load_base(folder)
        tokenizer = load_tokenizer(folder)
        return base_fingerprint(model), _logits(model), list(tokenizer("ab")["input_ids"])

    @cached_property
    def expected(self) -> str:
        return digest(self.ask(self.whole))

    def use(self, files: Files) -> Outcome:
        return observe(lambda: self.ask(files), self.expected)


class GgufFiles(Kind):
    """A GGUF file."""

    name, weight = "gguf", 2

    def make(self, rng: Generator) -> Files:
        data = self.read("model.gguf")
        head = data.find(b"token_embd.weight") + 1000
        if rng.integers(4):
            return {"model.gguf": mutate_bytes(rng, data[:head]) + data[head:]}
        return {"model.gguf": mutate_bytes(rng, data)}

    def ask(self, files: Files) -> Any:
        from adalink.training.models.loading import base_fingerprint, load_base

        model = load_base(write_files(self.work / "gguf", files) / "model.gguf")
        return base_fingerprint(model), _logits(model)

    @cached_property
    def expected(self) -> str:
        return digest(self.ask({"model.gguf": self.read("model.gguf")}))

    def use(self, files: Files) -> Outcome:
        return observe(lambda: self.ask(files), self.expected)


def _logits(model: Any) -> Any:
    """Logits of one row; those that are not finite are export's to refuse, not loading's."""
    import torch

    with torch.no_grad():
        found = model(input_ids=torch.tensor([[3, 4, 5]]).clamp(max=model.get_input_embeddings().weight.shape[0] - 1))
    # A config that names no causal model gives the bare one, which export then refuses.
    return np.nan_to_num(getattr(found, "logits", found[0]).float().numpy())
