"""Resuming takes the people that the guard policy names, over these very bytes, and nothing else will do."""

import dataclasses
import json
import pickle
import shutil
import subprocess

import pytest
from people import (
    DANA,
    DANA_AT_HOME,
    ELI,
    FAY,
    NAMESPACE,
    STRANGER,
    Person,
    Room,
    armored,
    mpint,
    packed,
    rule,
)

from loopguard.approvals import ask
from loopguard.audit import read
from loopguard.audit.events import canonical
from loopguard.audit.log import AuditLog
from loopguard.audit.verify import verify
from loopguard.consent.book import Book
from loopguard.consent.sshsig import KeyLineError, SignatureError, fingerprint, read_key, read_signature, verifies
from loopguard.consent.statement import SENTENCES, Code, Rule, Statement
from loopguard.errors import UsageError
from loopguard.state import FreezeState, standing, submit

MESSAGE = b"what people agree to\n"
with_ssh_keygen = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed: apt-get install openssh-client"
)


@pytest.fixture
def room(tmp_path):
    room = Room(tmp_path / "run")
    yield room
    room.close()


@pytest.fixture
def frozen(room):
    room.freeze()
    return room


class TestKeys:
    @pytest.mark.parametrize("kind", ["ed25519", "p256", "rsa", "sk"])
    def test_a_key_of_each_kind_is_read_and_has_the_fingerprint_that_ssh_shows(self, kind):
        person = Person("dana", kind)
        key = read_key(person.line)
        assert (key.blob, key.fingerprint) == (person.blob, person.fingerprint)

    def test_options_say_when_a_key_counts(self):
        key = read_key(f'valid-after="20300101Z",valid-before="203001021530Z" {DANA.line}')
        assert (key.valid_after, key.valid_before) == ("2030-01-01T00:00:00.000000Z", "2030-01-02T15:30:00.000000Z")
        times = ["2029-12-31T23:59:59.999999Z", "2030-01-01T00:00:00.000000Z", "2030-01-02T15:30:00.000000Z"]
        assert [key.counts_at(now) for now in times] == [False, True, False]

    def test_namespaces_that_hold_ours_are_fine(self):
        assert read_key(f'namespaces="git,{NAMESPACE}" {DANA.line}').blob == DANA.blob

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("", "is no public key"),
            ("dana", "is no public key"),
            ("ssh-dss AAAA", "is a key of type 'ssh-dss'"),
            ("ssh-ed25519 !!!!", "not base64"),
            ("ssh-ed25519 AAAA", "holds no whole key"),
            pytest.param(f"ssh-rsa {DANA.line.split()[1]}", "holds no whole key", id="key of another type"),
            pytest.param(DANA.line[:40], "holds no whole key", id="cut key"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----", "is a private key"),
            (f"cert-authority {DANA.line}", "has the option 'cert-authority'"),
            (f'valid-after="20300101" {DANA.line}', "expected a time in UTC"),
            (f'valid-before="20301301Z" {DANA.line}', "expected a time in UTC"),
            (f'namespaces="git" {DANA.line}', f"may not sign {NAMESPACE}"),
            (f'valid-after="20300101Z";x {DANA.line}', "has options that cannot be read"),
            (Person("dana", "rsa", bits=1024).line, "is an RSA key of 1024 bits"),
        ],
    )
    def test_what_is_no_key_says_why(self, line, said):
        with pytest.raises(KeyLineError, match=said):
            read_key(line)


