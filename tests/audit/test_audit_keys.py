"""Keys and signatures are those of C2SP signed notes; a key that cannot be trusted to be secret is not used."""

from __future__ import annotations

import base64
import os

import pytest

from loopguard.audit import keys
from loopguard.audit.keys import SigningKey, VerifierKey, keygen, log_key, trusted
from loopguard.audit.notes import BadNoteError, Checkpoint, Note
from loopguard.errors import UsageError

# The example of golang.org/x/mod/sumdb/note, which the specification of signed notes comes from.
PETER = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
PETER_VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
PETER_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
PETER_SIGNED = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
# The example of the specification itself, c2sp.org/signed-note, and the one of c2sp.org/tlog-checkpoint.
SPEC_VKEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
SPEC_SIGNED = "Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM="
SPEC_CHECKPOINT = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— example.com/behind-the-sofa "
    "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
)
POINT = Checkpoint("run-a/controller", 7, bytes(range(32)))


def key(name: str = "gpu7", number: int = 1) -> SigningKey:
    return SigningKey(name, bytes([number]) * 32)


class TestKnownAnswers:
    def test_a_signing_key_reads_writes_and_signs_as_go_does(self):
        peter = SigningKey.parse(PETER, place="here")
        assert peter.text() == PETER
        assert str(peter.public) == PETER_VKEY
        assert base64.b64encode(peter.public.id + peter.sign(PETER_TEXT)).decode() == PETER_SIGNED

    def test_a_vkey_checks_what_others_signed(self):
        foo = VerifierKey.parse(SPEC_VKEY)
        signed = base64.b64decode(SPEC_SIGNED)
        assert (foo.name, foo.id, str(foo)) == ("example.com/foo", signed[:4], SPEC_VKEY)
        assert foo.signed("This is an example message.\n", signed[4:])
        assert not foo.signed("This is an example message!\n", signed[4:])

    def test_the_checkpoint_of_the_specification_is_read(self):
        note = Note.parse(SPEC_CHECKPOINT)
        assert (note.checkpoint.origin, note.checkpoint.size) == ("example.com/behind-the-sofa", 20852163)
        assert SPEC_CHECKPOINT.startswith(note.checkpoint.text())
        assert note.signatures[0][0] == "example.com/behind-the-sofa"


class TestNotes:
    def test_a_signed_note_says_who_signed_it(self):
        note = Note.parse(POINT.note(key()))
        assert note.checkpoint == POINT
        assert note.signer([key().public]) == key().public

    def test_a_note_without_a_key_is_its_three_lines_and_nobody_signed_it(self):
        text = POINT.note(None)
        assert text == POINT.text()
        assert text.count("\n") == 3
        assert Note.parse(text).signer([key().public]) is None

    def test_signatures_of_strangers_are_ignored(self):
        """Also of one who took our name: it is another key, and says so."""
        for stranger in (key("other"), key(number=2)):
            assert Note.parse(POINT.note(stranger)).signer([key().public]) is None

    def test_each_of_several_signatures_is_found(self):
        both = POINT.note(key()) + POINT.note(key("other")).splitlines(keepends=True)[-1]
        for one in (key(), key("other")):
            assert Note.parse(both).signer([one.public]) == one.public

    @pytest.mark.parametrize(
        "change", [("\n7\n", "\n8\n"), ("run-a/", "run-b/"), ("AAEC", "AAED")], ids=["size", "origin", "root"]
    )
    def test_a_changed_note_is_rejected(self, change):
        with pytest.raises(BadNoteError, match="has a signature of gpu7 that the key did not make"):
            Note.parse(POINT.note(key()).replace(*change)).signer([key().public])

    def test_one_forged_signature_rejects_a_note_that_another_key_signed(self):
        """As the specification asks: whoever could add it could have changed more."""
        forged = Checkpoint("run-a/controller", 8, bytes(32)).note(key("other")).splitlines(keepends=True)[-1]
        with pytest.raises(BadNoteError, match="signature of other"):
            Note.parse(POINT.note(key()) + forged).signer([key().public, key("other").public])

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "three lines"),
            ("a\n7\n", "three lines"),
            (POINT.text() + "extension\n", "three lines"),
            (POINT.text()[:-1], "does not end its last line"),
            (POINT.text() + "\n", "no signature behind it"),
            (POINT.text().replace("\n7\n", "\n07\n"), "is not a checkpoint"),
            (POINT.text().replace("\n7\n", "\n-7\n"), "is not a checkpoint"),
            (POINT.text().replace("\n7\n", "\n٧\n"), "is not a checkpoint"),
            ("\n" + POINT.text().partition("\n")[2], "is not a checkpoint"),
            (POINT.text().replace("=", ""), "is not a checkpoint"),
            (POINT.text().replace("run-a", "run\ta"), "control characters"),
            (POINT.note(key()).replace("—", "-"), "where a signature belongs"),
            (POINT.note(key()).replace("gpu7 ", "gpu7  "), "where a signature belongs"),
            (POINT.note(key())[:-1], "does not end its last line"),
        ],
    )
    def test_what_is_no_checkpoint_is_refused(self, text, why):
        with pytest.raises(BadNoteError, match=why):
            Note.parse(text)

    def test_a_root_has_one_spelling(self):
        """The last character of its base64 has unused bits; another one there would be another text, unsigned."""
        text = POINT.text()
        assert text.endswith("Hh8=\n")
        with pytest.raises(BadNoteError, match="is not a checkpoint"):
            Note.parse(text.replace("Hh8=", "Hh9="))


