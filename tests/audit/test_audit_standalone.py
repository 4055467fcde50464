"""The verifier that stands alone, and the one of the package: every vector, every attack, one code."""

from __future__ import annotations

import ast
import base64
import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import ClassVar

import make_vectors
import pytest
import test_audit_attacks as attacks
import test_audit_blobs as payloads
import test_audit_compress as compressed
import test_audit_prune as pruned
import test_audit_verify as forgeries
from audit_stories import frozen_twice, open_log
from cryptography.exceptions import InvalidSignature
from people import Person

from loopguard.audit import read, standalone
from loopguard.audit.anchors import Anchor
from loopguard.audit.events import encode
from loopguard.audit.verify import STATUS, verify
from loopguard.errors import UsageError

VECTORS = json.loads((make_vectors.HOME / "index.json").read_text())
FILE = Path(standalone.__file__)


@pytest.fixture(autouse=True, scope="module")
def _no_writer():
    """Nobody writes here, so that there is nobody to wait for at a cut line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "_WRITER_GRACE_S", 0)
        yield


def ours(run_dir, **options):
    """The code of the package's verifier; 2 for what it takes no more from its reader."""
    try:
        return verify(run_dir, **options).code
    except UsageError:
        return 2


def alone(run_dir, *, expect_head=None, keys=(), anchors=(), without_payloads=False):
    """The code of the one that stands alone, through its command line."""
    words = [str(run_dir), *(["--expect-head", expect_head] if expect_head is not None else [])]
    words += [word for key in keys for word in ("--key", str(key))]
    words += [word for place in anchors for word in ("--anchors", str(place))]
    words += ["--without-payloads"] if without_payloads else []
    return standalone.main(words)


def both(run_dir, **options):
    """What `verify` gives, once the other one has given the same code."""
    if options.get("stream") is None:
        assert alone(run_dir, **options) == ours(run_dir, **options)
    return verify(run_dir, **options)


@pytest.fixture
def _both(monkeypatch):
    for module in (attacks, forgeries, compressed, pruned, payloads):
        monkeypatch.setattr(module, "verify", both)


class TestVectors:
    """Small logs as files, for whoever writes a verifier: each has one code."""

    def options(self, vector):
        home = make_vectors.HOME / vector["name"]
        anchors = [home / place for place in vector.get("anchors", ())]
        given = {"expect_head": vector.get("head"), "keys": vector.get("keys", ()), "anchors": anchors}
        return given | {"without_payloads": vector.get("without_payloads", False)}

    @pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
    def test_both_verifiers_give_the_code_of_the_vector(self, vector):
        run_dir, options = make_vectors.HOME / vector["name"] / "run", self.options(vector)
        assert (ours(run_dir, **options), alone(run_dir, **options)) == (vector["code"], vector["code"]), vector["says"]

    def test_every_class_has_vectors(self):
        assert {vector["code"] for vector in VECTORS} == {*STATUS, 2}

    def test_each_is_named_for_its_class(self):
        names = STATUS | {2: "usage"}
        assert {v["name"] for v in VECTORS if v["name"].partition("-")[0] != names[v["code"]]} == set()

    def test_they_are_what_the_script_makes(self, tmp_path):
        """The same bytes, each time."""
        make_vectors.make(tmp_path / "vectors")
        assert differences(filecmp.dircmp(tmp_path / "vectors", make_vectors.HOME)) == []


def differences(found: filecmp.dircmp) -> list[str]:
    """Every file that is only in one of two folders, or differs in its bytes."""
    _, wrong, unread = filecmp.cmpfiles(found.left, found.right, found.common_files, shallow=False)
    below = [name for folder in found.subdirs.values() for name in differences(folder)]
    return [*found.left_only, *found.right_only, *wrong, *unread, *below]


# Every attack and every forgery once more, with both verifiers: each call of `verify` in them compares the codes.

story = attacks.story
old = pruned.old
run = payloads.run


@pytest.mark.usefixtures("_both")
class TestUntouched(attacks.TestUntouched):
    pass


