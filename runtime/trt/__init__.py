"""TensorRT and TensorRT-RTX backends."""
