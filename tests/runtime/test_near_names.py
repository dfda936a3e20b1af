"""Names that are nearly right are named, others are not."""

import pytest

from adalink.runtime.near_names import did_you_mean


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("topic", "; did you mean 'topics'?"),
        ("TOPICS", "; did you mean 'topics'?"),
        ("authros", "; did you mean 'Authors'?"),
        ("weather", ""),
        ("", ""),
    ],
)
def test_the_nearest_name_is_meant(name: str, said: str) -> None:
    assert did_you_mean(name, ["topics", "Authors"]) == said
    assert did_you_mean(name, []) == ""
