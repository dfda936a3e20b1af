"""Adapters to ONNX."""
