"""A proof shows one record to somebody without the log, and nothing that was not in it."""

from __future__ import annotations

import base64
import json

import pytest
from audit_stories import forget_checkpoints, open_log, plain_log
from typer.testing import CliRunner

from loopguard.audit import proof, read
from loopguard.audit.events import encode
from loopguard.audit.keys import VerifierKey, keygen
from loopguard.audit.proof import BrokenProofError
from loopguard.cli.audit import app
from loopguard.errors import AuditTamperedError, UsageError


@pytest.fixture(scope="module")
def signed(tmp_path_factory) -> tuple:
    """A log of 61 records, its vkey."""
    home = tmp_path_factory.mktemp("proof")
    path, vkey = keygen("gpu7", folder=home / "keys")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOOPGUARD_LOG_KEY", str(path))
        plain_log(home / "run", notes=60)
    return home / "run", vkey


@pytest.fixture
def made(signed) -> dict:
    return proof.prove(signed[0], 17)


class TestMaking:
    @pytest.mark.parametrize("seq", [1, 2, 17, 32, 33, 60, 61])
    def test_it_holds_for_each_record(self, signed, seq):
        run_dir, vkey = signed
        proven = proof.check(json.loads(json.dumps(proof.prove(run_dir, seq))), trusted=[vkey])
        assert proven.entry == read.at(run_dir, "controller", seq)
        assert (proven.checkpoint.size, proven.signer) == (61, vkey)

    def test_the_record_stands_there_as_in_the_log(self, signed, made):
        assert made["record"].encode() == read.segments(signed[0])[0].read_bytes().splitlines()[16]

    def test_it_is_small(self, made):
        assert len(made["proof"]) <= 6

    def test_of_a_record_that_is_not_there_it_says_which_are(self, signed):
        with pytest.raises(UsageError, match="has no record 62 in stream controller; it has 1 to 61"):
            proof.prove(signed[0], 62)
        with pytest.raises(UsageError, match="has no record 0"):
            proof.prove(signed[0], 0)

    def test_without_a_checkpoint_there_is_none(self, tmp_path):
        plain_log(tmp_path / "run")
        forget_checkpoints(tmp_path / "run")
        with pytest.raises(UsageError, match="no checkpoint stands for record 3 yet"):
            proof.prove(tmp_path / "run", 3)
        with pytest.raises(UsageError, match="holds no audit log"):
            proof.prove(tmp_path / "nothing", 3)

    def test_of_a_log_that_is_being_written_the_last_checkpoint_counts(self, tmp_path):
        with open_log(tmp_path / "run", checkpoint_every=10) as log:
            for _ in range(14):
                log.append("note.added")
            assert proof.check(proof.prove(tmp_path / "run", 4)).checkpoint.size == 10
            with pytest.raises(UsageError, match="no checkpoint stands for record 12 yet"):
                proof.prove(tmp_path / "run", 12)

    def test_a_rewritten_log_proves_nothing(self, tmp_path):
        """Each hash is right; the checkpoint is of other records."""
        plain_log(tmp_path / "run")
        path = read.segments(tmp_path / "run")[0]
        lines, prev = [], "0" * 64
        for line in path.read_bytes().splitlines():
            fields = json.loads(line) | {"prev": prev, "cycle": 5}
            made, prev = encode(fields)
            lines.append(made)
        path.write_bytes(b"".join(lines))
        with pytest.raises(AuditTamperedError, match="does not stand for the records of the log"):
            proof.prove(tmp_path / "run", 3)

    @pytest.mark.parametrize("note", ["run-a/controller\n11\n", "run-a/controller\n12\n" + "A" * 43 + "=\n"])
    def test_a_damaged_checkpoint_proves_nothing(self, tmp_path, note):
        plain_log(tmp_path / "run")
        (tmp_path / "run/audit/controller/checkpoints/11.note").write_text(note)
        with pytest.raises(AuditTamperedError, match="verify"):
            proof.prove(tmp_path / "run", 3)


