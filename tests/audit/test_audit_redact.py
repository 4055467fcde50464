"""Secrets in text: what is found, what is left alone, and where a text is cut."""

from __future__ import annotations

import base64
import hashlib
import inspect
import random
import uuid

import pytest

from loopguard.audit import redact
from loopguard.audit.redact import clean, head, words

# Put together here, so that nobody's scanner takes this file for a leak.
ALNUM = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
GITHUB = "ghp_" + ALNUM
PEM = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEow" + ALNUM + "\n-----END RSA " + "PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N"

SHAPED = {
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "aws session": "ASIA" + "IOSFODNN7EXAMPLE",
    "github": GITHUB,
    "github app": "ghs_" + ALNUM,
    "github fine": "github_pat_" + "11ABCDEFG0" + ALNUM,
    "gitlab": "glpat-" + ALNUM[:20],
    "slack": "xoxb-" + "1234567890-" + ALNUM,
    "slack app": "xapp-1-" + "A0123456789-" + ALNUM,
    "openai": "sk-" + ALNUM + ALNUM[:12],
    "openai project": "sk-proj-" + ALNUM + "_-" + ALNUM,
    "anthropic": "sk-ant-" + "api03-" + ALNUM,
    "hugging face": "hf_" + ALNUM[:34],
    "google": "AIza" + ALNUM[:35],
    "google oauth": "ya29." + ALNUM,
    "stripe": "sk_" + "live_" + ALNUM[:24],
    "npm": "npm_" + ALNUM,
    "pypi": "pypi-" + "AgEIcHlwaS5vcmc" + ALNUM,
    "sendgrid": "SG." + ALNUM[:22] + "." + ALNUM,
    "webhook": "whsec_" + ALNUM[:32],
    "private key": PEM,
    "cut private key": PEM[:60],
    "jwt": JWT,
}

NAMED = [
    ("--password hunter2", "hunter2"),
    ("mysql --password=hunter2 -u bob", "hunter2"),
    ("tool --api-key abc --verbose", "abc"),
    ("tool --db-password 'correct horse'", "correct horse"),
    ("login --token abcdef", "abcdef"),
    ("password = 'hunter2'", "hunter2"),
    ('password: str = "hunter2"', "hunter2"),
    ('if password == "hunter2":', "hunter2"),
    ('os.environ["API_KEY"] = "abc"', "abc"),
    ('{"api_key": "xyz", "n": 1}', "xyz"),
    ('{\\"client_secret\\": \\"xyz\\"}', "xyz"),
    ("apiKey: 'xyz'", "xyz"),
    ("access_token='hunter2'", "hunter2"),
    ("DB_PASSWORD=tiger", "tiger"),
    ("export OPENAI_API_KEY=abcdef && python x.py", "abcdef"),
    ("WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567", "0123456789abcdef"),
    ("password=hunter2&user=bob", "hunter2"),
    ("host=db password=pa55word dbname=x", "pa55word"),
    ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalrXUtnFEMI"),
    ("token: password=hunter2", "hunter2"),
    ("Authorization: Bearer abcdefgh", "abcdefgh"),
    ("curl -H 'Authorization: Basic dXNlcjpwYXNz'", "dXNlcjpwYXNz"),
    ('{"Authorization": "token 0123456789abcdef"}', "0123456789abcdef"),
    ("bearer abcdef0123456789abcdef", "abcdef0123456789abcdef"),
    ("postgres://bob:tiger@db.example.org/x", "tiger"),
    ("https://oauth2:abc@git.example.org/r.git", "abc"),
    ("redis://:tiger@cache:6379/0", "tiger"),
    ("postgres://bob:p@ssw0rd@db.example.org/x", "ssw0rd"),
    ('password             = "hunter2"', "hunter2"),
    ("DB_PASSWORD          =      tiger9", "tiger9"),
    ('password = """hunter2"""', "hunter2"),
    ("password = '''hunter2'''", "hunter2"),
    ('password: str | None = "hunter2"', "hunter2"),
    ("{\\'password\\': \\'hunter2\\'}", "hunter2"),
    ('{\\\\\\"password\\\\\\": \\\\\\"hunter2\\\\\\"}', "hunter2"),
    ("it isn't password = 'hunter2'", "hunter2"),
    ('x = "a"; password = ") hunter2"', "hunter2"),
    ("api_key: c2VjcmV0LWtleQ==", "c2VjcmV0LWtleQ"),
    ("api_key: c2VjcmV0LWtleS0=\nuser: somebody1", "c2VjcmV0LWtleS0"),
]