class TestTexts:
    @pytest.mark.parametrize(
        "text",
        ["", "gpu7", "gpu7+4ecd2b99", PETER_VKEY[:-4], PETER_VKEY.replace("Peter", "Pet er"), "+c74f20a3+" + "A" * 44],
    )
    def test_what_is_no_vkey_is_refused(self, text):
        with pytest.raises(UsageError, match="is not a vkey"):
            VerifierKey.parse(text)

    def test_a_vkey_whose_hash_is_not_its_own_is_refused(self):
        """A name or a key that was mistyped does not become another key in silence."""
        with pytest.raises(UsageError, match="contradicts itself: its hash is"):
            VerifierKey.parse(PETER_VKEY.replace("Peter", "Petra"))

    def test_other_kinds_of_keys_are_refused(self):
        other = base64.b64encode(b"\x02" + bytes(32)).decode()
        with pytest.raises(UsageError, match="not of the kind Ed25519"):
            VerifierKey.parse(f"gpu7+00000000+{other}")

    def test_nothing_prints_the_secret(self, tmp_path):
        """Not the key's own text for people, and no message about a damaged file."""
        peter = SigningKey.parse(PETER, place="here")
        assert "AYEK" not in f"{peter} {peter!r} {[peter]}"
        for damaged in (PETER.replace("c74f", "c74e"), PETER[:-8], "AYEKFALVFGyNhPJEMzD1QIDr"):
            with pytest.raises(UsageError) as caught:
                SigningKey.parse(damaged, place="here")
            assert "AYEK" not in str(caught.value)

    def test_a_trusted_key_is_given_as_text_or_as_a_file(self, tmp_path):
        (tmp_path / "peter.vkey").write_text(f"{PETER_VKEY}\n")
        assert trusted([PETER_VKEY, str(tmp_path / "peter.vkey")]) == [VerifierKey.parse(PETER_VKEY)] * 2
        with pytest.raises(UsageError, match="neither a vkey nor a file with one"):
            trusted([str(tmp_path / "nobody.vkey")])


class TestKeygen:
    def test_writes_a_key_that_nobody_else_reads_and_its_vkey(self, tmp_path):
        path, public = keygen("example.org/gpu7", folder=tmp_path / "new" / "keys")
        assert path == tmp_path / "new/keys/log.key"
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert SigningKey.parse(path.read_text(), place="here").public == public
        assert VerifierKey.parse((path.parent / "log.vkey").read_text()) == public

    def test_two_keys_of_one_name_are_two_keys(self, tmp_path):
        assert keygen("gpu7", folder=tmp_path / "a")[1] != keygen("gpu7", folder=tmp_path / "b")[1]

    def test_a_key_is_never_written_over(self, tmp_path):
        path, _ = keygen("gpu7", folder=tmp_path)
        before = path.read_text()
        with pytest.raises(UsageError, match="never written over"):
            keygen("gpu7", folder=tmp_path)
        assert path.read_text() == before

    def test_a_run_directory_is_no_place_for_a_key(self, tmp_path):
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(UsageError, match="lies in the run directory"):
            keygen("gpu7", folder=tmp_path / "keys" / "deep")
        assert not (tmp_path / "keys").exists()

    @pytest.mark.parametrize("name", ["", "a b", "a+b", "-x", "a\nb", "é", "x" * 129])
    def test_a_name_is_one_word(self, tmp_path, name):
        with pytest.raises(UsageError, match="is no name for a key"):
            keygen(name, folder=tmp_path)

    def test_a_folder_that_cannot_be_is_an_error_with_its_way_out(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="name a folder with --out"):
            keygen("gpu7", folder=tmp_path / "file")


