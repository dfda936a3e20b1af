"""Training: the AdaLink method in PyTorch. Attach adapters to a model, train, save and load them."""

from typing import TYPE_CHECKING

from adalink.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from adalink.training.adapter_io import load_adapter, save_adapter
    from adalink.training.method.attach import attach
    from adalink.training.method.config import AdaLinkConfig
    from adalink.training.run import train
    from adalink.training.settings import HeadSettings, TrainSettings
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "AdaLinkConfig": "adalink.training.method.config",
            "HeadSettings": "adalink.training.settings",
            "TrainSettings": "adalink.training.settings",
            "attach": "adalink.training.method.attach",
            "load_adapter": "adalink.training.adapter_io",
            "save_adapter": "adalink.training.adapter_io",
            "train": "adalink.training.run",
        },
    )

__all__ = ["AdaLinkConfig", "HeadSettings", "TrainSettings", "attach", "load_adapter", "save_adapter", "train"]
