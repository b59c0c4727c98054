"""Reading JSON and YAML that somebody else wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.core import documents, errors, yaml_documents

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


def test_scalars_of_yaml_keep_their_characters():
    text = "a: 1.10\nb: [2024_05, on, 0x10]\nc: {1: 2024-01-01}\nd: ~\ne:\nf: 'null'\n"
    assert yaml_documents.parse_yaml(text) == {
        "a": "1.10",
        "b": ["2024_05", "on", "0x10"],
        "c": {"1": "2024-01-01"},
        "d": None,
        "e": None,
        "f": "null",
    }
    assert yaml_documents.parse_yaml("x: &x {a: 1}\ny: {<<: *x, b: 2}")["y"] == {"a": "1", "b": "2"}
    assert yaml_documents.parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "more than 100000 values .line 6"),
        ("a: &a [*a]", "alias .a"),
        ("[" * 100_000, "nest"),
        ("a: " + "[" * 150 + "]" * 150, "nested too deeply .line 1"),
        ("a: 1\nb: 2\na: 3", "key 'a' occurs twice"),
        ("a: !!python/object/apply:os.getcwd []", "tag .*os.getcwd"),
        ("a: !!timestamp x", "tag .*timestamp"),
        ("? [a]\n: 2", "unhashable"),
        ("a: b: c", "line 1, column 5"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a\0", "control characters"),
        (b"\xff", "not UTF-8"),
        (b"\xff\xfea", "not UTF-16"),
    ],
)
def test_yaml_that_cannot_be_used_is_refused(text: str | bytes, reason: str):
    with pytest.raises(ValueError, match=reason):
        yaml_documents.parse_yaml(text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_and_yaml_have_any_unicode_encoding(encoding: str):
    assert documents.parse_json('{"ä": "\\ud83d\\ude00"}'.encode(encoding)) == {"ä": "😀"}
    assert yaml_documents.parse_yaml("ä: 😀".encode(encoding)) == {"ä": "😀"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ('["\\ud800"]', "surrogate"),
        ("1" * 5000, "digits"),
        ("", "Expecting value"),
        (b"[\xe4]", "not UTF-8"),
    ],
)
def test_json_that_cannot_be_used_is_refused(text: str | bytes, reason: str):
    with pytest.raises(ValueError, match=reason):
        documents.parse_json(text)


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path):
    (tmp_path / "a.json").write_text("[1]")
    assert documents.read_json(tmp_path / "a.json") == [1]
    with pytest.raises(errors.DataError, match=r"a.json is larger than 0 MiB"):
        documents.read_json(tmp_path / "a.json", max_bytes=2)
    with pytest.raises(errors.DataError, match=r"/dev/zero is not a file"):
        documents.read_json(Path("/dev/zero"))
    (tmp_path / "a.yaml").write_text("a: b: c")
    with pytest.raises(errors.DataError, match=r"a.yaml is not valid YAML: mapping values"):
        yaml_documents.read_yaml(tmp_path / "a.yaml")


def test_values_have_the_expected_type():
    where = "run.json: settings"
    value = documents.expect({"a": [1, 2.5]}, dict[str, list[float]], where)
    assert value == {"a": [1.0, 2.5]} and type(value["a"][0]) is float
    assert documents.expect(None, str | None, where) is None
    assert documents.entry({}, "a", int, where, default=3) == 3


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ({"a": ["x"]}, dict[str, list[int]], r"run.json.a\[0\] must be a whole number, but is 'x'"),
        (True, int, "whole number, but is true"),
        (1.0, int, "whole number"),
        (2**64, int, "whole number"),
        (10**400, float, "a number, but is 1000"),
        (float("nan"), float, "a number, but is nan"),
        (3, list[str] | None, "a list or null, but is 3"),
        ([], str, "text, but is a list"),
        (None, dict, "an object with names and values, but is null"),
    ],
)
def test_values_of_another_type_are_refused(value: object, kind: type, message: str):
    with pytest.raises(errors.DataError, match=message):
        documents.expect(value, kind, "run.json")


def test_an_entry_that_is_missing_is_named():
    with pytest.raises(errors.DataError, match=r"run.json has no id"):
        documents.entry({}, "id", str, "run.json")
