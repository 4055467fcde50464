"""Places outside: exact names and nothing that could be another place; secrets by name and never by value."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_kit import small
from pydantic import ValidationError

from loopguard.policy.hosts import host_fault, near
from loopguard.policy.load import digest
from loopguard.policy.schema import EgressPlace

PLACE = "sandbox.profiles.offline.egress.allow[0]"


@pytest.fixture
def said(findings):
    """What is said about one place, without lints."""

    def say(place: str) -> list[str]:
        lines = findings(("      limits:", f"      egress: {{allow: [{place}]}}\n      limits:"))
        return [line for line in lines if ": lint: " not in line]

    return say


@pytest.mark.parametrize(
    "host",
    ["api.example.org", "a.b", "x1.example", "1.example.org", "xn--bcher-kva.example", "a-b.c-d.example", "0x1.org"],
)
def test_names_are_taken_as_they_are(host):
    assert host_fault(host) == ""
    assert EgressPlace(host=host, port=443).host == host


ADDRESS = "an address is not a name, and could be anything inside your network; name the host"
SELF = "that is the machine itself, whose services trust it; egress is for places outside"
METADATA = "that hands out the credentials of the machine; egress is for places outside"
NO_NAME = "expected the exact name of a host, such as 'api.example.org'"
NO_DOT = "a name without a dot means what the network around it makes of it; write the whole name"
NO_WILDCARD = "egress knows no wildcards; name each host"
ALONE = "write the name of the host alone, without scheme, user and path"

FAULTS = [
    ("'*.example.org'", "'*.example.org'", NO_WILDCARD),
    ("'*'", "'*'", NO_WILDCARD),
    ("api?.example.org", "'api?.example.org'", NO_WILDCARD),
    ("10.0.0.1", "'10.0.0.1'", ADDRESS),
    ("169.254.169.254", "'169.254.169.254'", ADDRESS),
    ("169.254.169.254.", "'169.254.169.254.'", ADDRESS),
    ("'10.0.0.1:80'", "'10.0.0.1:80'", ADDRESS),
    ("127.1", "127.1", ADDRESS),
    ("2130706433", "2130706433", ADDRESS),
    ("'2130706433'", "'2130706433'", ADDRESS),
    ("0x7f000001", "'0x7f000001'", ADDRESS),
    ("0x7F.1", "'0x7F.1'", ADDRESS),
    ("0177.0.0.1", "'0177.0.0.1'", ADDRESS),
    ("example.0x10", "'example.0x10'", ADDRESS),
    ("'::1'", "'::1'", ADDRESS),
    ("'[::1]'", "'[::1]'", ADDRESS),
    ("'::ffff:10.0.0.1'", "'::ffff:10.0.0.1'", ADDRESS),
    ("'fe80::1%eth0'", "'fe80::1%eth0'", ADDRESS),
    ("localhost", "'localhost'", SELF),
    ("app.localhost", "'app.localhost'", SELF),
    ("localhost.localdomain", "'localhost.localdomain'", SELF),
    ("host.docker.internal", "'host.docker.internal'", SELF),
    ("host.containers.internal", "'host.containers.internal'", SELF),
    ("metadata.google.internal", "'metadata.google.internal'", METADATA),
    ("db", "'db'", NO_DOT),
    ("api.example.org.", "'api.example.org.'", "write it without the dot at its end, 'api.example.org'"),
    ("API.Example.org", "'API.Example.org'", "write it in small letters, 'api.example.org'"),
    (
        "'api.example.org:443'",
        "'api.example.org:443'",
        "write the name of the host alone; the port has a key of its own",
    ),
    ("'https://api.example.org'", "'https://api.example.org'", ALONE),
    ("api.example.org/v1", "'api.example.org/v1'", ALONE),
    ("'me@api.example.org'", "'me@api.example.org'", ALONE),
    ("bücher.example", "'bücher.example'", "write the name as DNS has it, where such names begin with xn--"),
    ("１２７.0.0.1", "'１２７.0.0.1'", ADDRESS),
    ("api.example。org", "'api.example。org'", "write the name as DNS has it, where such names begin with xn--"),
    ("a_b.example.org", "'a_b.example.org'", NO_NAME),
    ("-a.example.org", "'-a.example.org'", NO_NAME),
    ("a..example.org", "'a..example.org'", NO_NAME),
    (".example.org", "'.example.org'", NO_NAME),
    ("'api.example.org '", "'api.example.org '", NO_NAME),
    ('"api.example.org\\n"', "'api.example.org\\n'", NO_NAME),
    ("''", "''", NO_NAME),
    ("'.'", "'.'", NO_NAME),
]


@pytest.mark.parametrize(("written", "shown", "fault"), FAULTS, ids=[shown for _, shown, _ in FAULTS])
def test_whatever_could_be_another_place_is_refused(said, written, shown, fault):
    (line,) = said(f"{{port: 443, host: {written}}}")
    assert line == f"15:42: {PLACE}.host is {shown}; {fault}"


def test_a_name_may_be_as_long_as_dns_has_it():
    label, longest = "a" * 63, ".".join(["a" * 63] * 3 + ["a" * 61])
    assert (host_fault(f"{label}.org"), host_fault(longest)) == ("", "")
    assert host_fault(f"{label}a.org")
    assert host_fault(f"{longest}a")


@pytest.mark.parametrize("host", [True, ["a.b"], {"a": "b"}])
def test_what_is_no_text_is_left_to_the_type(host):
    assert host_fault(host) == ""
    with pytest.raises(ValidationError):
        EgressPlace(host=host, port=443)


@given(st.text(max_size=40) | st.from_regex(r"[0-9a-fx.:\[\]%]{1,24}", fullmatch=True))
def test_what_is_taken_has_one_reading(text):
    """Small letters, at least one dot, and a last part that is no number."""
    if not host_fault(text):
        assert text.isascii()
        assert text == text.lower().strip(". ")
        assert "." in text
        assert not text.rpartition(".")[2].isdigit()


@pytest.mark.parametrize("host", ["wiki.corp", "db.internal", "printer.local", "a.home.arpa"])
def test_names_of_ones_own_network_are_known(host):
    assert near(host)
    assert not near(f"{host}.example.org")


class TestPlaces:
    @pytest.mark.parametrize("port", [1, 443, 65535])
    def test_any_port_will_do(self, said, port):
        assert said(f"{{host: a.example.org, port: {port}}}") == []

    @pytest.mark.parametrize(
        ("port", "tail"),
        [
            ("0", "is 0; expected at least 1"),
            ("65536", "is 65536; expected at most 65535"),
            ("-1", "is -1; expected at least 1"),
            ("https", "is 'https'; expected a whole number"),
            ("'443'", "is '443'; expected a whole number. Take the quotes off"),
            ("true", "is true; expected a whole number"),
        ],
    )
    def test_what_is_no_port_is_refused(self, said, port, tail):
        assert said(f"{{host: a.example.org, port: {port}}}") == [f"15:52: {PLACE}.port {tail}"]

    def test_both_have_to_be_said(self, said):
        assert said("{host: a.example.org}") == [f"15:24: {PLACE}.port is missing: the port, such as 443"]
        assert said("{port: 443}") == [f"15:24: {PLACE}.host is missing: the exact name of the host"]

    def test_no_place_is_there_twice(self, said):
        assert said("{host: a.example.org, port: 443}, {host: a.example.org, port: 80}") == []
        (line,) = said("{host: a.example.org, port: 443}, {port: 443, host: a.example.org}")
        tail = "is a.example.org:443 for a second time; keep one of the two"
        assert line == f"15:58: sandbox.profiles.offline.egress.allow[1] {tail}"

    def test_an_empty_list_is_a_mistake(self, said):
        (line,) = said("")
        tail = "is empty, which is what no egress at all means; take egress out"
        assert line == f"15:23: sandbox.profiles.offline.egress.allow {tail}"

    def test_so_is_egress_without_a_list(self, findings):
        said = findings(("      limits:", "      egress: {}\n      limits:"))
        assert said == ["15:15: sandbox.profiles.offline.egress.allow is missing: the places that calls may reach"]


class TestSecrets:
    def headers(self, said, headers):
        return said(f"{{host: a.example.org, port: 443, secret_headers: {headers}}}")

    @pytest.mark.parametrize("headers", ["{Authorization: API_KEY}", "{X-Api-Key: _K1, 'x!y': A}", "{}"])
    def test_name_a_variable(self, said, headers):
        assert self.headers(said, headers) == []

    @pytest.mark.parametrize(
        "header",
        ["Host", "content-length", "Transfer-Encoding", "CONNECTION", "Proxy-Authorization", "proxy_connection", "TE",
         "Trailer", "Upgrade", "Keep-Alive", "Content_Length", "HTTP2-Settings"],
    )  # fmt: skip
    def test_decide_nothing_about_the_message(self, said, header):
        (line,) = self.headers(said, f"{{{header}: KEY}}")
        tail = "says how a message is carried, which is the proxy's alone to say; take it out"
        assert line.endswith(f"{PLACE}.secret_headers.{header} {tail}")

    def test_a_header_is_there_once_whatever_its_case(self, said):
        (line,) = self.headers(said, "{X-Key: A, x_key: B}")
        tail = "is there as 'X-Key', too, which servers take for the same header; keep one"
        assert line.endswith(f"{PLACE}.secret_headers.x_key {tail}")

    @pytest.mark.parametrize(
        "value",
        ["Bearer hunter2", "hunter2", "'123456'", "123456", "[hunter2]", "true", "$API_KEY", "api_key", "''", "1KEY"],
    )
    def test_a_value_in_place_of_a_name_is_refused_and_never_repeated(self, said, value):
        (line,) = self.headers(said, f"{{Authorization: {value}}}")
        tail = "is not the name of an environment variable, such as API_KEY; the secret itself never stands in a policy"
        assert line.endswith(f"{PLACE}.secret_headers.Authorization {tail}")
        assert "hunter2" not in line
        assert "123456" not in line

    def test_a_key_that_reads_like_a_name_is_known_for_what_it_is(self, said):
        (line,) = self.headers(said, "{Authorization: AKIAIOSFODNN7EXAMPLE}")
        assert "looks like a key; write the name of the environment variable that holds it" in line
        assert "AKIA" not in line

    @pytest.mark.parametrize("headers", ["'Authorization: hunter2'", "[hunter2]", "5"])
    def test_nor_does_a_text_in_place_of_a_mapping_get_repeated(self, said, headers):
        (line,) = self.headers(said, headers)
        assert line.endswith(
            f"{PLACE}.secret_headers is not a mapping; expected one such as {{Authorization: API_KEY}}"
        )

    @pytest.mark.parametrize("header", ["'Authorization: hunter2'", "'a b'", "'ä'", "''", f"'{'x' * 65}'"])
    def test_nor_does_a_header_in_place_of_its_name(self, said, header):
        (line,) = self.headers(said, f"{{{header}: KEY}}")
        assert line.endswith(
            f"{PLACE}.secret_headers has a key that is no name of a header; expected one such as Authorization"
        )

    def test_the_order_of_headers_keeps_the_digest(self):
        def policy(headers):
            place = {"host": "a.example.org", "port": 443, "secret_headers": headers}
            return small(sandbox__profiles__offline__egress={"allow": [place]})

        there = policy({"A": "X", "B": "Y"})
        assert digest(there) == digest(policy({"B": "Y", "A": "X"})) != digest(policy({"A": "Y", "B": "X"}))
        assert json.loads(there.model_dump_json())["sandbox"]["profiles"]["offline"]["egress"]["allow"]
