"""The generated page of the command line is the one in docs/."""

from helpers.paths import REPOSITORY

from adalink.tools.command_line.help_page import render

PAGE = REPOSITORY / "docs/reference/cli.md"


def test_cli_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == render(), (
        "run: python -m adalink.tools.command_line.help_page docs/reference/cli.md"
    )


def test_cli_page_holds_every_verb():
    page = render()
    for verb in (
        "train",
        "export base",
        "export adapter",
        "remove",
        "run",
        "verify",
        "bench",
        "inspect",
        "doctor",
    ):
        assert f"## adalink {verb}\n" in page
