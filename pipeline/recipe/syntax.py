"""YAML text -> nodes, and syntax errors in our own words with line and column. Gives nodes no meaning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.scanner import Scanner

from pipeline.errors import InputError, Problem, RecipeError

TOO_DEEP = "lists or mappings are nested too deeply"
DEEPEST = 64
"""Limit for lists and mappings inside each other."""

DEEPEST_AHEAD = 512
"""Limit for brackets inside each other, ahead of the part that is composed."""

ENCODINGS = (
    (b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
)  # fmt: skip
"""First bytes of a file (byte order mark) -> its encoding."""

SEPARATORS = re.compile("[\x85\u2028\u2029]")
"""Line ends of YAML 1.1 that are ordinary characters in YAML 1.2. ruamel.yaml ends lines there."""

VERSION = re.compile(r"\A\ufeff?(?:[ \t]*(?:#.*)?\n|%(?!YAML).*\n)*%YAML[ \t]+(?P<version>\S+)")

TOKENS = {
    "scalar": "a value", "alias": "an alias", "anchor": "an anchor", "tag": "a tag", "comment": "a comment",
    "block mapping start": "an indented mapping", "block sequence start": "an indented list",
    "block end": "the end of the indented part", "directive": "a directive", "document start": "`---`",
    "document end": "`...`", "stream start": "the start of the file", "stream end": "the end of the file",
}  # fmt: skip
"""ruamel.yaml's names of tokens -> words for messages."""

REPAIR = "repair the syntax; indent with spaces, close every [ and {"
QUOTE = "repair the syntax: put the whole value in quotes"
INDENT = "repair the syntax: indent the keys of one mapping, and the items of one list, by the same number of spaces"
EXPLAINED = (
    (r"found character '\\t' that cannot start any token", "tab character",
     "repair the syntax: write spaces instead of the tab, also at the end of a line"),
    (r"found character (?P<text>'.') that cannot start any token", "a value cannot start with {text}", QUOTE),
    (r"expected alphabetic or numeric character, but found .*", "name of an anchor or alias is missing", QUOTE),
    (r"found undefined alias '(?P<text>.*)'", "no anchor `&{text}` above the alias `*{text}`",
     "write the value, or define the anchor first"),
    (r"found unknown escape character '(?P<text>.)'", r"unknown escape `\{text}` in double quotes",
     "use single quotes, or write `\\\\` for each backslash"),
    (r"mapping values are not allowed here", "unexpected `:`: wrong indentation, or a `: ` inside a value",
     f"{INDENT}; quote values that contain `: `"),
    (r"sequence entries are not allowed here", "unexpected `-`: a list item behind a key or value", INDENT),
    (r"mapping keys are not allowed here", "unexpected `?`", QUOTE),
    (r"could not find expected ':'", "a key without `:`",
     "repair the syntax: write `key: value`, with a space after the colon"),
    (r"expected <block end>, but found .*", "wrong indentation, or text behind a value", INDENT),
    (r"invalid intendation or unclosed '\[' or '{'", "wrong indentation, or a `[` or `{{` that is not closed", REPAIR),
    (r"expected the node content, but found .*", "a value is missing", REPAIR),
    (r"expected ',' or '(?P<text>.)', but got .*", "`,` or `{text}` is missing between brackets", REPAIR),
    (r"found unexpected end of stream", "a quote that is not closed", "repair the syntax: close the quote"),
    (r"but found another document|expected '<document start>', .*", "another document starts here",
     "keep one document in the file: remove `---` and the rest, or the text behind `...`"),
)  # fmt: skip
"""Messages of ruamel.yaml -> what and fix."""


class _Scanner(Scanner):
    """Limits the depth of brackets before they are composed: the scanner looks ahead, in quadratic time."""

    def fetch_flow_collection_start(self, TokenClass: Any, to_push: str) -> None:
        if len(self.flow_context) == DEEPEST - 1:
            self.too_deep = self.reader.get_mark()
        if len(self.flow_context) > DEEPEST_AHEAD:
            raise MarkedYAMLError(problem=TOO_DEEP, problem_mark=self.too_deep)
        super().fetch_flow_collection_start(TokenClass, to_push)


