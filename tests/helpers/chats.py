"""A small deployment that chats, and conversations written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.runtime.storage.manifest_io import read_manifest

LENGTH, POSITIONS = 5, 256


def make_chat_deployment(root: Path, **settings: Any) -> Path:
    """A model of 256 positions with the tasks "alpha" and "beta", whose adapters lie beside the deployment."""
    model, folder = FAMILIES["mistral"](), root / "deployment"
    model.config.max_position_embeddings = POSITIONS  # its position embeddings are rotary, so there is no table of them
    export_base(model, folder, tokenizer=make_tokenizer(), **settings)
    fingerprint = read_manifest(folder).base.fingerprint
    for seed, task in enumerate(("alpha", "beta")):
        adapter = random_adapter(fingerprint, 48, seed, rank=4, activation="gelu", bias=True, scope="all")
        export_adapter(write_adapter(root / task, adapter), folder)
    return folder


class Reference:
    """The conversation written out: the whole of it is generated anew at each turn."""

    def __init__(self, folder: Path, system: str | None = None) -> None:
        self.folder, self.messages = folder, list[dict[str, str]]()
        self.say("system", system)

    def say(self, role: str, content: str | None) -> None:
        if content is not None:
            self.messages.append({"role": role, "content": content})

    def reply(self, text: str, task: str | None = None, **settings: Any) -> str:
        self.say("user", text)
        with Deployment.open(self.folder) as deployment:
            settings = {"max_new_tokens": LENGTH} | settings
            reply = deployment.generate(messages=self.messages, tasks=task, **settings)[0].text
        self.say("assistant", reply)
        return reply
