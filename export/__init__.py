"""Export: base models to ONNX graphs and compiled engines, adapters to task graphs."""

from typing import TYPE_CHECKING

from adalink.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from adalink.export.adapter.document import export_prefix
    from adalink.export.adapter.export import export_adapter
    from adalink.export.base.export import export_base
    from adalink.export.engine.export import export_engine
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "export_adapter": "adalink.export.adapter.export",
            "export_base": "adalink.export.base.export",
            "export_engine": "adalink.export.engine.export",
            "export_prefix": "adalink.export.adapter.document",
        },
    )

__all__ = ["export_adapter", "export_base", "export_engine", "export_prefix"]