class _Composer(Composer):
    """Limits the depth, so that the limit does not depend on Python's stack."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.levels: int = getattr(self, "levels", 0) + 1
        if self.levels > DEEPEST:
            raise MarkedYAMLError(problem=TOO_DEEP, problem_mark=self.parser.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


def compose(path: Path, resolver: type[VersionedResolver]) -> MappingNode:
    """Return the root of a file, which is one document and a mapping; `resolver` tags the scalars.

    Raises:
        InputError: the file cannot be read, or is not UTF-8 text.
        RecipeError: the text is not YAML 1.2, or not a mapping.

    """
    text = read_text(path).removeprefix("\ufeff")
    check_text(text, path)
    try:
        root = _yaml(resolver).compose(text)
    except YAMLError as error:
        raise RecipeError([syntax_problem(error, text, path)]) from error
    except RecursionError as error:
        raise RecipeError([_too_deep(f"{path}:1")]) from error
    if not isinstance(root, MappingNode):
        found = f"{path}:{root.start_mark.line + 1}" if isinstance(root, Node) else f"{path}:1"
        raise RecipeError([Problem(found, "not a mapping", "start with `name: ...`")])
    return root


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, with its line ends and its byte order mark.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.

    """
    try:
        data = path.read_bytes()
        return data.decode()
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=str(path), fix="check the path") from error
    except UnicodeDecodeError as error:
        encoding = next((name for mark, name in ENCODINGS if data.startswith(mark)), "")
        before = data[: error.start].decode(errors="replace")
        what = f"not UTF-8 text, but {encoding}" if encoding else f"not UTF-8 text: byte 0x{data[error.start]:02x}"
        where = str(path) if encoding else _place(before, path)
        raise InputError(what, where=where, fix="save the file as UTF-8") from error


def check_text(text: str, path: Path) -> None:
    """Reject text that YAML 1.1 and 1.2 read differently as a whole: a version, and separators of lines.

    Raises:
        RecipeError: with line and column.

    """
    if (match := VERSION.search(text.replace("\r\n", "\n").replace("\r", "\n"))) and match["version"] != "1.2":
        what = f"found %YAML {match['version']}, expected %YAML 1.2"
        line = match[0].count("\n") + 1
        raise RecipeError([Problem(f"{path}:{line}", what, "remove the line; values are read as in YAML 1.2")])
    if match := SEPARATORS.search(text):
        what = f"line separator U+{ord(match[0]):04X}, which only some YAML readers take for a line end"
        fix = f'write a line feed, or "\\u{ord(match[0]):04x}" in double quotes'
        raise RecipeError([Problem(_place(text[: match.start()], path), what, fix)])


def syntax_problem(error: YAMLError, text: str, path: Path) -> Problem:
    """Return the place, the words and the remedy of an error of ruamel.yaml."""
    if isinstance(error, ReaderError):
        what = f"not YAML: control character U+{int(error.character):04X}"
        return Problem(_place(text[: error.position], path), what, "remove the character")
    if not isinstance(error, MarkedYAMLError):
        return Problem(str(path), f"not YAML: {_in_words(str(error).splitlines()[0])}", REPAIR)
    mark, opened = error.problem_mark or error.context_mark, error.context_mark
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    problem = str(error.problem or error).strip()
    if problem == TOO_DEEP:
        return _too_deep(where)
    what, fix = _explained(problem)
    if mark and opened and opened.line < mark.line and "another document" not in what:
        what += f" (in the part that starts in line {opened.line + 1}, column {opened.column + 1})"
    return Problem(where, f"not YAML: {what}", fix)


def _yaml(resolver: type[VersionedResolver]) -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Composer, yaml.Scanner = resolver, _Composer, _Scanner
    yaml.composer.warn_double_anchors = False  # YAML allows it: an alias means the last one
    return yaml


def _too_deep(where: str) -> Problem:
    what = f"lists or mappings are nested too deeply: more than {DEEPEST} levels"
    return Problem(where, what, "remove brackets or indentation")


def _explained(problem: str) -> tuple[str, str]:
    for pattern, what, fix in EXPLAINED:
        if match := re.match(pattern, problem):
            return what.format(**match.groupdict()), fix
    return _in_words(problem.splitlines()[0]), REPAIR


def _in_words(text: str) -> str:
    """Return a message with words for ruamel.yaml's tokens: `'<stream end>'` is the end of the file."""
    return re.sub(r"'?<([a-z ]+)>'?", lambda match: TOKENS.get(match[1], match[1]), text)


def _place(before: str, path: Path) -> str:
    """Return `file:line:column` of what follows `before`."""
    lines = re.split(r"\r\n|\n|\r", before)
    return f"{path}:{len(lines)}:{len(lines[-1]) + 1}"
