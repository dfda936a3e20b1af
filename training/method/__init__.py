"""The AdaLink module and how it is attached."""
