"""A wrong study file is refused with the path of the field."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.paths import REPOSITORY
from helpers.studies import METHODS, study_text

from adalink.runtime.errors import ConfigError
from studies.commands import main
from studies.experiment.settings import AdaLinkMethod, LoraMethod, ZeroShotMethod, read_study

TEXT = study_text(Path("base"), Path("data"), METHODS)
STUDIES = REPOSITORY / "studies" / "files"


def read(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return read_study(path)


def test_a_study_is_read(tmp_path):
    study = read(tmp_path, TEXT)
    assert study.methods == (
        AdaLinkMethod(name="AdaLink 8", lr=(1e-2, 1e-3), rank=8, activation="gelu"),
        LoraMethod(name="LoRA 2", lr=(1e-2,), rank=2, targets="attention"),
        ZeroShotMethod(name="none"),
    )
    assert (study.seeds, study.sizes, study.search.seed) == ((1, 2), ("all",), 99)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank = 8", "rank = 0", r"at `\$\.methods\[0\]\.rank`"),
        ("rank = 8", "rank = 8\nlr_ratio = 0", r"at `\$\.methods\[0\]\.lr_ratio`"),
        ("rank = 8", "", r"missing required field `rank` - at `\$\.methods\[0\]`"),
        ("rank = 8", "rank = 8\nalpha = 3", r"unknown field `alpha` - at `\$\.methods\[0\]`"),
        ('kind = "lora"', 'kind = "dora"', r"Invalid value 'dora' - at `\$\.methods\[1\]\.kind`"),
        ('targets = "attention"', 'targets = "heads"', r"'heads' - at `\$\.methods\[1\]\.targets`"),
        ('activation = "gelu"', 'activation = "sine"', r"\$\.methods\[0\]\.activation is 'sine', expected one of id"),
        ("lr = [1e-2]", "lr = []", r"\$\.methods\[1\]\.lr`"),
        ("lr = [1e-2]", "lr = [15.0]", r"\$\.methods\[1\]\.lr\[0\]`"),
        ("max_steps = 12", 'max_steps = "12"', r"\$\.training\.max_steps`"),
        ('sizes = ["all"]', "sizes = [0]", r"\$\.sizes"),
        ('sizes = ["all"]', 'sizes = ["all", "all"]', r"\$\.sizes has 'all' twice"),
        ("seeds = [1, 2]", "seeds = [1, 1]", r"\$\.seeds has '1' twice"),
        ("seeds = [1, 2]", "seeds = [1, 99]", r"\$\.search\.seed is 99, which is in \$\.seeds: .*take another"),
        ('name = "LoRA 2"', 'name = "AdaLink 8"', r"\$\.methods\[\.\.\.\]\.name has 'AdaLink 8' twice"),
        ('compare_to = "AdaLink 8"', 'compare_to = "x"', r"\$\.compare_to is 'x', expected a method: AdaLink 8, LoRA"),
        ('folder = "data"', "", r"\$\.data\[0\]\.name is 'letters', expected one of reuters-r8, .*`folder`"),
        ("lr = [1e-2]", "lr = [1e-2]\nsizes = [7]", r"\$\.methods\[1\]\.sizes has 7, expected some of \$\.sizes: all"),
        ('template = "{text} is"', 'template = "text"', r"\$\.data\[0\]\.template`"),
        (
            'compare_to = "AdaLink 8"',
            'compare_to = "none"',
            r"\$\.compare_to is 'none', which learns nothing: .* trained: AdaLink 8, LoRA 2",
        ),
        (
            "lr = [1e-2]",
            'lr = [1e-2]\ncompare_to = "LoRA 2"',
            r"\$\.methods\[1\]\.compare_to is 'LoRA 2', the method itself: expected another, or none",
        ),
        (
            "lr = [1e-2]",
            'lr = [1e-2]\ncompare_to = "AdaLink 9"',
            r"\$\.methods\[1\]\.compare_to is 'AdaLink 9', expected a method: AdaLink 8, LoRA 2, none",
        ),
        (
            "lr = [1e-2]",
            'lr = [1e-2]\ncompare_to = "none"',
            r"\$\.methods\[1\]\.compare_to is 'none', which learns nothing: .* trained: AdaLink 8, LoRA 2",
        ),
        ("[search]", "[search", r"study\.toml: .*correct the file"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, old, new, message):
    assert TEXT.count(old) == 1
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, TEXT.replace(old, new))


COMBINED = """
[[data]]
name = "both"
combine = ["letters", "reuters-r8"]
methods = ["LoRA 2"]

[[data]]
name = "reuters-r8"
"""


def test_data_sets_are_combined(tmp_path):
    study = read(tmp_path, TEXT + COMBINED)
    assert [part.name for part in study.parts(study.data[1])] == ["letters", "reuters-r8"]
    assert study.parts(study.data[0]) == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"reuters-r8"]',
            '"reuters-r52"]',
            r"\$\.data\[1\]\.combine has 'reuters-r52', expected .*letters, reut",
        ),
        ('"reuters-r8"]', '"both"]', r"\$\.data\[1\]\.combine has 'both', expected names of data sets .* combine none"),
        ('"reuters-r8"]', '"letters"]', r"\$\.data\[1\]\.combine is letters, letters: expected each once"),
        (', "reuters-r8"]', "]", r"\$\.data\[1\]\.combine`"),
        ("methods =", "words = 3\nmethods =", r"\$\.data\[1\] has both combine and words: leave words to"),
        ('["LoRA 2"]', '["LoRA 3"]', r"\$\.data\[1\]\.methods has 'LoRA 3', expected some of AdaLink 8, LoRA 2, none"),
    ],
)
def test_a_wrong_combination_is_named(tmp_path, old, new, message):
    assert COMBINED.count(old) == 1
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, TEXT + COMBINED.replace(old, new))


def test_a_template_is_for_a_folder(tmp_path):
    template = 'name = "reuters-r8"\ntemplate = "{text} is"'
    with pytest.raises(ConfigError, match=r"\$\.data\[2\] has a template and no folder: reuters-r8 has .*leave it out"):
        read(tmp_path, TEXT + COMBINED.replace('name = "reuters-r8"', template))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        read_study(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["reduced", "encoder", "full"])
def test_the_studies_of_this_repository_can_be_read(name):
    study = read_study(STUDIES / f"{name}.toml")
    assert len(study.seeds) >= 3
    assert study.compare_to.startswith("LoRA")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'name = "\xff"', r"byte or character 8 is not UTF-8; correct the file"),
        (b"a = " + b"[" * 100_000, r"nested too deeply; correct the file"),
        (b"a." * 1_000 + b"b = 1", r"unknown field `a`; correct the file"),
        (b"a = " + b"1" * 5_000, r"it holds a number that cannot be read: .*digits.*; correct the file"),
        (b"a = 0x" + b"f" * 100_000, r"it holds an integer of more than 64 bits; correct the file"),
    ],
    ids=["utf-8", "arrays", "keys", "digits", "hexadecimal"],
)
def test_a_study_that_no_parser_reads_is_refused(tmp_path, data, message):
    path = tmp_path / "study.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_study(path)
    done = CliRunner().invoke(main, ["summary", str(path), "--out", str(tmp_path)])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
