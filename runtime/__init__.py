"""The edge side of AdaLink Kit: numpy and one engine, never torch, transformers or onnx."""
