"""Prompts of mixed lengths: passages of the English texts that come with Python, about 20 to 300 tokens each."""

from __future__ import annotations

import inspect
import json
import logging
import random
import statistics
import threading

import numpy as np

_SOURCES = (statistics, random, threading, json, logging)


def _words() -> list[str]:
    return " ".join(inspect.getdoc(module) or "" for module in _SOURCES).split()


def mixed_prompts(count: int, seed: int = 0) -> list[str]:
    """So many prompts; lengths in words are spread evenly on a logarithmic scale from 12 to 180."""
    rng, words = np.random.default_rng(seed), _words()
    lengths = np.exp(rng.uniform(np.log(12), np.log(180), count)).astype(int)
    starts = rng.integers(0, len(words) - 200, count)
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


# About 1,000 tokens.
LONG_PROMPT = " ".join(_words()[:560])
