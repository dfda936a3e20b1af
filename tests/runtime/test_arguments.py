"""Arguments of a wrong type are refused by name, in every call that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.runtime import Tiny

from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import RequestError

PATHS = (5, None, [], b"folder", "fol\0der", "\ud800", object())
NAMES = (5, [], {}, b"alpha", np.int64(3), object())
WHOLE = ("1", 1.5, True, [], object())


@pytest.fixture(scope="module")
def opened(llama: Tiny) -> Any:
    with Deployment.open(llama.folder) as deployment:
        yield deployment


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("path", PATHS),
        ("backend", (None, *NAMES)),
        ("variant", NAMES),
        ("threads", WHOLE),
        ("full_check", ("yes", 1, None, [])),
        ("task_memory_bytes", WHOLE),
        ("prefix_cache_bytes", (None, *WHOLE)),
        ("image_cache_bytes", (None, *WHOLE)),
    ],
)
def test_open_refuses_wrong_types(llama: Tiny, name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"^{name} is "):
            Deployment.open(**{"path": llama.folder, name: value})


@pytest.mark.parametrize("call", ["load_task", "unload_task", "remove_task"])
def test_names_of_tasks_are_texts(opened: Deployment, call: str) -> None:
    for value in (None, *NAMES):
        with pytest.raises(RequestError, match=r"^name is .*expected a name"):
            getattr(opened, call)(value)


def test_add_task_refuses_wrong_types(llama: Tiny, opened: Deployment) -> None:
    for value in PATHS:
        with pytest.raises(RequestError, match=r"^path is .*expected a path"):
            opened.add_task(value)
    for value in NAMES:
        with pytest.raises(RequestError, match=r"^name is .*expected a name"):
            opened.add_task(llama.sources / "alpha", value)


def test_generate_refuses_what_is_no_function_and_no_settings(opened: Deployment) -> None:
    def generate(**settings: Any) -> Callable[[], Any]:
        return lambda: opened.generate([[5, 6]], max_new_tokens=1, **settings)

    for value in ("x", 5, []):
        with pytest.raises(RequestError, match=r"^stream is .*expected a function"):
            generate(stream=value)()
    for value in ("x", 5, {"temperature": 1.0}):
        with pytest.raises(RequestError, match=r"^sampling is .*expected SamplingParams"):
            generate(sampling=value)()
    assert len(generate(stream=None, sampling=None)()) == 1
