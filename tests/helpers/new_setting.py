"""A process in which ``AdapterSpec`` has one more line; prints, as JSON, where the new setting has arrived.

Run as ``python -m helpers.new_setting FOLDER``: classes are made when they are imported, so no test can do it in place.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from helpers.paths import REPOSITORY

MODULE = "adalink.runtime.storage.adapter_spec"
LAST = '    input: str = "embeddings"\n'
NEW = "    flavour: int = 0\n"


class OneMoreLine(MetaPathFinder, Loader):
    """Loads the module of ``AdapterSpec`` with the new line, whoever imports it first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == MODULE else None

    def exec_module(self, module: ModuleType) -> None:
        source = (REPOSITORY / "runtime" / "storage" / "adapter_spec.py").read_text()
        assert source.count(LAST) == 1
        exec(source.replace(LAST, LAST + NEW), module.__dict__)


def arrivals(root: Path, flavour: int) -> dict[str, object]:
    """Train nothing, but save, load, export and describe an adapter with that setting."""
    import onnx
    from helpers.tiny_models import FAMILIES

    from adalink.export.adapter.export import export_adapter
    from adalink.runtime.storage.adapter import read_adapter
    from adalink.tools.commands.inspect import describe
    from adalink.tools.parity.checks.adapter import check_contract
    from adalink.training.adapter_io import load_adapter, save_adapter, to_adapter
    from adalink.training.method.attach import attach
    from adalink.training.method.config import AdaLinkConfig

    model, folder, deployment = FAMILIES["llama"](), root / str(flavour), root / "deployment"
    config = AdaLinkConfig(rank=2, flavour=flavour)
    with attach(model, config) as attached:
        save_adapter(folder, to_adapter(attached, "tiny"))
    with load_adapter(folder, model) as attached:
        loaded = attached.config.flavour
    task = export_adapter(folder, deployment, name="task", replace=True).tasks["task"]
    metadata = {entry.key: entry.value for entry in onnx.load(deployment / task.graph).metadata_props}
    return {
        "report": config.as_record()["flavour"],
        "loaded": loaded,
        "config": json.loads((folder / "adapter_config.json").read_text()).get("flavour"),
        "manifest": json.loads((deployment / "manifest.json").read_text())["tasks"]["task"]["flavour"],
        "metadata": metadata.get("flavour"),
        "inspect deployment": describe(str(deployment))["tasks"]["task"]["flavour"],
        "inspect adapter": describe(str(folder))["flavour"],
        "parity": check_contract("task", task, read_adapter(root / "0")).detail,
    }


if __name__ == "__main__":
    sys.meta_path.insert(0, OneMoreLine())
    from helpers.tiny_models import FAMILIES

    from adalink.export.base.export import export_base

    export_base(FAMILIES["llama"](), Path(sys.argv[1]) / "deployment")
    print(json.dumps([arrivals(Path(sys.argv[1]), flavour) for flavour in (0, 7)]))
