"""A deployment as a folder for onnxruntime-genai."""
