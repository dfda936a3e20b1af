"""The AdaLink method in PyTorch: attach to a model, train, save, load."""