class TestSignatures:
    @pytest.mark.parametrize("digest", ["sha256", "sha512"])
    @pytest.mark.parametrize("kind", ["ed25519", "p256", "rsa", "sk"])
    def test_one_of_each_kind_counts_for_its_bytes_and_no_others(self, kind, digest):
        person = Person("dana", kind)
        signature, key = read_signature(person.sign(MESSAGE, digest=digest)), read_key(person.line)
        assert verifies(signature, key, MESSAGE)
        assert not verifies(signature, key, MESSAGE[:-1])
        assert not verifies(signature, read_key(ELI.line), MESSAGE)
        other = read_signature(person.sign(MESSAGE, namespace="git"))
        assert not verifies(dataclasses.replace(other, namespace=NAMESPACE), key, MESSAGE)

    def test_rsa_counts_with_both_hashes_of_today_and_not_with_sha_1(self):
        person = Person("dana", "rsa")
        key = read_key(person.line)
        assert verifies(read_signature(person.sign(MESSAGE, algorithm="rsa-sha2-256")), key, MESSAGE)
        assert verifies(read_signature(person.sign(MESSAGE, algorithm="rsa-sha2-512")), key, MESSAGE)
        with pytest.raises(SignatureError, match="ssh-rsa"):
            verifies(read_signature(person.sign(MESSAGE, algorithm="ssh-rsa")), key, MESSAGE)

    def test_a_security_key_has_to_be_touched(self):
        person = Person("dana", "sk")
        with pytest.raises(SignatureError, match="not touched"):
            verifies(read_signature(person.sign(MESSAGE, touched=0)), read_key(person.line), MESSAGE)

    def test_a_signature_by_a_key_of_another_kind_does_not_count(self):
        with pytest.raises(SignatureError, match="not taken from ssh-ed25519"):
            verifies(read_signature(DANA.sign(MESSAGE, algorithm="ssh-rsa")), read_key(DANA.line), MESSAGE)

    def test_a_hash_that_is_broken_does_not_count(self):
        with pytest.raises(SignatureError, match="md5"):
            verifies(read_signature(DANA.sign(MESSAGE, digest="md5")), read_key(DANA.line), MESSAGE)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "no signature",
            DANA.sign(MESSAGE).replace("-----END SSH SIGNATURE-----", ""),
            DANA.sign(MESSAGE) + "and more",
            DANA.sign(MESSAGE, version=2),
            armored(b"SSHSIG"),
            armored(b"SSHSIG" + bytes(4)),
            armored(b"SSHSIG\0\0\0\1" + packed(b"", b"", b"", b"", b"") + b"more"),
            armored(b"SSHSIG\0\0\0\1" + packed(b"k", b"n", b"reserved", b"sha512", packed(b"a"))),
            armored(b"SSHSIG\0\0\0\1\xff\xff\xff\xff"),
            armored(b"x" * 20_000),
        ],
    )
    def test_what_is_no_signature_is_said_to_be_none(self, text):
        with pytest.raises(SignatureError):
            read_signature(text)

    @pytest.mark.parametrize("cut", range(0, 120, 7))
    def test_any_damage_is_an_error_or_a_no(self, cut):
        """Nothing else is ever raised, whatever byte is wrong."""
        lines = DANA.sign(MESSAGE).splitlines()
        body = "".join(lines[1:-1])
        damaged = body[:cut] + ("A" if body[cut] != "A" else "B") + body[cut + 1 :]
        text = "\n".join([lines[0], damaged, lines[-1]])
        try:
            good = verifies(read_signature(text), read_key(DANA.line), MESSAGE)
        except SignatureError:
            return
        assert not good

    def test_numbers_of_a_curve_signature_that_are_none_are_a_no(self):
        zero = packed(b"ecdsa-sha2-nistp256", packed(mpint(0), mpint(0)))
        text = armored(b"SSHSIG\0\0\0\1" + packed(DANA_AT_HOME.blob, NAMESPACE.encode(), b"", b"sha512", zero))
        assert not verifies(read_signature(text), read_key(DANA_AT_HOME.line), MESSAGE)


