"""Texts whose tokens are compared with those of another library's tokenizer."""

from __future__ import annotations

# Words, numbers, white space, scripts without spaces, combining marks, emoji, and what looks like a special token.
TEXTS = (
    "The capital of France is",
    "Don't stop: 3.14159, 1,000,000 and 2026-11-30!",
    "  two  spaces\tand a tab\r\nand\n\n\nlines  ",
    "def f(x):\n    return {'a': [x**2]}  # comment",
    "Grüße, déjà vu, naïve façade, Łódź",
    "Cafe\u0301 and nai\u0308ve",
    "你好，世界。これは日本語です。",
    "Привет, мир! Γειά σου. שלום مرحبا",
    "👩‍👩‍👧 🙂🏽 ™ ﬁ",
    "<s>[INST] <|im_start|>user\n</s>",
    "1 ½ cups, 5 m²",
)
