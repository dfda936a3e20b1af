"""Code in README and docs does what it says: Python blocks run, and command lines are ones that the commands take.

Each page's Python blocks run in order, in one namespace and a process of its own. Their folder has what pages may name:

- ``MODEL``: a tiny decoder with a tokenizer, as a Hugging Face folder; ``train.jsonl`` and ``eval.jsonl``: rows for it;
- ``adapters/topics`` and ``adapters/authors``: adapters of rank 4 for it;
- ``deployment``: ``MODEL`` exported with both as tasks, unless the page calls ``export_base`` itself.

A block that cannot run here is preceded by ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import json
import shutil

import click
import pytest
from helpers.code_blocks import Block, check_command, command_lines, find_blocks, run_blocks
from helpers.paths import REPOSITORY
from helpers.tiny_deployments import make_deployment

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
# Their command lines are held against the commands too; their Python needs what only the examples have.
MORE_PAGES = [REPOSITORY / name for name in ("CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md")]
ROWS = [
    {"prompt": "Text: oil prices rose. Topic:", "completion": " oil"},
    {"prompt": "Text: corn fell. Topic:", "completion": " grain"},
]


def blocks_of(page):
    return find_blocks(str(page.relative_to(REPOSITORY)), page.read_text(encoding="utf-8"))


def python_blocks(page):
    return [block for block in blocks_of(page) if block.language == "python" and block.reason is None]


def wrong_command_lines(blocks):
    """Command lines of blocks that the commands would refuse, each with the page's line and why."""
    wrong = []
    for block in blocks:
        if block.language == "python":
            continue
        for line, words in command_lines(block):
            try:
                check_command(words)
            except click.ClickException as error:
                wrong.append(f"{block.page}:{line}: adalink {' '.join(words)}: {error.format_message()}")
    return wrong


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tasks = {name: {"seed": seed, "activation": "identity"} for seed, name in enumerate(("topics", "authors"))}
    model, _ = make_deployment(root, "llama", tasks)
    model.rename(root / "MODEL")
    for name, repeats in (("train", 8), ("eval", 1)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * repeats))
    return root


@pytest.fixture
def workplace(world, tmp_path):
    """A copy of the folder for one page, which may change it."""
    shutil.copytree(world, tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page)], ids=lambda page: str(page.relative_to(REPOSITORY))
)
def test_python_blocks_run(page, workplace, warm_torch):
    blocks = python_blocks(page)
    if any("export_base(" in block.code for block in blocks):
        shutil.rmtree(workplace / "deployment")
    run_blocks(blocks, workplace, warm_torch)


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_command_lines_are_taken(page):
    assert wrong_command_lines(blocks_of(page)) == []


def test_command_lines_of_all_pages_are_found():
    found = {tuple(words[:1]) for page in PAGES for block in blocks_of(page) for _, words in command_lines(block)}
    assert {("train",), ("export",), ("run",), ("verify",), ("inspect",), ("doctor",)} <= found


def test_failing_python_block_is_named_with_its_line(tmp_path, warm_torch):
    page = "# Title\n\n```python\nx = 1\n```\n\nText.\n\n```python\nx += 1\nassert x == 3, x\n```\n"
    with pytest.raises(AssertionError, match=r'File "page\.md", line 11(.|\n)*AssertionError: 2'):
        run_blocks(find_blocks("page.md", page), tmp_path, warm_torch)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("adalink export bse MODEL --out deployment", "no such command: adalink export bse"),
        ("adalink run deployment 'text' --tsak topics", "No such option"),
        ("adalink export base MODEL", "Missing option '-o' / '--out'"),
        ("adalink export base MODEL --out deployment --quantize int5", "'int5' is not one of"),
        ("adalink train --base MODEL --data a --eval b --out c --max-steps many", "'many' is not a valid integer"),
        ("adalink remove deployment topics authors", "takes no 'authors'"),
        ("adalink run deployment \\\n  'text' \\\n  --tsak topics", "No such option"),
        ("for t in a b; do adalink run deployment 'x' --tsak $t; done", "No such option"),
        ("X=1 adalink doctor --tsak", "No such option"),
    ],
)
def test_wrong_command_line_is_found(command, message):
    page = f"Text.\n```\n{command}\n```\n"
    (wrong,) = wrong_command_lines(find_blocks("page.md", page))
    assert wrong.startswith("page.md:3: ")
    assert message in wrong


@pytest.mark.parametrize(
    "command",
    [
        "adalink run deployment 'a | b' --task topics --json > out.json  # a comment",
        "adalink train ... --search 30",
        "adalink inspect deployment | head -3 && adalink doctor",
        "adalink --version",
        "adalink export base --help",
        "adalink run -h",
    ],
)
def test_right_command_line_is_taken(command):
    assert wrong_command_lines(find_blocks("page.md", f"```\n{command}\n```\n")) == []


def test_block_that_is_not_run_needs_a_reason():
    page = "<!-- not run: needs a GPU -->\n\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n"
    assert [block.reason for block in find_blocks("page.md", page)] == ["needs a GPU", None]
    with pytest.raises(ValueError, match=r"page\.md:1: .*no reason"):
        find_blocks("page.md", "<!-- not run: -->\n```python\n1 / 0\n```\n")


def test_blocks_keep_language_line_and_lose_indentation():
    page = "1. Step:\n\n   ```python\n   if True:\n       x = 1\n   ```\n"
    assert find_blocks("page.md", page) == [Block("page.md", 3, "python", "if True:\n    x = 1\n")]
    with pytest.raises(ValueError, match=r"page\.md:1: the block does not end"):
        find_blocks("page.md", "```python\nx = 1\n")