@with_ssh_keygen
class TestSshKeygen:
    """What people have installed and what is in here mean the same."""

    @pytest.mark.parametrize(("kind", "options"), [("ed25519", []), ("ecdsa", ["-b", "256"]), ("rsa", ["-b", "2048"])])
    def test_what_it_signs_counts(self, tmp_path, kind, options):
        key, message = tmp_path / "key", tmp_path / "message"
        subprocess.run(["ssh-keygen", "-q", "-t", kind, *options, "-N", "", "-f", key], check=True)
        message.write_bytes(MESSAGE)
        subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-n", NAMESPACE, "-f", key, message], check=True)
        signature, public = (
            read_signature((tmp_path / "message.sig").read_text()),
            read_key(f"{key.with_suffix('.pub').read_text()}"),
        )
        assert signature.namespace == NAMESPACE
        assert verifies(signature, public, MESSAGE)
        assert not verifies(signature, public, MESSAGE + b"!")
        shown = subprocess.run(["ssh-keygen", "-l", "-f", key], capture_output=True, text=True, check=True).stdout
        assert public.fingerprint == shown.split()[1]

    @pytest.mark.parametrize("kind", ["ed25519", "p256", "rsa"])
    def test_it_accepts_what_the_tests_sign(self, tmp_path, kind):
        """So the table below is about real signatures, also where this test does not run."""
        person = Person("dana", kind)
        (tmp_path / "signers").write_text(f"dana {person.line}\n")
        (tmp_path / "message.sig").write_text(person.sign(MESSAGE))
        command = ["ssh-keygen", "-Y", "verify", "-f", "signers", "-I", "dana", "-n", NAMESPACE, "-s", "message.sig"]
        done = subprocess.run(command, cwd=tmp_path, input=MESSAGE, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


class TestStatement:
    def test_what_is_signed_is_canonical_json_with_one_newline(self, frozen):
        statement = frozen.ask()
        text = statement.signed_bytes()
        assert text == canonical(json.loads(text)).encode("ascii") + b"\n"
        assert Statement.read(json.loads(text)) == statement

    def test_it_says_what_the_run_is_like(self, frozen):
        head = frozen.log.head
        statement = frozen.ask()
        (entered,) = frozen.told("freeze.entered")
        assert (statement.run, statement.freeze, statement.entered) == ("run-1", "f1", entered.hash)
        assert (statement.head_seq, statement.head_hash) == (head.seq, head.hash)
        assert (statement.disposition, statement.target, statement.policy_change) == ("rollback", "nothing", "none")
        assert (statement.requester, statement.reason) == ("sam", "bad shard 17 removed")
        assert (statement.not_before, statement.expires) == (
            "2030-01-01T00:00:00.000000Z",
            "2030-01-02T00:00:00.000000Z",
        )

    @pytest.mark.parametrize(
        "lie",
        [
            {"v": 2}, {"nonce": "short"}, {"entered": "x"}, {"head_seq": "1"}, {"head_seq": True}, {"expires": "soon"},
            {"disposition": "ignore"}, {"waives_cycles": 3}, {"waives": "jump:loss"},
            {"policy_change": "maybe"}, {"target": ""}, {"reason": ""}, {"more": 1},
            {"reason": "x" * 9000},
        ],
    )  # fmt: skip
    def test_what_is_none_is_refused_by_name(self, frozen, lie):
        with pytest.raises(ValueError, match="|".join([*lie, "statement"])):
            Statement.read(frozen.ask().facts() | lie)

    def test_a_run_without_approvals_has_none(self, tmp_path):
        room = Room(tmp_path / "run")
        room.log.append("policy.loaded", {"name": "free", "digest": "a" * 64})
        room.freeze()
        with pytest.raises(UsageError, match="asks for no approvals"):
            ask(room.path, by="sam", reason="x", now=room.clock.now())
        room.close()


class TestEnoughPeople:
    def test_a_resume_names_who_agreed_with_which_key_to_what(self, frozen):
        statement = frozen.ask()
        frozen.sign(DANA, statement)
        assert frozen.state.frozen
        assert standing(frozen.path).approved_by == ("dana",)
        frozen.sign(ELI, statement)
        assert not frozen.state.frozen
        assert not (frozen.path / "latch").exists()
        (entry,) = frozen.told("resume.applied")
        assert entry.body["approval"] == "signed"
        assert [each["person"] for each in entry.body["approvals"]] == ["dana", "eli"]
        assert [each["key"] for each in entry.body["approvals"]] == [DANA.fingerprint, ELI.fingerprint]
        assert entry.body["statement"] == statement.facts()
        assert entry.body["statement_sha256"] == statement.digest
        for each, person in zip(entry.body["approvals"], (DANA, ELI), strict=True):
            assert verifies(read_signature(each["signature"]), read_key(person.line), statement.signed_bytes())
        assert verify(frozen.path).findings == []

    def test_nothing_lies_about_any_more_and_nothing_is_counted_twice(self, frozen):
        statement = frozen.ask()
        frozen.sign(DANA, statement)
        assert list((frozen.path / "requests").glob("*.json")) == []
        assert len(list((frozen.path / "requests" / "done").glob("*.json"))) == 2

    def test_an_approval_that_was_recorded_and_not_set_aside_counts_once(self, frozen):
        """The owner died in between, and the next one finds the file again."""
        statement = frozen.ask()
        frozen.sign(DANA, statement)
        done = max((frozen.path / "requests" / "done").glob("*.json"))
        done.rename(frozen.path / "requests" / done.name)
        frozen.close()
        frozen.open()
        frozen.state.take_requests()
        assert (frozen.pending.people, frozen.codes()) == (["dana"], [])

    def test_approvals_survive_a_restart(self, frozen):
        statement = frozen.ask()
        frozen.sign(DANA, statement)
        frozen.close()
        frozen.open()
        frozen.sign(ELI, statement)
        assert not frozen.state.frozen

    def test_a_process_that_died_before_it_acted_on_them_voids_them(self, frozen):
        """What they agreed to may have been half done."""
        statement = frozen.ask()
        frozen.sign(DANA, statement)
        submit(frozen.path, "approval", by="", reason="", signature=ELI.sign(statement.signed_bytes()))
        next(frozen.state.requests())  # counted, and then nothing more
        frozen.close()
        frozen.open()
        assert frozen.state.frozen
        assert (frozen.codes(), frozen.pending) == (["interrupted"], None)

    def test_whoever_asks_may_approve_where_the_policy_says_so(self, tmp_path):
        room = Room(tmp_path / "run", requester_may_approve=True)
        room.freeze()
        statement = room.ask(by="dana")
        room.sign(DANA, statement)
        room.sign(ELI, statement)
        assert not room.state.frozen
        assert verify(room.path).findings == []
        room.close()

    def test_the_primitive_itself_refuses_without_them(self, frozen):
        """No caller can forget to ask."""
        with pytest.raises(UsageError, match="approvals of 2"):
            frozen.state.resume(by="dana", reason="trust me")
        assert frozen.state.frozen
        assert frozen.told("resume.applied") == []

    def test_another_request_takes_the_place_of_the_one_before(self, frozen):
        first = frozen.ask()
        frozen.sign(DANA, first)
        second = frozen.ask(reason="another reason")
        assert frozen.codes() == ["superseded"]
        assert frozen.pending.people == []
        frozen.sign(DANA, second)
        frozen.sign(ELI, second)
        assert not frozen.state.frozen
        assert verify(frozen.path).findings == []


# What must not lift a freeze. Each gets a frozen room; it does one thing that is wrong, and gives what is refused.


def requester(room):
    room.sign(DANA, room.ask(by="dana"))


def one_person_two_keys(room):
    statement = room.ask()
    room.sign(DANA, statement)
    room.sign(DANA_AT_HOME, statement)


def expired(room):
    statement = room.ask()
    room.sign(DANA, statement)
    room.clock.advance(seconds=86400)
    room.sign(ELI, statement)


def wrong_digest(room):
    """The snapshot that somebody would like to go back to instead."""
    room.sign(DANA, dataclasses.replace(room.ask(), target="b" * 64))


def edited_policy(room):
    """The file in the run directory says something else than when it was asked."""
    statement = room.ask()
    room.sign(DANA, statement)
    room.close()
    room.open(policy="b" * 64)
    room.sign(ELI, statement)


def another_policy_in_force(room):
    statement = room.ask()
    room.sign(DANA, statement)
    room.log.append("policy.loaded", {"name": "x", "digest": "b" * 64, "resume": room.rule.facts()})
    room.sign(ELI, statement)


def replayed_request(room):
    statement = agreed(room)
    room.freeze()
    room.hand_in(statement)


def replayed_approval(room):
    """The signatures of the last resume once more."""
    statement = agreed(room)
    room.freeze()
    room.ask()
    room.sign(DANA, statement)


def signature_of_another_freeze(room):
    """Asked for and signed, and the freeze ended by another request; now there is another freeze."""
    old = room.ask()
    agreed(room)
    room.freeze()
    room.ask()
    room.sign(DANA, old)


def request_of_another_freeze(room):
    room.hand_in(dataclasses.replace(ask_only(room), freeze="f9"))


def moved_clock(room):
    statement = room.ask()
    room.sign(DANA, statement)
    room.clock.advance(seconds=-3600)
    room.sign(ELI, statement)


def moved_clock_and_back(room):
    """It was set back while the request waited, and forward again before anybody looked."""
    statement = room.ask()
    room.clock.advance(seconds=-3600)
    room.sign(DANA, statement)
    room.clock.advance(seconds=3600)
    room.sign(ELI, statement)


def new_trip_while_pending(room):
    statement = room.ask()
    room.sign(DANA, statement)
    room.freeze()
    room.sign(ELI, statement)


def somebody_says_stop(room):
    statement = room.ask()
    room.sign(DANA, statement)
    submit(room.path, "freeze", by="fay", reason="wait, look at shard 18")
    room.sign(ELI, statement)


def unknown_key(room):
    room.sign(STRANGER, room.ask())


def wrong_namespace(room):
    room.sign(DANA, room.ask(), namespace="git")


def garbage(room):
    room.ask()
    room.approve("approved, yours dana")


def weak_hash(room):
    room.sign(DANA, room.ask(), digest="md5")


def nothing_to_approve(room):
    room.sign(DANA, ask_only(room))


def without_a_statement(room):
    submit(room.path, "resume", by="sam", reason="please", freeze="f1")
    room.state.take_requests()


def of_another_run(room):
    room.hand_in(dataclasses.replace(ask_only(room), run="run-2"))


def in_the_name_of_another(room):
    room.hand_in(ask_only(room), by="eli")


def longer_than_the_policy_allows(room):
    room.hand_in(dataclasses.replace(ask_only(room), expires="2031-01-01T00:00:00.000000Z"))


def policy_change_that_is_not_said(room):
    room.hand_in(dataclasses.replace(ask_only(room), next_policy="b" * 64))


def of_another_log(room):
    room.hand_in(dataclasses.replace(ask_only(room), head_hash="b" * 64))


def rolled_back_meanwhile(room):
    """Another snapshot acts now than the one that was signed for."""
    statement = room.ask()
    room.sign(DANA, statement)
    (room.path / "snapshots").mkdir()
    pointer = {"snapshot": "c" * 64, "cycle": 1, "update": 1, "panel": {}}
    (room.path / "snapshots" / "promoted.json").write_text(json.dumps({"promoted": pointer, **pointer, "history": []}))
    room.sign(ELI, statement)


def waiver_of_another_rule(room):
    """What tripped was a bound, and nobody lets pass what did not trip."""
    room.hand_in(dataclasses.replace(ask_only(room), waives="jump:loss", waives_cycles=2))


def run_that_was_halted(room):
    room.state.halt(by="loopguard", reason="it froze too often", because="budget")
    room.hand_in(ask_only(room))


def key_that_ran_out(room):
    statement = room.ask()
    room.sign(FAY, statement)
    room.clock.advance(seconds=7200)
    room.sign(Person_with_an_end, statement)


Person_with_an_end = Person("gil")


def ask_only(room):
    return ask(room.path, by="sam", reason="bad shard 17 removed", now=room.clock.now())


def agreed(room):
    """A resume as it should be."""
    statement = room.ask()
    room.sign(DANA, statement)
    room.sign(ELI, statement)
    assert not room.state.frozen
    return statement


TABLE = [
    (requester, "requester"),
    (one_person_two_keys, "same_person"),
    (expired, "expired"),
    (wrong_digest, "wrong_bytes"),
    (edited_policy, "policy"),
    (another_policy_in_force, "policy"),
    (replayed_request, "replayed"),
    (replayed_approval, "replayed"),
    (signature_of_another_freeze, "other_freeze"),
    (request_of_another_freeze, "other_freeze"),
    (moved_clock, "clock"),
    (moved_clock_and_back, "clock"),
    (new_trip_while_pending, "new_trip"),
    (somebody_says_stop, "new_trip"),
    (unknown_key, "unknown_key"),
    (wrong_namespace, "namespace"),
    (garbage, "unreadable"),
    (weak_hash, "algorithm"),
    (nothing_to_approve, "nothing_pending"),
    (without_a_statement, "no_statement"),
    (of_another_run, "malformed"),
    (in_the_name_of_another, "malformed"),
    (longer_than_the_policy_allows, "malformed"),
    (policy_change_that_is_not_said, "malformed"),
    (of_another_log, "head"),
    (rolled_back_meanwhile, "target"),
    (key_that_ran_out, "key_expired"),
    (waiver_of_another_rule, "malformed"),
    (run_that_was_halted, "halted"),
]


class TestTheTable:
    """Each way to go around the rule is refused, with a code and a sentence of its own."""

    @pytest.fixture
    def frozen(self, tmp_path):
        line = f'valid-before="203001010100Z" {Person_with_an_end.line}'
        room = Room(tmp_path / "run", people={**rule().people, "gil": (line,)})
        room.freeze()
        yield room
        room.close()

    @pytest.mark.parametrize(("wrong", "code"), TABLE, ids=[wrong.__name__ for wrong, _ in TABLE])
    def test_refused(self, frozen, wrong, code):
        wrong(frozen)
        assert frozen.state.frozen
        refused = [entry for entry in frozen.told("approval.refused") if entry.body["code"] == code]
        assert refused
        assert refused[0].body["reason"].startswith(SENTENCES[code])
        assert (frozen.path / "latch").exists()

    @pytest.mark.parametrize(("wrong", "code"), TABLE, ids=[wrong.__name__ for wrong, _ in TABLE])
    def test_a_log_with_the_refusal_is_in_order(self, frozen, wrong, code):
        """Nothing that was refused looks like a fault of the log later."""
        wrong(frozen)
        assert [
            each for each in verify(frozen.path).findings if "clock_back" not in each and "policy" not in each
        ] == []

    def test_every_code_is_in_it_or_in_a_test_above(self):
        tested = {code for _, code in TABLE} | {"superseded", "interrupted"}
        assert tested == set(Code.__args__) == set(SENTENCES)
        assert len(set(SENTENCES.values())) == len(SENTENCES)

    @pytest.mark.parametrize(
        "wrong",
        [requester, one_person_two_keys, wrong_digest, unknown_key, wrong_namespace, garbage, weak_hash],
    )
    def test_a_bad_signature_voids_nothing(self, frozen, wrong):
        """Otherwise a stranger could keep people from agreeing."""
        wrong(frozen)
        assert frozen.pending is not None
        statement = frozen.pending.statement
        for person in (ELI, FAY)[len(frozen.pending.people) :]:
            frozen.sign(person, statement)
        assert not frozen.state.frozen
        assert verify(frozen.path).findings == []


class TestRanks:
    """A rank that does not own the run records the resume with its approvals, in a stream of its own."""

    @pytest.fixture
    def follower(self, frozen):
        log = AuditLog.open(frozen.path, stream="rank-1", run_id="run-1", policy="a" * 64, clock=frozen.clock)
        log.append("policy.loaded", {"name": "two", "digest": "a" * 64, "resume": frozen.rule.facts()})
        state = FreezeState(frozen.path, log, follows="rank-1")
        state.follow(count=1, freeze="f1", reason="loss is nan")
        yield state
        log.close()

    def test_it_holds_the_same_record_and_verifies(self, frozen, follower):
        statement = frozen.ask()
        frozen.sign(DANA, statement)
        submit(frozen.path, "approval", by="", reason="", signature=ELI.sign(statement.signed_bytes()))
        (request,) = frozen.state.requests()
        frozen.log.append("run.started")  # a loop, which may go on at once
        frozen.state.resume(by=request.by, reason=request.reason, consent=request.consent)
        follower.resume(by=request.by, reason=request.reason, consent=request.consent)
        (own,) = read.entries(frozen.path, "rank-1", types=["resume.applied"])
        assert own.body == frozen.told("resume.applied")[0].body
        assert not follower.frozen
        assert verify(frozen.path).findings == []

    def test_a_consent_travels_between_processes(self, frozen):
        statement = frozen.ask()
        frozen.sign(DANA, statement)
        submit(frozen.path, "approval", by="", reason="", signature=ELI.sign(statement.signed_bytes()))
        (request,) = frozen.state.requests()
        assert pickle.loads(pickle.dumps(request.consent)) == request.consent

    def test_it_does_not_go_on_without_them(self, frozen, follower):
        with pytest.raises(UsageError, match="approvals of 2"):
            follower.resume(by="sam", reason="x")
        assert follower.frozen


def renamed(approvals):
    """The same signatures, in other people's names."""
    return [approval | {"person": "fay"} for approval in approvals]


class TestVerify:
    """The log alone shows whether people agreed, with no policy file, no key and no run directory around it."""

    def code(self, room):
        return verify(room.path).code

    def test_a_resume_without_approvals_is_41(self, frozen):
        body = {"freeze": "f1", "by": "dana", "reason": "trust me", "disposition": "rollback", "approval": "none"}
        frozen.log.append("resume.applied", body)
        result = verify(frozen.path)
        assert (result.code, result.status) == (41, "approval")
        assert "f1 was resumed by dana without the 2 approvals that the guard policy asks for" in result.findings[0]

    @pytest.mark.parametrize(
        ("lie", "said"),
        [
            (lambda body: body | {"approvals": body["approvals"][:1]}, "1 of 2 people approved"),
            (lambda body: body | {"approvals": body["approvals"][:1] * 2}, "same_person"),
            (lambda body: body | {"approvals": None}, "names no approvals"),
            (lambda body: body | {"statement": None}, "not a statement"),
            (lambda body: body | {"statement": body["statement"] | {"target": "b" * 64}}, "wrong_bytes"),
            (lambda body: body | {"by": "eli"}, "is not what its approvals are about"),
            (lambda body: body | {"reason": "another"}, "is not what its approvals are about"),
            (lambda body: body | {"disposition": "accept"}, "is not what its approvals are about (disposition)"),
            (lambda body: body | {"statement_sha256": "0" * 64}, "is not what its approvals are about (statement_sha"),
            (lambda body: body | {"approvals": renamed(body["approvals"])}, "what its approvals are about (approvals)"),
            (lambda body: body | {"judged": "2029-01-01T00:00:00.000000Z"}, "judged at another time"),
            (lambda body: body | {"judged": "2031-01-01T00:00:00.000000Z"}, "judged at another time"),
            (lambda body: body | {"judged": "then"}, "no time of a record"),
        ],
    )
    def test_a_resume_with_approvals_that_do_not_count_is_41(self, frozen, lie, said):
        statement = frozen.ask()
        frozen.sign(DANA, statement)
        submit(frozen.path, "approval", by="", reason="", signature=ELI.sign(statement.signed_bytes()))
        granted = next(frozen.state.requests())
        body = {"freeze": "f1", "by": "sam", "reason": statement.reason, **statement.way.facts()}
        frozen.log.append("resume.applied", lie(body | granted.consent.facts()))
        result = verify(frozen.path)
        assert result.code == 41
        assert any(said in finding for finding in result.findings)

    @pytest.mark.parametrize(
        ("lie", "said"),
        [
            (lambda body: body | {"person": "fay"}, "an approval of dana says something else of its person"),
            (lambda body: body | {"key": ELI.fingerprint}, "an approval of dana says something else of its key"),
            (lambda body: body | {"statement_sha256": "0" * 64}, "says something else of its statement_sha256"),
            (lambda body: body | {"signature": "made up"}, "counted that does not count (unreadable)"),
            (lambda body: body | {"request": "another"}, "counted for a request that did not wait"),
        ],
    )
    def test_an_approval_that_is_made_up_is_41(self, frozen, lie, said):
        """Who agreed is read off the list by people who check no signature, also where the run did not go on."""
        statement = frozen.ask()
        body = {"request": frozen.pending.request, "approval": "a1", "person": "dana", "key": DANA.fingerprint, "of": 2}
        body |= {"signature": DANA.sign(statement.signed_bytes()), "statement_sha256": statement.digest}
        frozen.log.append("approval.given", lie(body))
        result = verify(frozen.path)
        assert result.code == 41
        assert said in result.findings[0]

    @pytest.mark.parametrize("lie", [{"reason": "nothing to see"}, {"freeze": "f0"}, {"by": "dana"}])
    def test_a_request_that_says_something_else_than_its_statement_is_refused(self, frozen, lie):
        """What is listed is what people sign."""
        statement = ask(frozen.path, by="sam", reason="fine", now=frozen.clock.now())
        asked = {"by": "sam", "reason": "fine", "freeze": "f1", **lie}
        submit(frozen.path, "resume", **asked, statement=statement)
        frozen.state.take_requests()
        assert (frozen.pending, frozen.codes()) == (None, ["malformed"])

    @pytest.mark.parametrize("levels", [100, 300, 5000])
    def test_a_statement_that_no_record_could_hold_is_set_aside(self, frozen, levels):
        """It would be read again at each gate, and none could be passed any more."""
        (frozen.path / "requests").mkdir(exist_ok=True)
        statement = "[" * levels + "]" * levels
        text = f'{{"kind": "resume", "by": "sam", "reason": "fine", "statement": {statement}}}'
        (frozen.path / "requests" / "x.json").write_text(text)
        frozen.state.take_requests()
        assert (frozen.state.frozen, frozen.state.stirred()) == (True, False)
        assert frozen.told("note.added")[-1].body["text"] == "x.json is not a request; set aside"

    def test_a_clock_that_is_behind_the_log_says_until_when(self, frozen):
        """Whoever asks at night has to know whether to wait for a minute or for a year."""
        frozen.ask()
        frozen.clock.advance(seconds=-3600)
        frozen.ask()
        (*_, refused) = frozen.told("approval.refused")
        assert refused.body["code"] == "clock"
        assert "the log has a time of 2030-01-01T00:00:00.000000Z; ask again after that" in refused.body["reason"]
        frozen.clock.advance(seconds=3600)
        agreed(frozen)
        assert not frozen.state.frozen

    def test_a_start_under_a_clock_that_was_set_back_is_late(self, frozen):
        """The log knows of a later time than the start claims."""
        agreed(frozen)
        frozen.clock.advance(seconds=3601)
        frozen.log.append("policy.loaded", {"name": "two", "digest": "a" * 64, "resume": frozen.rule.facts()})
        frozen.clock.advance(seconds=-3600)
        frozen.log.append("run.started", {})
        assert frozen.state.overdue()

    def test_the_approvals_of_an_earlier_freeze_are_41(self, frozen):
        agreed(frozen)
        (before,) = frozen.told("resume.applied")
        frozen.freeze()
        frozen.log.append("resume.applied", dict(before.body) | {"freeze": "f2"})
        assert self.code(frozen) == 41

    def test_a_key_that_nobody_can_read_is_nobodys(self, tmp_path):
        room = Room(tmp_path / "run", people={"dana": ("ssh-ed25519 AAAA", DANA.line), "eli": ("no key",)})
        room.freeze()
        statement = room.ask()
        room.sign(DANA, statement)
        room.sign(ELI, statement)
        assert (room.pending.people, room.codes()) == (["dana"], ["unknown_key"])
        room.close()

    def test_a_rule_that_nobody_can_read_lets_nobody_resume(self, room):
        room.log.append("policy.loaded", {"name": "two", "digest": "a" * 64, "resume": {"approvals": "none"}})
        room.freeze()
        with pytest.raises(UsageError, match="resumes with the approvals of"):
            room.state.resume(by="dana", reason="x")
        room.log.append("resume.applied", {"freeze": "f1", "by": "dana", "reason": "x", "approval": "none"})
        assert self.code(room) == 41

    @pytest.mark.parametrize("weaker", [None, {"approvals": 1}, {"requester_may_approve": True}, {"within_s": 1e6}])
    def test_a_rule_that_gets_weaker_without_anybody_agreeing_is_41(self, room, weaker):
        facts = None if weaker is None else room.rule.facts() | weaker
        room.log.append("policy.adopted", {"from": "a" * 64, "to": "b" * 64, "change": "tightened"})
        room.log.append("policy.loaded", {"name": "x", "digest": "b" * 64, "resume": facts})
        assert any("asks for less" in finding for finding in verify(room.path).findings)

    def test_a_policy_that_nobody_adopted_is_41(self, room):
        room.log.append("policy.loaded", {"name": "x", "digest": "b" * 64, "resume": room.rule.facts()})
        assert any("nobody adopted it" in finding for finding in verify(room.path).findings)

    def test_a_loosened_policy_that_nobody_approved_is_41(self, room):
        room.log.append("policy.adopted", {"from": "a" * 64, "to": "b" * 64, "change": "loosened", "by": "dana"})
        assert self.code(room) == 41

    def test_a_rule_that_goes_away_under_the_same_digest_is_41(self, tmp_path):
        room = Room(tmp_path / "run")
        room.log.append("policy.loaded", {"name": "old", "digest": "a" * 64})
        room.freeze()
        room.log.append("resume.applied", {"freeze": "f1", "by": "dana", "reason": "fine", "disposition": "rollback"})
        (finding,) = verify(room.path).findings
        assert "another rule about resumes than before under the same name" in finding
        room.close()

    def test_a_log_from_before_there_were_approvals_reads_as_it_did(self, tmp_path):
        log = AuditLog.open(tmp_path / "run", run_id="run-1", policy="")
        log.append("policy.loaded", {"name": "old", "digest": ""})
        log.append("freeze.entered", {"freeze": "f1"})
        log.append("resume.applied", {"freeze": "f1", "by": "dana", "reason": "fine", "disposition": "rollback"})
        log.close()
        assert verify(tmp_path / "run").code == 20

    @pytest.mark.parametrize("ts", ["", "2030", "x"])
    def test_times_that_are_none_are_findings_and_no_exception(self, frozen, ts):
        """A forged log may hold anything."""
        statement = frozen.ask()
        book = Book()
        for entry in read.entries(frozen.path):
            forged = entry._replace(ts=ts)
            list(book.troubles(forged, owner=True))
            book.feed(forged)
        assert book.fault(now=statement.not_before, policy="a" * 64, target=None) is not None


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"approvals": 0},
        {"approvals": "2"},
        {"approvals": True},
        {"people": []},
        {"within_s": 0},
        {"within_s": 1e300},
        {"requester_may_approve": 1},
    ],
)
def test_a_rule_in_a_record_is_read_strictly(facts):
    given = rule().facts() | facts if facts else {}
    with pytest.raises(ValueError, match="no rule about resumes"):
        Rule.read(given)


