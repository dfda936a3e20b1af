"""What each package gives under its own name, and that a name is imported when it is used and not before."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import pytest
from helpers.paths import REPOSITORY

from adalink.runtime import errors

PUBLIC = {
    "adalink.runtime": {
        *("ChatOptions", "Deployment", "Generation", "Handle", "Receipt", "Reload", "Request", "SamplingParams"),
        *("Classification", "Span", "StructuredOutput", "TextPiece", *errors.__all__),
    },
    "adalink.training": {
        *("AdaLinkConfig", "HeadSettings", "TrainSettings", "attach", "load_adapter", "save_adapter", "train"),
    },
    "adalink.serving": {"ServeOptions", "make_app", "serve"},
    "adalink.export": {"export_adapter", "export_base", "export_engine", "export_prefix"},
}
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "optimum", "tokenizers"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_exactly_these(package: str) -> None:
    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__))
    assert set(module.__all__) == PUBLIC[package]
    assert set(dir(module)) >= PUBLIC[package]
    for name in module.__all__:
        value = getattr(module, name)
        assert callable(value), name
        assert value.__name__ == name
        assert value.__doc__


@pytest.mark.parametrize("package", PUBLIC)
def test_import_loads_nothing_heavy(package: str) -> None:
    code = f"import {package}, sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert run(code) == "[]"
    uses = {"adalink.training": "attach", "adalink.export": "export_base", "adalink.runtime": "Deployment"}
    use = {**uses, "adalink.serving": "ServeOptions"}[package]
    assert run(f"from {package} import {use}; print({use}.__name__)") == use


def test_unknown_name_is_an_attribute_error() -> None:
    module = importlib.import_module("adalink.training")
    with pytest.raises(AttributeError, match=r"module 'adalink\.training' has no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018 - the attribute is what is tested


@pytest.mark.parametrize("package", PUBLIC)
def test_no_submodule_hides_a_public_name(package: str) -> None:
    """``from adalink.training import train`` gives the function, whatever was imported before."""
    folder = REPOSITORY / package.removeprefix("adalink.")
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & PUBLIC[package]


@pytest.mark.parametrize("package", PUBLIC)
def test_type_checkers_are_told_the_same(package: str) -> None:
    tree = ast.parse((REPOSITORY / package.removeprefix("adalink.") / "__init__.py").read_text())
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module for node in branch.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    table = next(node for node in ast.walk(branch) if isinstance(node, ast.Dict))
    assert typed == ast.literal_eval(table)
