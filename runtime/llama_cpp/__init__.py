"""llama.cpp: a GGUF file as it is, run by llama.cpp's library, which is fed embeddings."""