def test_a_fingerprint_is_that_of_the_blob():
    assert fingerprint(DANA.blob) == DANA.fingerprint


class TestSecrets:
    SECRET = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"

    def test_one_in_a_reason_is_neither_signed_nor_recorded_and_the_run_goes_on(self, frozen):
        """What people sign is what the log will hold, to the character."""
        statement = frozen.ask(reason=f"revoked {self.SECRET}")
        assert statement.reason == "revoked [secret: github token]"
        for person in (DANA, ELI):
            frozen.sign(person, statement)
        assert not standing(frozen.path).frozen
        assert verify(frozen.path).code == 20
        assert [path for path in frozen.path.rglob("*.json*") if self.SECRET.encode() in path.read_bytes()] == []

    def test_a_statement_that_holds_one_all_the_same_counts_for_nothing(self, frozen):
        """It is recorded without, so that no signature fits it: better than to keep the secret."""
        made = ask(frozen.path, by="sam", reason="r", now=frozen.clock.now())
        statement = dataclasses.replace(made, reason=f"revoked {self.SECRET}")
        frozen.hand_in(statement)
        for person in (DANA, ELI):
            frozen.sign(person, statement)
        assert standing(frozen.path).frozen
        assert set(frozen.codes()) == {"wrong_bytes"}
        assert self.SECRET.encode() not in read.segments(frozen.path)[0].read_bytes()
