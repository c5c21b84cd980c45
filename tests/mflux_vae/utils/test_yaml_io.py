"""YAML is read as every version of YAML and its reader understand it, or refused with file, line and key."""

import math
from pathlib import Path
from typing import Any

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae.utils.yaml_io import dump_yaml, parse_yaml, read_yaml

READ: dict[str, Any] = {
    "10": 10,
    "-3": -3,
    "0": 0,
    "0x1F": 31,
    "0.5": 0.5,
    "1.": 1.0,
    "1.5e-3": 0.0015,
    "5e-6": "5e-6",  # text, which settings convert
    "-.inf": -math.inf,
    "true": True,
    "FALSE": False,
    "yes": "yes",
    "off": "off",
    "~": None,
    "": None,
    "'010'": "010",
    '"2024-11-05"': "2024-11-05",
    "!!str 5": "5",
    "1.2.3": "1.2.3",
    "v1_0": "v1_0",
    "3:75": "3:75",
}


@pytest.mark.parametrize("text", READ)
def test_plain_values(text: str) -> None:
    found = parse_yaml(f"a: {text}", "x.yaml")["a"]
    assert found == READ[text] and type(found) is type(READ[text])


@pytest.mark.parametrize(
    "text",
    ["010", "0100", "08", "-07", "0o17", "0b11", "1:30", "16:9", "12:30:45", "1_000", "1_0e-4", "1_0.5", "0.1_0"],
)
def test_numbers_that_versions_of_yaml_read_differently_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"x\.yaml, line 3: rank: .*quotes"):
        parse_yaml(f"a: 1\nb:\n  - rank: {text}\n", "x.yaml")


@pytest.mark.parametrize("text", ["2024-11-05", "2024-11-05 10:00:00", "2024-11-05T10:00:00Z", "2024-13-45"])
def test_dates_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"x\.yaml, line 1: output_dir: .*put it in quotes"):
        parse_yaml(f"output_dir: {text}", "x.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank: 4\nseed: 1\nrank: 8", "line 3: rank: stands in line 1"),
        ("a: {b: 1,\n b: 1}", "line 2: b: stands in line 1"),
        ("a:\n- {x: 1}\n- {x: 1, 'x': 2}", "line 3: x:"),
        ('{"rank": 4, "rank": 8}', "line 1: rank:"),
        ("a: !!python/object:os.system {}", "tag"),
        ("a: !!set {x}", "tag"),
        ("? [1]\n: 2", "line 1: a key"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("<<: 5", "mapping"),
    ],
)
def test_other_faults_are_refused(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_yaml(text, "x.yaml")


def test_mappings_know_the_lines_of_their_keys_and_may_replace_merged_ones(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {x: 1, y: 2}\none:\n  <<: *base\n  x: 3\n")
    content = read_yaml(tmp_path / "a.yaml")
    assert content == {"base": {"x": 1, "y": 2}, "one": {"x": 3, "y": 2}}
    assert content.lines == {"base": 1, "one": 2} and content["one"].lines == {"x": 4}


TEXTS = (
    "a\x85b",
    "a\u2028b ",
    "\u2029",
    "a\nb\r\tc",
    " 010",
    "010",
    "yes",
    "1:30",
    "⭐\ufeff",
    "\udce9",
    "#:",
    "008",
    "1_0e4",
)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_written_such_that_it_is_read_again(text: str) -> None:
    assert parse_yaml(dump_yaml({"a": text, "b": [text]}), "x.yaml") == {"a": text, "b": [text]}
