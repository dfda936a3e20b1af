"""Vision towers to ONNX."""
