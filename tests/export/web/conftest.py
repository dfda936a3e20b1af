"""A tiny deployment as a folder for the web."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.sites import make_web_deployment

from adalink.export.web.export import export_web


class Site(NamedTuple):
    """The model's folder, the deployment, and what was exported of it."""

    model: Path
    deployment: Path
    folder: Path


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("web")
    model, deployment = make_web_deployment(root)
    export_web(deployment, root / "site")
    return Site(model, deployment, root / "site")