@pytest.mark.usefixtures("_both")
class TestEdits(attacks.TestEdits):
    pass


@pytest.mark.usefixtures("_both")
class TestCuts(attacks.TestCuts):
    pass


@pytest.mark.usefixtures("_both")
class TestRewrites(attacks.TestRewrites):
    pass


@pytest.mark.usefixtures("_both")
class TestKeysInForce(attacks.TestKeysInForce):
    pass


@pytest.mark.usefixtures("_both")
class TestAnchorsOfOthers(attacks.TestAnchorsOfOthers):
    pass


@pytest.mark.usefixtures("_both")
class TestOtherStreams(attacks.TestOtherStreams):
    pass


@pytest.mark.usefixtures("_both")
class TestForgery(forgeries.TestForgery):
    pass


@pytest.mark.usefixtures("_both")
class TestProtocol(forgeries.TestProtocol):
    pass


@pytest.mark.usefixtures("_both")
class TestSurroundings(forgeries.TestSurroundings):
    pass


@pytest.mark.usefixtures("_both")
class TestDamage(compressed.TestDamage):
    @pytest.fixture
    def run_dir(self, tmp_path):
        return tmp_path / "run"

    def test_no_more_is_unpacked_than_any_segment_holds(self, run_dir, monkeypatch):
        monkeypatch.setattr(standalone, "SEGMENT_BYTES", 1000)
        super().test_no_more_is_unpacked_than_any_segment_holds(run_dir, monkeypatch)


class Pruned:
    """Where `pruned` begins: an old log."""

    @pytest.fixture
    def run_dir(self, old, tmp_path):
        shutil.copytree(old, tmp_path / "run")
        return tmp_path / "run"


@pytest.mark.usefixtures("_both")
class TestJudgement(Pruned, pruned.TestJudgement):
    pass


@pytest.mark.usefixtures("_both")
class TestAgainstKeptHeads(Pruned, pruned.TestAgainstKeptHeads):
    pass


@pytest.mark.usefixtures("_both")
class TestThieves(Pruned, pruned.TestThieves):
    pass


@pytest.mark.usefixtures("_both")
class TestPrunedStreams(Pruned, pruned.TestStreams):
    pass


@pytest.mark.usefixtures("_both")
class TestPayloads(payloads.TestCheck):
    def test_what_the_disk_refuses_is_unreadable(self, run, monkeypatch):
        def refuse(path):
            raise PermissionError(f"{path} is not for you")

        monkeypatch.setattr(standalone, "digest_of", refuse)
        super().test_what_the_disk_refuses_is_unreadable(run, monkeypatch)