class TestChecking:
    def test_without_a_key_nobody_vouches_for_it(self, made):
        assert proof.check(made).signer is None
        stranger = VerifierKey("gpu7", bytes(32))
        assert proof.check(made, trusted=[stranger]).signer is None

    def test_each_changed_byte_of_the_record_breaks_it(self, made, signed):
        record = made["record"]
        for at in range(0, len(record), 3):
            changed = record[:at] + chr(ord(record[at]) ^ 1) + record[at + 1 :]
            with pytest.raises(BrokenProofError):
                proof.check(made | {"record": changed}, trusted=[signed[1]])

    def test_another_record_is_not_proven_by_it(self, made, signed):
        """Neither one of the same log, nor one that was made up and hashes right."""
        for record in (proof.prove(signed[0], 18)["record"], made_up(made["record"])):
            with pytest.raises(BrokenProofError, match="is not among the 61"):
                proof.check(made | {"record": record}, trusted=[signed[1]])

    @pytest.mark.parametrize("at", range(6))
    def test_a_changed_hash_breaks_it(self, made, at):
        nodes = list(made["proof"])
        nodes[at] = base64.b64encode(bytes(32)).decode()
        with pytest.raises(BrokenProofError, match="is not among the 61"):
            proof.check(made | {"proof": nodes})

    def test_hashes_too_few_or_too_many_break_it(self, made):
        for nodes in (made["proof"][:-1], [*made["proof"], made["proof"][0]]):
            with pytest.raises(BrokenProofError, match="the proof has"):
                proof.check(made | {"proof": nodes})

    def test_a_changed_checkpoint_breaks_it(self, made, signed):
        """With the key by its signature, without it by the root. The size alone stands in no hash of the proof."""
        smaller = made["checkpoint"].replace("\n61\n", "\n60\n")
        with pytest.raises(BrokenProofError, match="did not make"):
            proof.check(made | {"checkpoint": smaller}, trusted=[signed[1]])
        root = base64.b64encode(bytes(32)).decode()
        origin, size, _, *rest = made["checkpoint"].split("\n")
        with pytest.raises(BrokenProofError, match="is not among the 61"):
            proof.check(made | {"checkpoint": "\n".join([origin, size, root, *rest])})

    def test_a_checkpoint_of_another_log_breaks_it(self, made):
        with pytest.raises(BrokenProofError, match="the record is of run-a/controller, the checkpoint of run-b"):
            proof.check(made | {"checkpoint": made["checkpoint"].replace("run-a", "run-b")})

    @pytest.mark.parametrize(
        "change",
        [
            *({"format": "v2"}, {"more": 1}, {"record": 1}, {"checkpoint": None}),
            *({"proof": "x"}, {"proof": [1]}, {"proof": ["AAAA"]}),
        ],
    )
    def test_what_is_no_proof_is_a_usage_error(self, made, change):
        with pytest.raises(UsageError):
            proof.check(made | change)
        with pytest.raises(UsageError):
            proof.check([])


def made_up(record: str) -> str:
    line, _ = encode(json.loads(record) | {"body": {"text": "never happened"}})
    return line.decode().strip()


class TestCommands:
    def run(self, *words):
        return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)

    def test_prove_and_check(self, signed, tmp_path):
        run_dir, vkey = signed
        file = tmp_path / "proof.json"
        file.write_text(self.run("prove", run_dir, 17).stdout)
        told = self.run("prove", "--check", file, "--key", vkey)
        assert told.exit_code == 0
        assert told.stdout.startswith("PROVEN (0): record 17 is among the 61 of run-a/controller, signed by gpu7+")
        assert "note 15" in told.stdout
        told = self.run("prove", "--check", file)
        assert (told.exit_code, "consistent, authorship unproven" in told.stdout) == (20, True)
        stranger = VerifierKey("other", bytes(32))
        assert self.run("prove", "--check", file, "--key", stranger).exit_code == 20
        file.write_text(file.read_text().replace("note 15", "note 16"))
        told = self.run("prove", "--check", file, "--key", vkey)
        assert (told.exit_code, told.stdout.partition(":")[0]) == (30, "BROKEN (30)")

    @pytest.mark.parametrize("words", [[], ["run"], ["run", "3", "--check", "x"], ["run", "3", "--key", "x"]])
    def test_prove_is_one_thing_or_the_other(self, words):
        with pytest.raises(UsageError, match="give RUN_DIR and SEQ to make a proof, or --check FILE"):
            self.run("prove", *words)

    def test_a_file_that_is_no_proof_is_a_usage_error(self, tmp_path):
        with pytest.raises(UsageError, match="cannot be read as a proof"):
            self.run("prove", "--check", tmp_path / "none.json")

    def test_keygen_prints_the_vkey_alone_and_says_where_the_key_is(self, tmp_path):
        told = self.run("keygen", "gpu7", "--out", tmp_path / "keys")
        assert VerifierKey.parse(told.stdout).name == "gpu7"
        assert told.stdout == (tmp_path / "keys/log.vkey").read_text()
        assert f"LOOPGUARD_LOG_KEY={tmp_path}/keys/log.key" in told.stderr
        assert "PRIVATE" not in told.output

    def test_verify_always_says_what_it_trusted(self, signed, tmp_path):
        run_dir, vkey = signed
        kept = tmp_path / "kept.note"
        kept.write_text((run_dir / "audit/controller/checkpoints/61.note").read_text())
        told = self.run("verify", run_dir)
        assert told.exit_code == 20
        for line in ("trusted key: none", "trusted anchor: none"):
            assert line in told.stdout.splitlines()
        assert "authorship: no key was given: consistent, authorship unproven" in told.stdout
        told = self.run("verify", run_dir, "--key", vkey, "--anchors", kept)
        assert told.exit_code == 0
        for line in (f"trusted key: {vkey}", "authorship: records 1-61 are signed by gpu7"):
            assert line in told.stdout.splitlines()
        assert f"trusted anchor: controller up to record 61: {kept}" in told.stdout.splitlines()
        facts = json.loads(self.run("verify", run_dir, "--key", vkey, "--anchors", kept, "--json").stdout)
        assert (facts["keys"], facts["streams"][0]["signed"], facts["streams"][0]["proven"]) == ([str(vkey)], 61, 61)
