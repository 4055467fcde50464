"""The names of places outside, as `egress` takes them: exact DNS names, which can mean one thing only.

Refused is whatever could mean another place than a reader sees: patterns, addresses in any of their spellings, names of
the machine itself, names without a dot (which a search list completes), another case, a dot at the end. Where a name
leads is not known here; that the proxy must check each time.
"""

from __future__ import annotations

import re

from loopguard.policy.findings import shown

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_SELF = re.compile(
    r"(.*\.)?(localhost[46]?|localdomain|localhost6?\.localdomain6?)|(host|gateway|kubernetes)\.docker\.internal"
    r"|host\.(containers|lima|orb)\.internal"
)
_METADATA = re.compile(r"(.*\.)?metadata\.(google\.internal|goog|azure\.internal)|instance-data\.ec2\.internal")
_NEAR = re.compile(r".*\.(internal|local|lan|intranet|corp|home|private|home\.arpa|svc|test)")


def host_fault(written: object) -> str:
    """What is wrong with the name of a host, as the rest of a sentence; empty where nothing is."""
    if isinstance(written, bool) or not isinstance(written, (str, int, float)):
        return ""  # for the type to complain about
    text = str(written)
    if fault := _another_thing(text):
        return f"is {shown(written)}; {fault}"
    labels = text.split(".")
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        return f"is {shown(written)}; expected the exact name of a host, such as 'api.example.org'"
    return ""


def near(host: str) -> bool:
    """Whether a name is one of those that only mean something inside somebody's own network."""
    return _NEAR.fullmatch(host) is not None


def _another_thing(text: str) -> str:
    """What was written where the name of a host belongs, and what to write; empty where it may be a name."""
    if "*" in text or "?" in text:
        return "egress knows no wildcards; name each host"
    if "/" in text or "@" in text:
        return "write the name of the host alone, without scheme, user and path"
    if _is_address(text):
        return "an address is not a name, and could be anything inside your network; name the host"
    if ":" in text:
        return "write the name of the host alone; the port has a key of its own"
    if not text.isascii():
        return "write the name as DNS has it, where such names begin with xn--"
    if text != text.lower():
        return f"write it in small letters, {text.lower()!r}"
    if text.endswith(".") and text.strip("."):
        return f"write it without the dot at its end, {text.rstrip('.')!r}"
    if _SELF.fullmatch(text):
        return "that is the machine itself, whose services trust it; egress is for places outside"
    if _METADATA.fullmatch(text):
        return "that hands out the credentials of the machine; egress is for places outside"
    if text and "." not in text:
        return "a name without a dot means what the network around it makes of it; write the whole name"
    return ""


def _is_address(text: str) -> bool:
    """Whether this is an address in any spelling, such as 127.1, 0x7f.1, 2130706433 or [::1].

    As browsers have it: a name whose last part is a number is an IPv4 address or a mistake.
    """
    if text.startswith("[") or text.count(":") > 1:
        return True
    name = text.lower().partition(":")[0].rstrip(".")
    return _NUMBER.fullmatch(name.rpartition(".")[2]) is not None