class TestAlone:
    """As an auditor runs it: one file, in an empty folder, that imports nothing of ours."""

    def run(self, tmp_path, *words):
        (tmp_path / "alone").mkdir()
        shutil.copy(FILE, tmp_path / "alone" / "standalone.py")
        # Isolated (-I): neither this folder nor what is installed for development is on the path, but cryptography is.
        command = [sys.executable, "-I", "standalone.py", *map(str, words)]
        return subprocess.run(command, cwd=tmp_path / "alone", capture_output=True, text=True, check=False)

    def test_an_auditor_can_read_it(self):
        """All of it, blank lines and docstrings included; whatever comes to the format has to find room."""
        assert len(FILE.read_text().splitlines()) < 880

    def test_it_needs_the_standard_library_and_cryptography(self):
        imported = {name.partition(".")[0] for name in imports(ast.parse(FILE.read_text()))}
        assert imported - sys.stdlib_module_names == {"cryptography"}

    def test_a_copy_of_the_file_says_what_it_found_and_exits_with_the_code(self, tmp_path):
        (vector,) = [vector for vector in VECTORS if vector["name"] == "ok-signed-and-kept"]
        home = make_vectors.HOME / vector["name"]
        done = self.run(tmp_path, home / "run", "--key", *vector["keys"], "--anchors", home / "anchors.jsonl")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[:2] == ["OK (0)", f"trusted key: {make_vectors.VKEY}"]

    def test_json_names_the_finding_and_the_head(self, tmp_path):
        done = self.run(tmp_path, make_vectors.HOME / "protocol-denied-call" / "run", "--json")
        found = json.loads(done.stdout)
        assert (done.returncode, found["code"], found["status"]) == (40, 40, "protocol")
        assert "call c1 ended, and no decision allowed it" in found["findings"][0]
        assert found["streams"]["controller"]["head"].startswith("3:")

    def test_bad_usage_is_2_and_says_why(self, tmp_path):
        done = self.run(tmp_path, make_vectors.HOME / "usage-head" / "run", "--expect-head", "latest")
        assert (done.returncode, done.stdout) == (2, "")
        assert "is not SEQ:HASH or HASH" in done.stderr

    def test_text_of_strangers_is_escaped(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("tool.finished", {"call": "\x1b[31m\u202e"})
        done = self.run(tmp_path, tmp_path / "run")
        assert "\\u001b[31m\\u202e" in done.stdout

    def test_anchors_in_a_repository(self, tmp_path):
        place = tmp_path / "anchors"
        subprocess.run(["git", "init", "-q", place], check=True)
        with open_log(tmp_path / "run", anchors=[Anchor(kind="git", place=str(place))]) as log:
            log.append("note.added")
        assert (ours(tmp_path / "run", anchors=[place]), alone(tmp_path / "run", anchors=[place])) == (0, 0)

    def test_it_writes_nothing(self, tmp_path):
        frozen_twice(tmp_path / "run", updates=16, calls=4)
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert alone(tmp_path / "run") == 20
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


class TestApprovals:
    """Every kind of key that ssh-keygen has and we take, and what it makes of the same text otherwise."""

    STATEMENT: ClassVar = {"requester": "sam"}
    MESSAGE = b'{"requester":"sam"}\n'

    def counted(self, armored, line, at="2030-06-01T00:00:00.000000Z", **rule):
        rule = {"people": {"dana": [line]}, "requester_may_approve": False} | rule
        return standalone.approval_in({"signature": armored}, self.STATEMENT, rule, set(), at)

    @pytest.mark.parametrize("kind", ["ed25519", "p256", "rsa", "sk"])
    @pytest.mark.parametrize("digest", ["sha256", "sha512"])
    def test_one_of_each_kind_counts(self, kind, digest):
        dana = Person("dana", kind)
        found = self.counted(dana.sign(self.MESSAGE, digest=digest), dana.line)
        assert (found["person"], found["key"]) == ("dana", dana.fingerprint)

    @pytest.mark.parametrize("kind", ["ed25519", "p256", "rsa", "sk"])
    def test_over_other_bytes_it_does_not(self, kind):
        dana = Person("dana", kind)
        with pytest.raises((ValueError, InvalidSignature)):
            self.counted(dana.sign(self.MESSAGE + b" "), dana.line)

    @pytest.mark.parametrize(
        ("kind", "how"),
        [
            ("ed25519", {"namespace": "git"}),
            ("ed25519", {"digest": "sha384"}),
            ("ed25519", {"version": 2}),
            ("ed25519", {"algorithm": "ssh-ed448"}),
            ("rsa", {"algorithm": "ssh-rsa"}),
            ("sk", {"touched": 0}),
        ],
    )
    def test_made_in_another_way_it_does_not(self, kind, how):
        dana = Person("dana", kind)
        with pytest.raises((ValueError, InvalidSignature)):
            self.counted(dana.sign(self.MESSAGE, **how), dana.line)

    def test_a_short_rsa_key_does_not(self):
        dana = Person("dana", "rsa", bits=1024)
        with pytest.raises(ValueError, match="too short"):
            self.counted(dana.sign(self.MESSAGE), dana.line)

    @pytest.mark.parametrize(
        ("options", "counts"),
        [
            ('valid-after="20300601Z"', True),
            ('valid-after="20300601000001Z"', False),
            ('valid-before="203006010001Z"', True),
            ('VALID-BEFORE="20300601Z"', False),
            ('namespaces="git,loopguard-approve@v1",valid-after="20300101Z"', True),
            ('namespaces="git"', False),
            ('valid-after="20300231Z"', False),
            ('valid-after="2030Z"', False),
            ("cert-authority", False),
        ],
    )
    def test_options_of_a_key_are_those_of_ssh(self, options, counts):
        dana = Person("dana")
        told = dana.sign(self.MESSAGE)
        if counts:
            assert self.counted(told, f"{options} {dana.line}")["person"] == "dana"
        else:
            with pytest.raises((ValueError, InvalidSignature)):
                self.counted(told, f"{options} {dana.line}")

    def test_text_of_strangers_ends_in_a_finding_and_in_nothing_else(self):
        """Every signature that is cut, and every one with a byte turned."""
        dana = Person("dana", "sk")
        told = dana.sign(self.MESSAGE)
        data = base64.b64decode("".join(told.splitlines()[1:-1]))
        turned = [data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :] for at in range(len(data))]
        for forged in [data[:at] for at in range(len(data))] + turned + [data + b"x"]:
            text = base64.b64encode(forged).decode()
            with pytest.raises((ValueError, InvalidSignature)):
                self.counted(f"-----BEGIN SSH SIGNATURE-----\n{text}\n-----END SSH SIGNATURE-----\n", dana.line)


