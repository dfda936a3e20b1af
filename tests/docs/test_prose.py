"""Prose of pages for readers: short sentences, short lines. A check of length, not of style: read it aloud too."""

from __future__ import annotations

import re
import statistics

import pytest
from helpers.paths import REPOSITORY

MAX_MEAN_WORDS = 15
MAX_LINE_CHARS = 120
READMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "examples/README.md")
FOLDERS = ("docs", "docs/concepts", "docs/decisions", "docs/guides", "docs/project", "docs/reference")
PAGES = sorted(
    [
        *(REPOSITORY / name for name in (*READMES, "examples/vision/README.md")),
        *(page for folder in FOLDERS for page in (REPOSITORY / folder).glob("*.md")),
    ]
)
FENCE = re.compile(r"^\s*```")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
HEADING = re.compile(r"^#{1,6} ")
ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.) ")
# A sentence ends at a stop before white space and something that begins one; so "3.5", "e.g. this" and "file.md" go on.
SENTENCE_END = re.compile(r"(?<=[.!?])[)\"*]*\s+(?=[\"(*\[]*[A-Z0-9`])")


def prose_lines(text):
    """Numbers and texts of all lines; those of code, tables, headings, images and comments are blank."""
    text = COMMENT.sub(lambda found: "\n" * found.group().count("\n"), text)
    lines, is_code = [], False
    for number, line in enumerate(text.split("\n"), 1):
        if FENCE.match(line):
            is_code = not is_code
            continue
        if is_code or line.startswith("    ") or line.lstrip().startswith(("|", "![")) or HEADING.match(line):
            lines.append((number, ""))
        else:
            lines.append((number, line))
    return lines


def sentences(text):
    """Sentences of the prose; a list item begins a new one."""
    blocks = [""]
    for _, line in prose_lines(text):
        if not line.strip():
            blocks.append("")
        elif ITEM.match(line):
            blocks.append(ITEM.sub("", line))
        else:
            blocks[-1] += f" {line.strip()}"
    found = []
    for block in blocks:
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "`code`", block))
        found += [sentence for sentence in SENTENCE_END.split(plain.strip()) if words(sentence)]
    return found


def words(sentence):
    """Number of words; a piece of code counts as one."""
    return sum(any(character.isalnum() for character in word) for word in sentence.split())


def mean_words(text):
    return statistics.mean(words(sentence) for sentence in sentences(text))


def long_lines(text):
    return [(number, len(line)) for number, line in prose_lines(text) if len(line) > MAX_LINE_CHARS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_page_prose_is_short(page):
    text = page.read_text(encoding="utf-8")
    mean = mean_words(text)
    longest = max(sentences(text), key=words)
    assert mean <= MAX_MEAN_WORDS, f"{mean:.1f} words a sentence; the longest: {longest}"
    assert long_lines(text) == []


def names_in(folder):
    return {page.stem for page in PAGES if page.parent == REPOSITORY / "docs" / folder}


def test_guides_and_concepts_are_all_there():
    assert names_in("guides") == {
        *("train", "export", "rows", "run", "many-tasks", "serve", "images", "quantize", "nvidia", "update-a-task"),
        *("verify-in-ci", "classify", "evaluate", "more-machines", "command-line", "docker", "onnxruntime-genai"),
        *("kv-prefix", "compress", "web", "llama-cpp"),
    }
    assert names_in("concepts") == {"how-it-works", "parity", "file-formats", "when-it-is-enough"}
    assert names_in("project") == {"gpu-proof", "reliability", "stability", "studies"}


def test_long_sentences_are_found():
    """Planted: sentences of 20 words, beside tables, code and headings that must not dilute them."""
    sentence = "Word " * 19 + "end."
    diluting = "# A b.\n\n| a. B. | C. D. |\n\n```\nA. B. C. D.\n```\n\n<!-- A. B. -->\n"
    page = f"{diluting}\n{sentence} {sentence}\n\n- {sentence}\n"
    assert [words(found) for found in sentences(page)] == [20, 20, 20]
    assert mean_words(page) > MAX_MEAN_WORDS


def test_long_lines_are_found():
    """Planted: a line of prose of 121 characters; tables and code may have more."""
    line = "word " * 24 + "x"
    assert len(line) == MAX_LINE_CHARS + 1
    assert long_lines(f"{line[:-1]}\n\n{line}\n\n| {line} |\n\n```\n{line}\n```\n") == [(3, MAX_LINE_CHARS + 1)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two. Three four five.", [2, 3]),
        ("Version 3.5 of file.md works, e.g. here. So", [7, 1]),
        ("Call `a.b(c, d). E` once. See [the page](x.md). End", [3, 3, 1]),
        ("- One two\n- three\n  four\n", [2, 2]),
        ("**Bold.** Then text (in brackets.) And more", [1, 4, 2]),
    ],
)
def test_sentences_are_counted(text, expected):
    assert [words(sentence) for sentence in sentences(text)] == expected
