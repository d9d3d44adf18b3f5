"""JSON lines as people's files have them: data in every line, or one error with file, line and column."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from pipeline.errors import InputError
from pipeline.files.json_lines import LineRecord, read_json_lines

FIX = "write an object per line"


class Fields(LineRecord):
    text: str
    kind: str = Field(default="", alias="class")
    id: str | int = ""


def lines(path: Path, data: bytes | str) -> list[str]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return [line.fields.text for line in read_json_lines(path, Fields, fix=FIX, missing="check the path")]


def refusal(path: Path, data: bytes | str) -> InputError:
    with pytest.raises(InputError) as caught:
        lines(path, data)
    return caught.value


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_only_a_line_feed_ends_a_line(separator: str, tmp_path: Path) -> None:
    """`str.splitlines` cut an object in two at each of these characters, and the message was Python's."""
    assert lines(tmp_path / "f", f'{{"text": "a{separator}b"}}\n{{"text": "c"}}\n') == [f"a{separator}b", "c"]


@pytest.mark.parametrize(
    "data",
    [
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}',
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b'\xef\xbb\xbf{"text": "a"}\r\n\xef\xbb\xbf{"text": "b"}\r\n',
        b'\n{"text": "a"}\n \t\r\n\n{"text": "b"}\n\n',
        b'  {"text" :\t"a" , "other": {"x": 1, "x": [2]}}  \n{"text": "b"}',
    ],
)
def test_byte_order_marks_crlf_and_blank_lines_are_accepted(data: bytes, tmp_path: Path) -> None:
    """A byte order mark was `not JSON: Unexpected UTF-8 BOM`."""
    assert lines(tmp_path / "f", data) == ["a", "b"]


def test_escapes_of_two_halves_are_one_character(tmp_path: Path) -> None:
    assert lines(tmp_path / "f", '{"text": "\\ud83d\\ude00"}') == ["\U0001f600"]


def test_numbers_of_lines_count_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b'\n\n{"text": "a"}\n')
    (line,) = read_json_lines(tmp_path / "f", Fields, fix=FIX, missing="")
    assert line.place.number == 3


@pytest.mark.parametrize(
    ("second", "what", "column"),
    [
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9", 14),
        ('{"text": "\u4f60\u4f60'.encode() + b'\xff"}', "not UTF-8: byte 0xff", 13),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8: byte 0xed", 11),
        ('{"text": "\\ud800"}', "`text`: not valid Unicode: lone surrogate at index 0", 10),
        ('{"text": "x", "class" : "ab\\udfff"}', "`class`: not valid Unicode: lone surrogate at index 2", 25),
        ('{"text": null}', "`text`: found null, expected a string", 10),
        ('{"text": true}', "`text`: found a boolean, expected a string", 10),
        ('{"text": {"text": "x"}}', "`text`: found an object, expected a string", 10),
        ('{"a": {"text": [1, "}"]}, "text": NaN}', "`text`: found a number, expected a string", 35),
        ('{"text": "x", "id": false}', "`id`: found a boolean, expected a string or a whole number", 21),
        ('{"text": "x", "text": "y"}', "duplicate key: `text`", 23),
        ("{}", "missing key: `text`", 1),
        ('[{"text": "x"}]', "not a JSON object: found an array", 1),
        ('"text"', "not a JSON object: found a string", 1),
        ('{"text": "x"},', "not JSON: Extra data", 14),
        ('{"text": "x', "not JSON: Unterminated string", 10),
        ("{'text': 'x'}", "not JSON: Expecting property name enclosed in double quotes", 2),
        ('{"text": ' + "[" * 100_000, "nested too deeply", 1),
        ('{"text": "x", "id": ' + "1" * 5000 + "}", "a number has too many digits", 1),
    ],
)
def test_malformed_line_is_named(second: bytes | str, what: str, column: int, tmp_path: Path) -> None:
    """Latin-1 bytes and lone surrogates ended in tracebacks, and `null` was accepted as the text `None`."""
    second = second if isinstance(second, bytes) else second.encode()
    error = refusal(tmp_path / "f", b'{"text": "first"}\n' + second + b"\n")
    assert error.what == what
    assert error.where == f"{tmp_path / 'f'}:2:{column}"
    assert error.fix


def test_another_encoding_has_its_remedy(tmp_path: Path) -> None:
    assert "iconv -f ISO-8859-1 -t UTF-8" in refusal(tmp_path / "f", b'{"text": "caf\xe9"}').fix
    utf16 = refusal(tmp_path / "f", '{"text": "a"}'.encode("utf-16"))
    assert utf16.what == "not UTF-8: the file is UTF-16"
    assert "iconv -f UTF-16 -t UTF-8" in utf16.fix


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_lines_is_an_error(data: bytes, tmp_path: Path) -> None:
    error = refusal(tmp_path / "f", data)
    assert (error.what, error.fix) == ("no lines in the file", FIX)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot read the file") as caught:
            read_json_lines(path, Fields, fix=FIX, missing="check the path")
        assert caught.value.fix == "check the path"
