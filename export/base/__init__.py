"""Base model to ONNX."""