class TestFinding:
    def find(self, tmp_path, **environment):
        return log_key(tmp_path / "run", environment={"HOME": str(tmp_path), **environment})

    def test_the_variable_names_the_file(self, tmp_path):
        path, public = keygen("gpu7", folder=tmp_path / "keys")
        assert self.find(tmp_path, LOOPGUARD_LOG_KEY=str(path)).public == public

    def test_without_it_the_default_folder_is_looked_into(self, tmp_path):
        home = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
        assert self.find(tmp_path, **home) is None
        _, public = keygen("gpu7", folder=keys.default_folder(home))
        assert self.find(tmp_path, **home).public == public
        assert self.find(tmp_path, **home, LOOPGUARD_LOG_KEY="") is None

    def test_the_default_folder_is_in_the_home_of_the_user(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert keys.default_folder({}) == tmp_path / ".config" / "loopguard"

    def test_a_named_file_that_is_not_there_is_an_error(self, tmp_path):
        """A log that should be signed is never quietly not signed."""
        with pytest.raises(UsageError, match="LOOPGUARD_LOG_KEY names .*, which is not there"):
            self.find(tmp_path, LOOPGUARD_LOG_KEY=str(tmp_path / "none.key"))

    def test_a_link_that_leads_nowhere_is_an_error(self, tmp_path):
        """The volume with the keys is not mounted: a log that should be signed is never quietly not signed."""
        (tmp_path / "config/loopguard").mkdir(parents=True)
        (tmp_path / "config/loopguard/log.key").symlink_to(tmp_path / "volume/log.key")
        with pytest.raises(UsageError, match=r"is a link to .*volume/log\.key, which is not there"):
            self.find(tmp_path, XDG_CONFIG_HOME=str(tmp_path / "config"))

    def test_a_user_without_a_home_has_no_key(self, tmp_path, monkeypatch):
        """As in some containers; the log opens all the same."""
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
        assert self.find(tmp_path) is None
        with pytest.raises(UsageError, match="which leads nowhere"):
            self.find(tmp_path, LOOPGUARD_LOG_KEY="~/log.key")
        with pytest.raises(UsageError, match="name a folder with --out"):
            keygen("gpu7")

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
    def test_a_key_that_others_may_use_is_an_error(self, tmp_path, mode):
        path, _ = keygen("gpu7", folder=tmp_path / "keys")
        path.chmod(mode)
        with pytest.raises(UsageError, match="chmod 600"):
            self.find(tmp_path, LOOPGUARD_LOG_KEY=str(path))

    def test_a_key_in_the_run_directory_is_an_error(self, tmp_path):
        path, _ = keygen("gpu7", folder=tmp_path / "run" / "keys")
        with pytest.raises(UsageError, match="lies in the run directory"):
            self.find(tmp_path, LOOPGUARD_LOG_KEY=str(path))
        (tmp_path / "link.key").symlink_to(path)
        with pytest.raises(UsageError, match="lies in the run directory"):
            self.find(tmp_path, LOOPGUARD_LOG_KEY=str(tmp_path / "link.key"))

    @pytest.mark.parametrize("content", [b"", b"not a key\n", b"\xff\xfe"])
    def test_a_file_that_is_no_key_is_an_error(self, tmp_path, content):
        path = tmp_path / "log.key"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(UsageError, match="holds no log key|cannot be read"):
            self.find(tmp_path, LOOPGUARD_LOG_KEY=str(path))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_a_key_that_cannot_be_read_is_an_error(self, tmp_path):
        path, _ = keygen("gpu7", folder=tmp_path / "keys")
        path.chmod(0)
        with pytest.raises(UsageError, match="cannot be read"):
            self.find(tmp_path, LOOPGUARD_LOG_KEY=str(path))
