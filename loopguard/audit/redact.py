"""Secrets in text: found by their shape, and replaced before anything is written down.

Looked at are values, wherever they stand in a longer text, and not only the names beside them. What is found is
replaced by what it was, such as `[secret: github token]`, which itself is found no second time.

Covered: the shapes in `SHAPES`, and values that a text itself calls a secret (`password = "..."`, `--api-key X`,
`Authorization: Bearer X`, `scheme://user:password@host`). Not covered: a secret without a shape and without a name
beside it, one that is encoded or put together from parts, and a password in a sentence. Text that only looks random is
left alone: a digest, an id or a picture is no secret, and a log is full of them.

Looking costs time that is linear in the text, whatever the text is: it was written by strangers. `docs/redaction.md`
says where this is done and where not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

HEAD_CHARS = 200
"""How much of a payload a record holds in the clear."""
WINDOW_CHARS = HEAD_CHARS + 512
"""How much of it is looked at for that: a secret that begins in the head is known by what stands behind it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of secret."""

    name: str
    anchors: tuple[str, ...]
    """A text without any of them holds no such secret. Searching for these is what makes it cheap."""
    pattern: re.Pattern[str]
    """Its group `secret`, or all of it, is replaced. Repetitions are bounded where a text could make them costly."""
    real: Callable[[re.Match[str]], bool] = lambda _: True
    """A second look."""

    @property
    def any_case(self) -> bool:
        """Whether capital letters make no difference, for the anchors either, which are in lower case then."""
        return bool(self.pattern.flags & re.IGNORECASE)

    def may_be_in(self, text: str, low: str) -> bool:
        """Whether a text, which is given in lower case as well, has one of the anchors."""
        return any(anchor in (low if self.any_case else text) for anchor in self.anchors)


_ESCAPED = (
    r"(?<=\\[abfnrtv0])|(?<=\\x[\dA-Fa-f]{2})|(?<=\\u[\dA-Fa-f]{4})"  # a line break in quoted text
    r"|(?<=%[\dA-Fa-f]{2})"  # an equals sign in an address
    r"|(?<=[\d\[;]m)"  # a colour
)
"""Behind these something begins anew, although a letter or a digit stands before it."""


def _token(name: str, *anchors: str, pattern: str) -> Shape:
    return Shape(name, anchors, re.compile(rf"(?:(?<![A-Za-z0-9])|{_ESCAPED})(?:{pattern})", re.ASCII))


_KEY_WORDS = (
    r"pass(?:word|wd|phrase|code)|pwd|secret|credentials?"
    r"|(?:api|access|account|private|secret|signing|encryption|master|auth|service|license)[_-]?key"
    r"|(?:auth|access|refresh|session|bearer|id|api|bot|deploy|user)[_-]?token"
)
"""A name that ends in one of these names a secret."""

_HOLLOW = re.compile(
    r"\{.*\}|<.*>|\[.*\]|\$\{?\w+\}?|\$\(.*|%s|%\(\w+\)s|[*.x•_-]+|none|null|nil|true|false|undefined|str|string|bytes"
    r"|include|omit|same-origin",
    re.IGNORECASE,
)
"""A value that stands for one: a place to be filled in, a variable, a type, something that is blacked out already."""
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+|[A-Za-z_]+")
_FLAG = re.compile(r"(?:^|[\s\"'`(,=])--?(?:[A-Za-z][\w-]*[-_])?$")
_FLAG_BACK = 40
_LINE_BACK = 200
_VALUES = ("escaped", "escaped_single", "double", "single", "bare")

# Only before a quote: what ends in an equals sign elsewhere is base64.
_TYPE = r"[A-Za-z_][\w.\[\]]{0,40}"
_ASSIGNED = re.compile(
    rf"""(?P<name>{_KEY_WORDS}|(?P<weak>token))(?:\\{{0,7}}["'])?\]?
    (?: (?: \s{{0,4}}|[ \t]{{5,40}} )
        (?: :[ ]{{0,2}}{_TYPE}(?:[ ]?\|[ ]?{_TYPE}){{0,3}}[ ]{{0,40}}=(?=[ ]{{0,4}}[rbfu]{{0,2}}["'])
          | :=|=>|[=!]?={{1,2}}|: )
        (?: \s{{0,4}}|[ \t]{{5,40}} )
      | (?P<blank>[ \t]{{1,4}}) )
    (?: [rbfu]{{0,2}} (?: \\{{1,7}}"(?P<escaped>[^"\\\n]{{1,4096}})
                        | \\{{1,7}}'(?P<escaped_single>[^'\\\n]{{1,4096}})
                        | (?:\"\"\"|")(?P<double>(?:[^"\\\n]|\\.){{1,4096}})
                        | (?:\'\'\'|')(?P<single>(?:[^'\\\n]|\\.){{1,4096}}) )
      | (?P<bare>[^\s"'`,;&|<>(){{}}\[\]\\]{{1,512}}) )""",
    re.IGNORECASE | re.VERBOSE,
)


def _assigned(match: re.Match[str]) -> bool:
    """Whether what stands behind a name is a secret, and not code that gets one from somewhere."""
    *quotes, bare = (match[name] for name in _VALUES)
    quoted = next((value for value in quotes if value is not None), None)
    value = bare if quoted is None else quoted
    start, text = match.start(), match.string
    is_flag = _FLAG.search(text[max(0, start - _FLAG_BACK) : start]) is not None
    if _HOLLOW.fullmatch(value) or (match["weak"] and not is_flag and not _random(value)):
        return False
    if quoted is not None:
        return (match["blank"] is None and not _ends_a_text(match)) or is_flag
    if is_flag:
        return not value.startswith(("-", "$"))
    if match["blank"] is not None or value.startswith("$") or (match["name"].lower() == "pwd" and value[0] in "/~."):
        return False
    if match["name"].isupper() and text[match.start("bare") - 1] == "=":
        return len(value) >= 3  # as in the environment of a process
    return len(value) >= 5 and not _DOTTED.fullmatch(value)


def _ends_a_text(match: re.Match[str]) -> bool:
    """Whether the quote behind a name ends what the name itself stands in, as in `input("password: ")`."""
    text, at = match.string, max(match.start("double"), match.start("single"))
    if at < 0 or text[at] not in "),;.]}+% ":
        return False
    begin = max(0, at - 1 - _LINE_BACK)
    line = text[max(begin, text.rfind("\n", begin, at - 1) + 1) : at - 1]
    return len(line) < _LINE_BACK and line.count(text[at - 1]) % 2 == 1


def _random(text: str) -> bool:
    """Whether this may be a token: what a model calls a token is mostly a word."""
    return len(text) >= 16 and " " not in text and any(map(str.isdigit, text)) and any(map(str.isalpha, text))


def _has_digit(match: re.Match[str]) -> bool:
    return any(map(str.isdigit, match["secret"]))


def _names_scheme_or_has_digit(match: re.Match[str]) -> bool:
    return not _HOLLOW.fullmatch(match["secret"]) and (match["scheme"] is not None or _has_digit(match))


def _is_login(match: re.Match[str]) -> bool:
    return not _HOLLOW.fullmatch(match["secret"].partition(":")[2])


SHAPES: tuple[Shape, ...] = (
    Shape(
        "private key",
        ("PRIVATE KEY",),
        re.compile(
            r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY(?: BLOCK)?-----"
            r"[\s\S]*?(?:-----END (?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY(?: BLOCK)?-----|\Z)"
        ),
    ),
    _token("aws key", "AKIA", "ASIA", "ABIA", "ACCA", pattern=r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    _token("github token", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", pattern=r"gh[pousr]_[A-Za-z0-9]{20,255}"),
    _token("github token", "github_pat_", pattern=r"github_pat_[A-Za-z0-9_]{22,255}"),
    _token("gitlab token", "glpat-", "gldt-", "glrt-", pattern=r"gl(?:pat|dt|rt)-[\w.-]{20,255}"),
    _token("slack token", "xox", "xapp-", pattern=r"(?:xox[abceoprs](?:\.xox[bp])?|xapp-\d)-[A-Za-z0-9-]{10,255}"),
    Shape(
        "slack webhook", ("hooks.slack",), re.compile(r"hooks\.slack(?:-gov)?\.com/(?P<secret>\w{3,12}/[\w/]{16,255})")
    ),
    _token("anthropic key", "sk-ant-", pattern=r"sk-ant-[\w-]{20,255}"),
    _token(
        "openai key",
        "sk-",
        pattern=r"sk-(?:(?:proj|svcacct|admin|None|or-v\d)-[\w-]{20,255}|(?=[A-Za-z]{0,47}\d)[A-Za-z0-9]{32,255})",
    ),
    _token("hugging face token", "hf_", "api_org_", pattern=r"(?:hf|api_org)_[A-Za-z0-9]{30,255}"),
    _token("google key", "AIza", pattern=r"AIza[\w-]{35}"),
    _token("google token", "ya29.", "GOCSPX-", pattern=r"(?:ya29\.|GOCSPX-)[\w-]{20,1024}"),
    _token("stripe key", "_live_", "_test_", pattern=r"[srp]k_(?:live|test)_[A-Za-z0-9]{16,255}"),
    _token("webhook secret", "whsec_", pattern=r"whsec_[A-Za-z0-9+/]{24,255}={0,2}"),
    _token("npm token", "npm_", pattern=r"npm_[A-Za-z0-9]{36}"),
    _token("pypi token", "pypi-", pattern=r"pypi-AgE[\w-]{32,1024}"),
    _token("sendgrid key", "SG.", pattern=r"SG\.[\w-]{16,64}\.[\w-]{16,64}"),
    _token("age key", "AGE-SECRET-KEY-", pattern=r"AGE-SECRET-KEY-1[0-9A-Z]{50,64}"),
    _token("jwt", "eyJ", pattern=r"eyJ[\w-]{8,1024}\.eyJ[\w-]{8,8192}(?:\.[\w-]{0,2048})?"),
    Shape(
        "authorization",
        ("authorization",),
        re.compile(
            r"authorization(?:\\?[\"'])?\]?\s{0,4}[:=]\s{0,4}(?:\\?[\"'])?"
            r"(?:(?P<scheme>bearer|basic|token|digest|apikey|aws4-hmac-sha256)\s{1,4})?(?P<secret>[^\s\"'\\,;\[{<$][^\s\"'\\,;]{7,8192})",
            re.IGNORECASE,
        ),
        _names_scheme_or_has_digit,
    ),
    Shape(
        "authorization",
        ("bearer", "basic"),
        re.compile(
            rf"(?:(?<![\w-])|{_ESCAPED})(?:bearer|basic)\s{{1,4}}(?P<secret>[A-Za-z0-9._~+/-]{{16,8192}}={{0,2}})",
            re.IGNORECASE,
        ),
        _has_digit,
    ),
    Shape(
        "login in an address",
        ("://",),
        re.compile(r"://(?P<secret>[^\s/@:'\"<>\\]{0,256}:[^\s/'\"<>\\]{1,512})@"),
        _is_login,
    ),
    Shape("password or key", ("pass", "pwd", "secret", "credential", "key", "token"), _ASSIGNED, _assigned),
)

_EXACT = tuple(dict.fromkeys(anchor for shape in SHAPES if not shape.any_case for anchor in shape.anchors))
_WORDS = tuple(dict.fromkeys(anchor for shape in SHAPES if shape.any_case for anchor in shape.anchors))
# Most texts have neither of the two characters that most tokens do: two looks instead of twenty.
_UNDERSCORED = tuple(anchor for anchor in _EXACT if "_" in anchor)
_HYPHENED = tuple(anchor for anchor in _EXACT if "-" in anchor)
_PLAIN = tuple(anchor for anchor in _EXACT if not {"_", "-"} & set(anchor))

_NAMES_A_SECRET = re.compile(rf"[\w.-]{{0,64}}?(?:{_KEY_WORDS}|(?P<weak>token))", re.IGNORECASE)
_FLAG_FOR_SECRET = re.compile(rf"--?(?:[A-Za-z][\w-]{{0,40}}[-_])?(?:{_KEY_WORDS}|token)", re.IGNORECASE)
BY_NAME = "[secret: password or key]"
"""What stands for a value that only the name beside it gives away."""


@dataclass(frozen=True, slots=True)
class Secret:
    """Where one stands in a text, and what it is."""

    start: int
    end: int
    name: str

    def __str__(self) -> str:
        return f"[secret: {self.name}]"


def suspicious(text: str) -> bool:
    """Whether it is worth a closer look. False for a text that holds no secret of any shape we know."""
    low = text.lower()
    # Plain loops: this is asked of nearly every text that is recorded.
    for anchor in _PLAIN:
        if anchor in text:
            return True
    for word in _WORDS:
        if word in low:
            return True
    if "_" in text:
        for anchor in _UNDERSCORED:
            if anchor in text:
                return True
    if "-" in text:
        for anchor in _HYPHENED:
            if anchor in text:
                return True
    return False


def secrets(text: str, *, before: int | None = None) -> list[Secret]:
    """Every secret in a text, or every one that begins `before` a place, in their order; none lies within another."""
    if not suspicious(text):
        return []
    low, end = text.lower(), len(text) if before is None else before
    shapes = [shape for shape in SHAPES if shape.may_be_in(text, low)]
    found = sorted(
        (secret for shape in shapes for secret in _of_shape(shape, text, before=end)),
        key=lambda each: (each.start, -each.end),
    )
    return list(_apart(found))


def _of_shape(shape: Shape, text: str, *, before: int) -> Iterator[Secret]:
    values = [name for name in ("secret", *_VALUES) if name in shape.pattern.groupindex]
    at = 0
    while (match := shape.pattern.search(text, at)) is not None and match.start() < before:
        if shape.real(match):
            group = next((name for name in values if match[name] is not None), 0)
            if match.start(group) < before:
                yield Secret(*match.span(group), shape.name)
            at = match.end()
        else:
            # What stands behind the name may have a name of its own.
            at = match.end("name") if "name" in shape.pattern.groupindex else match.end()


def _apart(found: Sequence[Secret]) -> Iterator[Secret]:
    """Of those that overlap one, over all that any of them covers, under the name of the first."""
    last: Secret | None = None
    for secret in found:
        if last is None:
            last = secret
        elif secret.start < last.end:
            last = Secret(last.start, max(last.end, secret.end), last.name)
        else:
            yield last
            last = secret
    if last is not None:
        yield last


def clean(text: str) -> str:
    """The text with every secret replaced."""
    return _without(text, secrets(text), end=len(text))


def _without(text: str, found: Iterable[Secret], *, end: int) -> str:
    """A text up to some place, or to the end of a secret that goes beyond it, with these secrets replaced."""
    pieces, at = [], 0
    for secret in found:
        pieces += [text[at : secret.start], str(secret)]
        at = secret.end
    return "".join([*pieces, text[at:end]])


def head(text: str) -> tuple[str, bool]:
    """The first 200 characters with every secret that begins in them replaced, and whether there was one.

    A secret that goes on behind them is still known: the text is looked at before it is cut.
    """
    if len(text) <= HEAD_CHARS and not suspicious(text):
        return text, False
    found = secrets(text[:WINDOW_CHARS], before=HEAD_CHARS)
    return _without(text, found, end=HEAD_CHARS), bool(found)


def words(command: Sequence[str]) -> list[str]:
    """The words of a command line with every secret replaced, also one in the word behind its `--password`."""
    cleaned = []
    before = ""
    for word in command:
        name, equals, value = word.partition("=")
        if _FLAG_FOR_SECRET.fullmatch(before) and word and not word.startswith("-") and not _HOLLOW.fullmatch(word):
            cleaned.append(BY_NAME)
        elif value and (_FLAG_FOR_SECRET.fullmatch(name) or named(name, value)) and not _HOLLOW.fullmatch(value):
            # All of it: no shell cuts a word at a blank or an ampersand once it is one.
            cleaned.append(f"{name}{equals}{BY_NAME}")
        else:
            cleaned.append(clean(word))
        before = word
    return cleaned


def named(name: str, value: str) -> bool:
    """Whether the name of a member says that its value is a secret."""
    match = _NAMES_A_SECRET.fullmatch(name)
    return bool(match and value and not _HOLLOW.fullmatch(value) and (not match["weak"] or _random(value)))