class TestForgedValues:
    """Records with values that no writer writes, each hashed right: no traceback, and one code from both."""

    ODD = (
        None,
        True,
        0,
        -1,
        2**53,
        10**30,
        1.5,
        "",
        "x",
        "0" * 64,
        "2030-01-01T00:00:05.000000Z",
        [],
        {},
        [None],
        "f1",
    )

    @pytest.mark.parametrize("seed", range(100))
    def test_both_verifiers_give_one_code(self, seed, tmp_path):
        random = Random(seed)
        usable = [one["name"] for one in VECTORS if one["code"] in {0, 10, 40, 41} and not one.get("anchors")]
        usable = [name for name in usable if any((make_vectors.HOME / name).rglob("seg-*.jsonl"))]
        shutil.copytree(make_vectors.HOME / random.choice(usable) / "run", tmp_path / "run")
        path = random.choice(sorted((tmp_path / "run/audit/controller").glob("seg-*.jsonl")))
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        for _ in range(random.randint(1, 3)):
            self.change(random, random.choice(records)["body"], random.choice(records)["body"])
        lines = [*hashed_anew(records)]
        path.write_bytes(b"".join(lines))
        for line in (line for line, record in zip(lines, records, strict=True) if record["type"] == "log.pruned"):
            path.with_name("pruned.json").write_bytes(line)  # or nothing would be asked but whether the two agree
        assert alone(tmp_path / "run") == ours(tmp_path / "run")

    def change(self, random, body, other):
        """Another value for a member, deep down or on top: an odd one, or one that stands elsewhere in the log."""
        while body:
            name = random.choice([*body])
            if isinstance(body[name], dict) and random.random() < 0.7:
                body = body[name]
                continue
            body[name] = random.choice([*self.ODD, *other.values()])
            return


def hashed_anew(records):
    prev = records[0]["prev"]
    for record in records:
        line, prev = encode({**record, "prev": prev})
        yield line


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize(
    "place", ["run.json", "state.json", "audit/controller/seg-000000000009.jsonl", "audit/controller/pruned.json",
              "audit/controller/checkpoints/3.note", f"policy/{'a' * 64}.yaml"],
)  # fmt: skip
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(tmp_path, place):
    """In processes of their own: one that waits for ever is ended, and fails."""
    shutil.copytree(make_vectors.HOME / "ok-approved" / "run", tmp_path / "run")
    pipe = tmp_path / "run" / place
    pipe.parent.mkdir(parents=True, exist_ok=True)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    for module in (["loopguard.cli", "audit", "verify"], ["loopguard.audit.standalone"]):
        command = [sys.executable, "-m", *module, str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 50, done.stderr
        assert "is neither a file nor a folder" in done.stdout
