"""Resuming, asked for from a terminal: a loop that lives, one that is gone, and one that has only just begun."""

import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager

import pytest
from lab import POLICY, Lab
from people import DANA, ELI, FAY, STRANGER

from loopguard.audit import read
from loopguard.audit.log import AuditLog
from loopguard.audit.verify import verify
from loopguard.cli.app import _main
from loopguard.consent.statement import Statement
from loopguard.controller import LoopGuard
from loopguard.controller.directory import lay_out
from loopguard.errors import LoopFrozen, PolicyMismatchError
from loopguard.policy.load import load
from loopguard.state import standing
from loopguard.testing import FakeRuntime

torch = pytest.importorskip("torch", reason="attach needs torch")
torch.set_num_threads(1)

PEOPLE = f"{{dana: ['{DANA.line}'], eli: ['{ELI.line}'], fay: ['{FAY.line}']}}"
RESUME = f"resume: {{approvals: 2, people: {PEOPLE}}}\n"
WAITING = POLICY.replace("when_frozen: raise", "when_frozen: wait")
LOOSER = POLICY.replace("max_gain: 0.2", "max_gain: 0.9")
TIGHTER = POLICY.replace("max_gain: 0.2", "max_gain: 0.1")
with_ssh_keygen = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed: apt-get install openssh-client"
)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


@pytest.fixture
def guarded(lab):
    """A run whose resumes take two people."""
    lab.policy.write_text(POLICY + RESUME)
    return lab


def loopguard(*words):
    return _main([str(word) for word in words])


def ask(lab, *more, code=4):
    """Ask for a resume; gives what is to be signed."""
    assert loopguard("resume", lab.run_dir, "--by", "sam", "--reason", "bad shard removed", *more) == code


def approve(lab, person, statement, tmp_path, *more):
    """Hand a signature in that was made elsewhere."""
    path = tmp_path / f"{person.name}.sig"
    path.write_text(person.sign(statement))
    return loopguard("approve", lab.run_dir, "--signature", path, *more)


def frozen_run(lab):
    """A run that promoted a cycle, froze in the next one, and whose process is gone."""
    with pytest.raises(LoopFrozen), lab.build(lab.open()) as guard:
        for cycle in guard.cycles(2):
            for _ in range(6):
                lab.update(cycle)
            if cycle.number == 2:
                lab.update(cycle, factor=float("nan"))
            lab.promote(cycle)


def recorded(stands):
    return stands.frozen and stands.acknowledged


@contextmanager
def living(lab):
    """A frozen loop that waits for a resume, in a thread of its own; it is over once it has promoted two cycles."""
    done = []

    def loop():
        with lab.build(lab.open()) as guard:
            for cycle in guard.cycles(2):
                for _ in range(3):
                    lab.update(cycle)
                if cycle.number == 2 and not lab.events("freeze.entered"):
                    lab.update(cycle, factor=float("nan"))
                lab.promote(cycle)
            done.append(guard.promoted_cycle)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    while not (lab.run_dir / "run.json").exists() or not recorded(standing(lab.run_dir)):
        thread.join(0.05)
        assert thread.is_alive(), "the loop ended before it froze"
    yield done
    thread.join(60)
    assert not thread.is_alive(), "the loop did not go on"


class TestOnePerson:
    def test_a_policy_without_the_section_says_so_in_the_log(self, lab):
        frozen_run(lab)
        assert loopguard("resume", lab.run_dir, "--by", "dana", "--reason", "bad shard removed") == 0
        (entry,) = lab.events("resume.applied")
        assert (entry.body["approval"], entry.body["by"]) == ("none", "dana")
        assert verify(lab.run_dir).findings == []

    def test_there_is_nothing_to_approve(self, lab, tmp_path, capsys):
        frozen_run(lab)
        assert approve(lab, DANA, b"x", tmp_path) == 1
        assert "no request waits for an approval" in capsys.readouterr().err

    def test_another_policy_is_adopted_at_the_start_and_not_here(self, lab, capsys):
        frozen_run(lab)
        assert loopguard("resume", lab.run_dir, "--by", "a", "--reason", "b", "--adopt-policy", lab.policy) == 2
        assert "resumes without approvals" in capsys.readouterr().err


