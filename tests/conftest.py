"""What every test shares: nothing is remembered in the home of whoever runs the tests."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_memory(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
