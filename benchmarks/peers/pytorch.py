"""PyTorch eager. Kinds: ``base``, and ``adalink``: the kit's training code in front of it."""

from __future__ import annotations

from benchmarks.peers import common
from benchmarks.peers.torch_loop import TorchLoopPeer


class TorchPeer(TorchLoopPeer):
    """The checkpoint alone, or with an adapter attached."""

    packages = ("torch", "transformers", "adalink-kit")

    def __init__(self, settings: common.Settings) -> None:
        super().__init__(settings)
        if settings.kind == "adalink":
            from adalink.training.adapter_io import load_adapter

            load_adapter(settings.work / "deployment/tasks/task-00000", self._model)


if __name__ == "__main__":
    common.main(TorchPeer)