class TestADeadLoop:
    def test_goes_on_once_two_people_agreed_and_not_before(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        ask(guarded)
        shown = capsys.readouterr()
        statement = shown.out.encode()
        assert "2 people have to approve until" in shown.err
        assert approve(guarded, DANA, statement, tmp_path) == 4
        assert f"counted as dana ({DANA.fingerprint}): 1 of 2 approvals" in capsys.readouterr().out
        with pytest.raises(LoopFrozen), guarded.build(guarded.open()) as guard:
            next(guard.cycles(2))
        assert approve(guarded, ELI, statement, tmp_path) == 0
        assert "may go on: f1 ended, as eli" in capsys.readouterr().out
        with guarded.build(guarded.open()) as guard:
            guarded.run(guard, 2)
            assert guard.promoted_cycle == 2
        assert verify(guarded.run_dir).findings == []

    def test_what_is_printed_is_what_is_signed(self, guarded, capsys):
        """On the way to a machine without LoopGuard, and again from the run directory."""
        frozen_run(guarded)
        ask(guarded)
        statement = capsys.readouterr().out
        (request,) = guarded.events("resume.requested")
        assert Statement.read(request.body["statement"]).signed_bytes() == statement.encode()
        assert loopguard("approve", guarded.run_dir, "--print") == 0
        assert capsys.readouterr().out == statement
        snapshot = json.loads((guarded.run_dir / "snapshots" / "promoted.json").read_text())
        assert json.loads(statement)["target"] in json.dumps(snapshot)

    def test_who_signs_is_shown_what_it_is_about(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        ask(guarded)
        approve(guarded, DANA, capsys.readouterr().out.encode(), tmp_path)
        shown = capsys.readouterr().err
        for word in (
            "freeze    f1",
            "tripped   update gate",
            "asked by  sam: bad shard removed",
            "policy    unchanged",
        ):
            assert word in shown

    def test_status_says_what_it_waits_for(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        ask(guarded)
        statement = capsys.readouterr().out.encode()
        approve(guarded, DANA, statement, tmp_path)
        assert loopguard("status", guarded.run_dir) == 4
        assert "FROZEN, a resume waits for 1 of 2 approvals (dana)" in capsys.readouterr().out
        assert loopguard("status", guarded.run_dir, "--json") == 4
        facts = json.loads(capsys.readouterr().out)
        assert (facts["approved_by"], facts["approvals_needed"], facts["owner_pid"]) == (["dana"], 2, None)
        assert facts["expires"] == json.loads(statement)["expires"]

    def test_a_freeze_ends_what_waits(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        ask(guarded)
        statement = capsys.readouterr().out.encode()
        approve(guarded, DANA, statement, tmp_path)
        assert loopguard("freeze", guarded.run_dir, "--by", "fay", "--reason", "look at shard 18") == 0
        assert standing(guarded.run_dir).pending is None
        assert approve(guarded, ELI, statement, tmp_path) == 1
        assert standing(guarded.run_dir).frozen

    def test_what_is_refused_is_said_with_its_code(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        ask(guarded)
        statement = capsys.readouterr().out.encode()
        assert approve(guarded, STRANGER, statement, tmp_path) == 1
        assert "not counted: the key belongs to nobody whom the guard policy names (unknown_key)" in (
            capsys.readouterr().err
        )
        assert standing(guarded.run_dir).pending is not None

    def test_an_edited_policy_file_approves_nothing(self, guarded, tmp_path, capsys):
        """The rule is taken from the log, and the file has to be the one whose digest people sign."""
        frozen_run(guarded)
        ask(guarded)
        statement = capsys.readouterr().out.encode()
        approve(guarded, DANA, statement, tmp_path)
        (path,) = (guarded.run_dir / "policy").iterdir()
        path.write_text(path.read_text().replace("approvals: 2", "approvals: 1"))
        assert approve(guarded, ELI, statement, tmp_path) == 1
        assert guarded.events("approval.refused")[0].body["code"] == "policy"
        assert standing(guarded.run_dir).frozen

    def test_the_list_shows_who_asked_who_approved_and_what_went_on(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        ask(guarded)
        statement = capsys.readouterr().out.encode()
        for person in (STRANGER, DANA, ELI):
            approve(guarded, person, statement, tmp_path)
        capsys.readouterr()
        assert loopguard("audit", "approvals", guarded.run_dir) == 0
        rows = capsys.readouterr().out.splitlines()[1:]
        told = ["asked for f1", "refused: unknown_key", "approved", "approved", "f1 went on, approved by 2"]
        assert [re.split(r"  +", row)[1] for row in rows] == told
        assert DANA.fingerprint in rows[2]
        assert loopguard("audit", "approvals", guarded.run_dir, "--json") == 0
        assert len(json.loads(capsys.readouterr().out)) == 5
        assert loopguard("audit", "why", guarded.run_dir) == 0
        assert "approved by dana and eli" in capsys.readouterr().out

    def test_a_run_that_nobody_asked_for_has_an_empty_list(self, lab, capsys):
        frozen_run(lab)
        assert loopguard("audit", "approvals", lab.run_dir) == 0
        assert "was never asked to resume" in capsys.readouterr().err

    def test_a_start_that_comes_too_late_comes_up_frozen(self, guarded, tmp_path, capsys, monkeypatch):
        """People agreed to what was so then; nobody knows what has changed since."""
        guarded.policy.write_text(POLICY + RESUME.replace("approvals", "execute_within: 1m, approvals"))
        frozen_run(guarded)
        ask(guarded)
        statement = capsys.readouterr().out.encode()
        approve(guarded, DANA, statement, tmp_path)
        assert approve(guarded, ELI, statement, tmp_path) == 0
        (entry,) = guarded.events("resume.applied")
        assert entry.body["execute_before"] > entry.body["judged"]
        late(monkeypatch, seconds=61)
        with pytest.raises(LoopFrozen, match="approved for a start before"), guarded.build(guarded.open()) as guard:
            next(guard.cycles(2))
        assert guarded.events("freeze.entered")[-1].body["rule"] == "overdue"
        assert [finding for finding in verify(guarded.run_dir).findings if "clock" not in finding] == []

    @pytest.mark.parametrize("words", [[], ["--key", "k", "--signature", "s"]])
    def test_it_takes_one_way_to_sign(self, guarded, capsys, words):
        frozen_run(guarded)
        ask(guarded)
        assert loopguard("approve", guarded.run_dir, *words) == 2
        assert "say with what you sign" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "said"), [(None, "no such file"), (b"\xff", "is not text"), (b"x" * 20_000, "is larger than any")]
    )
    def test_a_file_that_is_no_signature_is_2(self, guarded, tmp_path, capsys, content, said):
        frozen_run(guarded)
        ask(guarded)
        path = tmp_path / "some.sig"
        if content is not None:
            path.write_bytes(content)
        assert loopguard("approve", guarded.run_dir, "--signature", path) == 2
        assert said in capsys.readouterr().err


def late(monkeypatch, *, seconds):
    """The clock of this machine, some time later."""
    from datetime import timedelta

    from loopguard.audit.log import SystemClock

    now = SystemClock.now
    monkeypatch.setattr(SystemClock, "now", lambda self: now(self) + timedelta(seconds=seconds))


class TestALivingLoop:
    def test_one_person_lets_it_go_on(self, lab):
        lab.policy.write_text(WAITING)
        with living(lab) as done:
            assert loopguard("resume", lab.run_dir, "--by", "dana", "--reason", "bad shard removed") == 0
            assert not standing(lab.run_dir).frozen
        assert done == [2]

    def test_two_people_let_it_go_on_and_it_counts_them_itself(self, lab, tmp_path, capsys):
        lab.policy.write_text(WAITING + RESUME)
        with living(lab) as done:
            ask(lab)
            statement = capsys.readouterr().out.encode()
            assert approve(lab, DANA, statement, tmp_path) == 4
            assert standing(lab.run_dir).frozen
            assert approve(lab, DANA, statement, tmp_path) == 1
            assert approve(lab, ELI, statement, tmp_path) == 0
        assert done == [2]
        (entry,) = lab.events("resume.applied")
        assert entry.body["execute_before"] is None, "it goes on at once"
        assert {entry.actor["id"] for entry in lab.events("approval.given")} == {"dana", "eli"}
        assert verify(lab.run_dir).findings == []

    def test_status_and_freeze_say_what_it_does(self, lab, capsys):
        lab.policy.write_text(WAITING)
        with living(lab):
            assert loopguard("status", lab.run_dir) == 4
            assert "owner     process" in capsys.readouterr().out
            assert loopguard("freeze", lab.run_dir, "--by", "fay", "--reason", "x") == 0
            assert "frozen already (f1)" in capsys.readouterr().out
            assert loopguard("resume", lab.run_dir, "--by", "dana", "--reason", "bad shard removed") == 0

    def test_it_counts_an_approval_that_came_before_it_had_taken_the_request_in(self, lab, tmp_path, capsys):
        lab.policy.write_text(WAITING + RESUME)
        with living(lab) as done:
            assert loopguard("resume", lab.run_dir, "--by", "sam", "--reason", "x", "--wait", "0") == 4
            statement = capsys.readouterr().out.encode()
            for person in (DANA, ELI):
                approve(lab, person, statement, tmp_path, "--wait", "0")
        assert done == [2]


class TestALoopThatHasJustBegun:
    """It holds the log, and comes to no gate yet."""

    @pytest.fixture
    def starting(self, guarded):
        frozen_run(guarded)
        facts = json.loads((guarded.run_dir / "run.json").read_text())
        log = AuditLog.open(guarded.run_dir, run_id=facts["id"], policy=facts["policy"])
        yield guarded
        log.close()

    @pytest.mark.parametrize("pid", [True, False])
    def test_status_is_that_of_a_run_with_an_owner(self, starting, capsys, pid):
        """Also in the moment in which it has not yet written who it is."""
        lock = starting.run_dir / "audit" / "controller" / "lock"
        if not pid:
            lock.write_bytes(b"")
        assert loopguard("status", starting.run_dir) == 4
        assert f"owner     {'process' if pid else 'a process that is just starting'}" in capsys.readouterr().out

    def test_before_it_has_a_log_it_can_be_frozen_already(self, lab, capsys):
        """It has laid its directory out, and whoever is in a hurry need not wait for the rest."""
        lab.run_dir.mkdir()
        loaded = load(lab.policy)
        lay_out(lab.run_dir, loaded, run_id="run-1", seed=0, command=[])
        assert loopguard("status", lab.run_dir) == 0
        assert "stopped" in capsys.readouterr().out
        assert loopguard("freeze", lab.run_dir, "--by", "fay", "--reason", "x") == 0
        with pytest.raises(LoopFrozen, match="fay asked for it"), lab.build(lab.open()) as guard:
            next(guard.cycles(1))

    def test_a_request_waits_for_its_first_gate(self, starting, capsys):
        ask(starting, "--wait", "0.2")
        shown = capsys.readouterr()
        assert "takes the request up at its next gate" in shown.err
        assert standing(starting.run_dir).pending is None
        assert loopguard("approve", starting.run_dir, "--print") == 0
        assert capsys.readouterr().out == shown.out

    def test_an_approval_waits_too_and_says_so(self, starting, tmp_path, capsys):
        ask(starting, "--wait", "0")
        statement = capsys.readouterr().out.encode()
        assert approve(starting, DANA, statement, tmp_path, "--wait", "0.2") == 1
        assert "the loop has not counted it yet" in capsys.readouterr().err

    def test_a_freeze_is_latched_and_says_so(self, lab, capsys):
        lab.build(lab.open()).close()
        facts = json.loads((lab.run_dir / "run.json").read_text())
        log = AuditLog.open(lab.run_dir, run_id=facts["id"], policy=facts["policy"])
        assert loopguard("freeze", lab.run_dir, "--by", "fay", "--reason", "x", "--wait", "0.2") == 1
        assert "latched, not yet acknowledged" in capsys.readouterr().err
        assert loopguard("resume", lab.run_dir, "--by", "dana", "--reason", "x", "--wait", "0.2") == 1
        assert "latched, not yet acknowledged" in capsys.readouterr().err
        log.close()
        assert standing(lab.run_dir).frozen
        assert loopguard("resume", lab.run_dir, "--by", "dana", "--reason", "x") == 0
        assert not standing(lab.run_dir).frozen

    def test_a_resume_of_one_person_is_not_claimed_before_it_happened(self, lab, capsys):
        frozen_run(lab)
        facts = json.loads((lab.run_dir / "run.json").read_text())
        log = AuditLog.open(lab.run_dir, run_id=facts["id"], policy=facts["policy"])
        assert loopguard("resume", lab.run_dir, "--by", "dana", "--reason", "x", "--wait", "0.2") == 1
        assert "has not taken it up yet" in capsys.readouterr().err
        assert standing(lab.run_dir).frozen
        log.close()


class TestARunOfAnotherPolicy:
    """`run.json` says to which policy a run belongs, and so does its log, which cannot be edited unseen."""

    def edit(self, lab, digest):
        facts = json.loads((lab.run_dir / "run.json").read_text())
        (lab.run_dir / "run.json").write_text(json.dumps(facts | {"policy": digest}))

    def test_a_run_that_was_given_to_another_policy_by_an_editor_does_not_start(self, guarded):
        frozen_run(guarded)
        guarded.policy.write_text(POLICY)
        self.edit(guarded, load(guarded.policy).digest)
        with pytest.raises(PolicyMismatchError, match=r"run\.json names guard policy .* somebody edited it"):
            guarded.open()
        assert loopguard("resume", guarded.run_dir, "--by", "sam", "--reason", "fine") == 1
        assert standing(guarded.run_dir).frozen

    def test_a_start_that_died_before_it_loaded_what_it_adopted_starts_again(self, guarded):
        frozen_run(guarded)
        before = load(guarded.policy).digest
        guarded.policy.write_text(TIGHTER + RESUME)
        after = load(guarded.policy)
        lay_out(guarded.run_dir, after, run_id="", seed=0, command=())
        with AuditLog.open(guarded.run_dir, run_id=standing(guarded.run_dir).run, policy=before) as log:
            log.append("policy.adopted", {"from": before, "to": after.digest, "change": "tightened"})
        self.edit(guarded, after.digest)
        guarded.open().close()
        assert guarded.events("policy.loaded")[-1].body["digest"] == after.digest
        assert verify(guarded.run_dir).findings == []


class TestAnotherPolicy:
    """A run that resumes by approvals is loosened by approvals."""

    def digest(self, tmp_path, text):
        path = tmp_path / "other.yaml"
        path.write_text(text)
        return path, load(path).digest

    def resume(self, lab, path, tmp_path, capsys):
        ask(lab, "--adopt-policy", path)
        statement = capsys.readouterr().out.encode()
        approve(lab, DANA, statement, tmp_path)
        assert approve(lab, ELI, statement, tmp_path) == 0
        return json.loads(statement)

    def adopt(self, lab, path, digest):
        lab.policy = path
        return lab.open(adopt_policy=digest, by="sam", reason="more room")

    def test_a_name_and_a_reason_loosen_nothing(self, guarded, tmp_path):
        frozen_run(guarded)
        path, digest = self.digest(tmp_path, LOOSER + RESUME)
        with pytest.raises(PolicyMismatchError, match="which asks for approvals"):
            self.adopt(guarded, path, digest)

    def test_neither_does_a_resume_that_does_not_say_so(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        path, digest = self.digest(tmp_path, LOOSER + RESUME)
        ask(guarded)
        statement = capsys.readouterr().out.encode()
        approve(guarded, DANA, statement, tmp_path)
        approve(guarded, ELI, statement, tmp_path)
        with pytest.raises(PolicyMismatchError, match="which asks for approvals"):
            self.adopt(guarded, path, digest)

    def test_what_people_sign_says_that_it_is_loosened(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        path, digest = self.digest(tmp_path, LOOSER + RESUME)
        statement = self.resume(guarded, path, tmp_path, capsys)
        assert (statement["policy_change"], statement["next_policy"]) == ("loosened", digest)
        with guarded.build(self.adopt(guarded, path, digest)) as guard:
            guarded.run(guard, 2)
        (adopted,) = guarded.events("policy.adopted")
        assert adopted.body["approved"] == guarded.events("resume.applied")[0].hash
        assert verify(guarded.run_dir).findings == []

    def test_to_ask_for_no_approvals_any_more_is_loosened(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        path, digest = self.digest(tmp_path, POLICY)
        assert self.resume(guarded, path, tmp_path, capsys)["policy_change"] == "loosened"
        self.adopt(guarded, path, digest).close()
        assert verify(guarded.run_dir).findings == []

    def test_only_the_one_that_was_named(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        path, _ = self.digest(tmp_path, LOOSER + RESUME)
        self.resume(guarded, path, tmp_path, capsys)
        path, digest = self.digest(tmp_path, LOOSER.replace("0.9", "0.95") + RESUME)
        with pytest.raises(PolicyMismatchError, match="which asks for approvals"):
            self.adopt(guarded, path, digest)

    def test_not_after_another_freeze(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        path, digest = self.digest(tmp_path, LOOSER + RESUME)
        self.resume(guarded, path, tmp_path, capsys)
        loopguard("freeze", guarded.run_dir, "--by", "fay", "--reason", "wait")
        with pytest.raises(PolicyMismatchError, match="which asks for approvals"):
            self.adopt(guarded, path, digest)

    def test_not_after_a_freeze_that_came_while_the_sandbox_started(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        path, digest = self.digest(tmp_path, LOOSER + RESUME)
        self.resume(guarded, path, tmp_path, capsys)

        def slow(*_):
            assert loopguard("freeze", guarded.run_dir, "--by", "fay", "--reason", "wait") == 0
            return FakeRuntime(lambda _: "4")

        with pytest.raises(PolicyMismatchError, match="which asks for approvals"):
            LoopGuard.from_file(path, run_dir=guarded.run_dir, adopt_policy=digest, runtimes=slow)
        assert guarded.events("policy.adopted") == []
        assert standing(guarded.run_dir).freeze == "f2"

    def test_a_tightened_one_needs_nobody(self, guarded, tmp_path, capsys):
        frozen_run(guarded)
        path, digest = self.digest(tmp_path, TIGHTER + RESUME)
        self.adopt(guarded, path, digest).close()
        assert guarded.events("policy.adopted")[0].body["change"] == "tightened"
        assert verify(guarded.run_dir).findings == []

    def test_and_voids_what_waits(self, guarded, tmp_path, capsys):
        """People signed for the policy as it was."""
        frozen_run(guarded)
        ask(guarded)
        statement = capsys.readouterr().out.encode()
        approve(guarded, DANA, statement, tmp_path)
        path, digest = self.digest(tmp_path, TIGHTER + RESUME)
        self.adopt(guarded, path, digest).close()
        assert approve(guarded, ELI, statement, tmp_path) == 1
        assert "policy" in [entry.body["code"] for entry in guarded.events("approval.refused")]
        assert standing(guarded.run_dir).frozen

    def test_the_same_one_is_no_change(self, guarded, capsys):
        frozen_run(guarded)
        ask(guarded, "--adopt-policy", guarded.policy, code=2)
        assert "has already" in capsys.readouterr().err

    def test_a_policy_file_of_the_run_that_was_edited_is_not_compared_with(self, guarded, tmp_path):
        frozen_run(guarded)
        (path,) = (guarded.run_dir / "policy").iterdir()
        path.write_text(path.read_text().replace("approvals: 2", "approvals: 1"))
        other, digest = self.digest(tmp_path, TIGHTER + RESUME)
        with pytest.raises(PolicyMismatchError, match="somebody edited the guard policy"):
            self.adopt(guarded, other, digest)


VERIFY = ["ssh-keygen", "-Y", "verify", "-f", "signers", "-n", "loopguard-approve@v1", "-s", "it.sig"]


@with_ssh_keygen
class TestWithAKey:
    """`approve --key` calls ssh-keygen, and what it hands in is what ssh-keygen itself accepts."""

    @pytest.fixture
    def keyed(self, lab, tmp_path):
        lines = {}
        for name in ("dana", "eli", "fay"):
            key = tmp_path / name
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", key], check=True)
            lines[name] = [key.with_suffix(".pub").read_text().strip()]
        lab.policy.write_text(POLICY + f"resume: {{approvals: 2, people: {json.dumps(lines)}}}\n")
        (tmp_path / "signers").write_text("".join(f"{name} {line}\n" for name, (line,) in lines.items()))
        frozen_run(lab)
        ask(lab)
        return lab

    def test_two_people_sign_and_it_goes_on(self, keyed, tmp_path, capsys):
        loopguard("approve", keyed.run_dir, "--print")
        statement = capsys.readouterr().out
        assert loopguard("approve", keyed.run_dir, "--key", tmp_path / "dana", "--yes") == 4
        assert loopguard("approve", keyed.run_dir, "--key", tmp_path / "eli", "--yes") == 0
        (entry,) = keyed.events("resume.applied")
        for each in entry.body["approvals"]:
            (tmp_path / "it.sig").write_text(each["signature"])
            done = subprocess.run(
                [*VERIFY, "-I", each["person"]],
                cwd=tmp_path,
                input=statement.encode(),
                capture_output=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        assert verify(keyed.run_dir).findings == []

    def test_a_signature_made_elsewhere_counts(self, keyed, tmp_path, capsys):
        path = tmp_path / "statement.json"
        loopguard("approve", keyed.run_dir, "--print")
        path.write_text(capsys.readouterr().out)
        command = ["ssh-keygen", "-q", "-Y", "sign", "-n", "loopguard-approve@v1", "-f", tmp_path / "dana", path]
        subprocess.run(command, check=True)
        assert loopguard("approve", keyed.run_dir, "--signature", f"{path}.sig") == 4

    def test_nobody_signs_without_having_been_asked(self, keyed, tmp_path, capsys):
        assert loopguard("approve", keyed.run_dir, "--key", tmp_path / "dana") == 2
        assert "say --yes" in capsys.readouterr().err
        assert not list(read.entries(keyed.run_dir, types=("approval.given",)))

    def test_a_key_that_is_not_there_or_is_none_is_2(self, keyed, tmp_path, capsys):
        assert loopguard("approve", keyed.run_dir, "--key", tmp_path / "gone", "--yes") == 2
        (tmp_path / "none").write_text("x")
        assert loopguard("approve", keyed.run_dir, "--key", tmp_path / "none", "--yes") == 2
        assert "signed nothing" in capsys.readouterr().err

    def test_where_ssh_keygen_is_missing_the_way_around_is_named(self, keyed, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert loopguard("approve", keyed.run_dir, "--key", tmp_path / "dana", "--yes") == 2
        assert "--signature FILE" in capsys.readouterr().err