LEFT_ALONE = [
    hashlib.sha256(b"x").hexdigest(),
    hashlib.sha1(b"x").hexdigest(),
    str(uuid.UUID(int=0x0123456789ABCDEF0123456789ABCDEF)),
    base64.b64encode(random.Random(0).randbytes(600)).decode(),
    "data:image/png;base64," + base64.b64encode(random.Random(1).randbytes(600)).decode(),
    "sk-learn, task-0123456789abcdef0123456789abcdef, risk-management-of-a-large-organisation",
    "hf_hub_download(repo_id='x/y', filename='z')",
    "password = get_password()",
    "login(user, password=password)",
    "self.password = config2.password",
    "def f(password: str, token: str = '') -> None:",
    "def f(api_key: str | None = None):",
    "token = line.split()[0]",
    "tokens: 512, token: abc, max_tokens=256, pad_token='<pad>', eos_token=\"</s>\"",
    "next_token = logits.argmax(-1)",
    "API_KEY=$KEY",
    "API_KEY=${KEY} tool --api-key $KEY --token-limit 5",
    "PWD=/home/dana OLDPWD=/home",
    "f'Bearer {token}'",
    "the bearer of bad news has a basic understanding",
    "https://{user}:{password}@host/",
    "http://host.example.org:8080/path?x=a@b",
    "git@github.com:owner/repo.git",
    "keyword arguments; the key is: sort by value",
    "a password is at least eight characters",
    "password: ********",
    'password = "" + rest + ""',
    'password = getpass.getpass("Enter password: ")\nprint("hi")',
    "print(\"secret =\", secret); print('password:', password)",
    'raise ValueError("no password: " "give one")',
    "fetch(url, {credentials: 'include'})",
    "password=[secret: password or key]",
    "rule calculator allows it",
    "loss fell from 0.4172 to 0.02468, 30.2 times its noise, since update 461",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHwqyk dana@desk",
    "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29t dana@key",
]


@pytest.mark.parametrize("secret", SHAPED.values(), ids=SHAPED)
@pytest.mark.parametrize(
    "around",
    [
        *("{}", "x = '{}'", "before {} behind", '{{"a": ["{}"]}}', "ä\n\t{}\n", "a={};b"),
        *("b'a\\n{}\\n'", "a\\x00{}\\x00", "'a\\u0027{}\\u0027'", "?a%3D{}%26", "\x1b[1;32m{}\x1b[0m", "\x1b[m{}"),
    ],
)
def test_a_secret_is_known_by_its_shape_wherever_it_stands(secret, around):
    cleaned = clean(around.format(secret))
    assert secret[:40] not in cleaned
    assert secret[12:] not in cleaned
    assert "[secret: " in cleaned


@pytest.mark.parametrize(("text", "secret"), NAMED)
def test_what_a_text_calls_a_secret_is_one(text, secret):
    cleaned = clean(f"first {text}")
    assert secret not in cleaned
    assert "[secret: " in cleaned
    assert cleaned.startswith("first ")


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_what_only_looks_like_one_is_left_alone(text):
    assert clean(text) == text


@pytest.mark.parametrize("module", [redact, hashlib, base64, random, uuid, inspect])
def test_source_code_is_left_alone_but_for_known_false_alarms(module):
    """Of the lines of whole modules, none but the examples of passwords that they quote themselves."""
    lines = inspect.getsource(module).splitlines()
    assert [line for line in lines if clean(line) != line and "password" not in line] == []


