"""PyTorch modules as ONNX graphs: tracing, attention in standard operators, static shapes."""
