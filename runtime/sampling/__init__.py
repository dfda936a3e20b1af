"""Sampling: the next token from logits, penalties and bans, and grammars of structured output."""