@pytest.mark.parametrize("text", [*SHAPED.values(), *(text for text, _ in NAMED), *LEFT_ALONE])
def test_what_was_cleaned_is_clean(text):
    """A record that is made from another record's text changes nothing more."""
    assert clean(clean(text)) == clean(text)
    assert head(head(text)[0])[0] == head(text)[0]


@pytest.mark.parametrize("text", [*SHAPED.values(), *(text for text, _ in NAMED)])
def test_no_secret_is_missed_by_the_quick_look(text):
    assert redact.suspicious(text)


def test_the_rest_of_the_text_stays():
    assert clean(f"git clone https://bob:tiger@host/r && echo {GITHUB} done") == (
        "git clone https://[secret: login in an address]@host/r && echo [secret: github token] done"
    )


def test_two_shapes_over_the_same_place_are_one():
    assert clean(f"Authorization: Bearer {JWT}").count("[secret: ") == 1
    assert JWT[:20] not in clean(f"Authorization: Bearer {JWT}")


@pytest.mark.parametrize("before", ["a\\n", "%0A", "\x1b[33m"])
def test_a_header_is_known_behind_an_escape_too(before):
    assert ALNUM not in clean(f"{before}Bearer {ALNUM}")


class TestHead:
    @pytest.mark.parametrize("secret", SHAPED.values(), ids=SHAPED)
    @pytest.mark.parametrize("shown", [1, 4, 7, 12])
    def test_a_secret_across_the_cut_is_known_by_what_is_cut_off(self, secret, shown):
        """Cut first and looked at then, it would be a few characters of a key that nobody recognises."""
        before = " " * (redact.HEAD_CHARS - shown)
        cut, had_secrets = head(f"{before}{secret} and more")
        assert had_secrets
        assert cut.startswith(f"{before}[secret: ")
        assert secret[:shown] not in cut.removeprefix(before).partition("[secret: ")[0]

    def test_a_web_token_is_known_however_far_behind_the_cut_it_ends(self):
        header, claims, signature = JWT.split(".")
        cut, had_secrets = head(f"x = '{header}.{claims * 60}.{signature}'")
        assert had_secrets
        assert claims[:20] not in cut

    def test_a_value_across_the_cut_is_known_by_its_name(self):
        cut, _ = head("#" * 170 + " password = 'a very long pass phrase that goes on and on'")
        assert "phrase" not in cut
        assert "on and on" not in cut

    def test_what_begins_behind_the_cut_is_not_shown_in_its_place(self):
        """A secret is longer than what stands for it; nothing of what follows moves up."""
        text = PEM * 3 + "x" * 300 + GITHUB
        cut, _ = head(text)
        assert "x" not in cut.replace("private", "")
        assert GITHUB[:12] not in cut

    @pytest.mark.parametrize("length", [0, 1, 199, 200, 201, 711, 712, 713, 5000])
    def test_a_text_without_secrets_is_cut_and_nothing_else(self, length):
        assert head("ä" * length) == ("ä" * min(length, 200), False)


class TestWords:
    @pytest.mark.parametrize(
        "command",
        [
            ["tool", "--password", "hunter2", "run"],
            ["tool", "--db-api-key", "hunter2", "run"],
            ["tool", "-token", "hunter2", "run"],
            ["tool", "--password=hunter2", "run"],
            ["tool", "PASSWORD=hunter2", "run"],
            ["sh", "-c", "tool --password hunter2", "run"],
            ["tool", "--password=a hunter2", "run"],
            ["tool", "--password=a&hunter2", "run"],
            ["tool", "PASSWORD=a;hunter2", "run"],
            ["tool", "-Ddb.password=hunter(2)hunter2", "run"],
        ],
    )
    def test_a_secret_in_the_next_word_is_found(self, command):
        cleaned = words(command)
        assert "hunter2" not in " ".join(cleaned)
        assert (cleaned[0], cleaned[-1], len(cleaned)) == (command[0], "run", len(command))

    @pytest.mark.parametrize(
        "command", [["loopguard", "run", "toolformer", "--seed", "3"], ["tool", "--password", "--verbose"], []]
    )
    def test_other_words_stay(self, command):
        assert words(command) == command
