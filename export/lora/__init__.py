"""A text task as a LoRA of the input embedding: PEFT's folder, or a GGUF file for llama.cpp."""
