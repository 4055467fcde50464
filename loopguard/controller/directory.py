"""A run directory: whose it is, what stands in it, and what an interrupted run left open."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopguard import __version__
from loopguard.approvals import book
from loopguard.audit.anchors import Anchor, refuse_inside
from loopguard.audit.keys import log_key
from loopguard.audit.redact import words
from loopguard.consent.sshsig import stamp
from loopguard.errors import PolicyMismatchError, UsageError
from loopguard.notify import Command, Notifier, Webhook, command, key_from
from loopguard.policy.diff import compare
from loopguard.policy.load import LoadedPolicy, load
from loopguard.snapshots import replace_durably, writing
from loopguard.snapshots.files import make_directory
from loopguard.state import bring_latch, run_facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loopguard.audit.events import Entry
    from loopguard.notify import Endpoint
    from loopguard.policy.schema import GuardPolicy


_POLICY_FILE = re.compile(r"[0-9a-f]{64}\.yaml|\.[0-9a-f]{64}\.yaml\.partial")


class Trail:
    """What the log says was begun and not ended."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.snapshots: set[str] = set()
        self.credible: set[str | None] = {None}
        """What the pointer may name: the last promotion that was written, or where a crash came in between, the one
        before."""
        self._chain: list[str | None] = [None]
        self.unsettled: int | None = None
        """The cycle of a promotion that was decided and is not known to be on disk."""
        self._acts = False
        self.rolled_back: str | None = None
        """The snapshot that a person went back to, where nothing was promoted since."""
        self.lease: tuple[int, int] | None = None
        self.open_cycle: int | None = None
        for entry in entries:
            self._take(entry)

    def _take(self, entry: Entry) -> None:
        body = entry.body
        match entry.type:
            case "cycle.started":
                self.open_cycle = entry.cycle
            case "cycle.finished":
                self.open_cycle = self.lease = None
            case "run.finished" | "run.interrupted":
                self.lease = None  # whatever was applied is recorded
            case "update.leased":
                self.lease = (body["from"], body["to"])
            case "update.applied" | "update.settled":
                last = body["to"]
                self.lease = (last + 1, self.lease[1]) if self.lease and last < self.lease[1] else None
            case "promotion.decided" if body["result"] == "allow":
                self.unsettled, self._acts = entry.cycle, False
            case "promotion.applied":
                self._acts = True
            case "freeze.entered" if not self._acts:
                self.unsettled = None  # the freeze took it back
            case "snapshot.written" if body["promoted"]:
                self.snapshots.add(body["snapshot"])
                self.rolled_back = None
                self._chain.append(body["snapshot"])
                self.credible = set(self._chain[-2:])
            case "promotion.settled":
                self.unsettled = None
                self._go_back_to(body["snapshot"])  # a promotion that is undone comes between no other two
            case "promotion.rolled_back":
                self.unsettled, self.rolled_back = None, body["to"]
                self._go_back_to(body["to"])
                self.credible = {body["from"], body["to"]}
            case _:
                return

    def _go_back_to(self, snapshot: str | None) -> None:
        if snapshot in self._chain:
            del self._chain[self._chain.index(snapshot) + 1 :]
            self.credible = {snapshot}


def refuse_unlogged(run_dir: Path, policy: str) -> None:
    """Raise PolicyMismatchError where `run.json` names another guard policy than the log of the run."""
    told = book(run_dir)
    if not told.belongs_to(policy):
        raise PolicyMismatchError(
            [
                (
                    f"{run_dir}/run.json names guard policy {policy[:12]}, and the log of the run {told.policy[:12]}: "
                    f"somebody edited it. Put {told.policy} back"
                )
            ]
        )


def check(
    run_dir: Path, loaded: LoadedPolicy, *, adopt_policy: str | None, by: str | None, reason: str | None
) -> dict[str, Any] | None:
    """Whether this directory may be used under this policy; the body of `policy.adopted` where it changes hands."""
    # Before anything is laid out: the log could not be opened with them.
    refuse_inside(run_dir, anchors(loaded.policy))
    check_second_latch(run_dir, loaded.policy)
    log_key(run_dir)
    if not (run_dir / "run.json").exists():
        if holds_else(run_dir):
            raise UsageError(f"{run_dir} holds something else than a run: name a new directory with --run-dir")
        return None
    facts = run_facts(run_dir)
    if facts.get("mode") == "observe":
        raise UsageError(
            f"{run_dir} is the directory of an observed run, and no guard vouches for what is in it: name a new "
            f"directory. `loopguard init --from-run {run_dir}` writes a policy for it"
        )
    old = str(facts["policy"])
    refuse_unlogged(run_dir, old)
    if old == loaded.digest:
        return None
    if adopt_policy is None or adopt_policy != loaded.digest:
        raise PolicyMismatchError(
            [
                (
                    f"{run_dir} belongs to guard policy {old[:12]}, and {loaded.path} is {loaded.digest[:12]}. "
                    f"To change the policy of this run, add --adopt-policy {loaded.digest}"
                )
            ]
        )
    before = load(run_dir / "policy" / f"{old}.yaml")
    if before.digest != old:
        raise PolicyMismatchError(
            [f"{before.path} is {before.digest[:12]} by what it says: somebody edited the guard policy of {run_dir}"]
        )
    change = compare(before.policy, loaded.policy)
    if change == "loosened" and before.policy.resume is not None:
        return {"from": old, "to": loaded.digest, "change": change, "by": by, "reason": reason} | _approved(
            run_dir, before, loaded
        )
    if change == "loosened" and not (by and reason):
        raise PolicyMismatchError(
            [f"{loaded.path} is not provably tighter than the policy of {run_dir}: say --by NAME --reason TEXT"]
        )
    return {"from": old, "to": loaded.digest, "change": change, "by": by, "reason": reason}


def _approved(run_dir: Path, before: LoadedPolicy, loaded: LoadedPolicy) -> dict[str, str]:
    """The resume by which people agreed to a loosened policy. Raises PolicyMismatchError where there is none."""
    told = book(run_dir)
    record = told.may_adopt(before.digest, loaded.digest, now=max(stamp(datetime.now(UTC)), told.latest))
    if record is None or told.freeze is not None:
        raise PolicyMismatchError(
            [
                (
                    f"{loaded.path} is not provably tighter than the policy of {run_dir}, which asks for approvals: "
                    f"freeze the run, ask with `loopguard resume {run_dir} --adopt-policy {loaded.path}`, have that "
                    f"approved, and start the run in time"
                )
            ]
        )
    return {"approved": record}


def loaded_facts(loaded: LoadedPolicy) -> dict[str, Any]:
    """What `policy.loaded` holds.

    From it alone a reader of the log knows whose approvals a resume takes, and who is told of a freeze.
    """
    resume = loaded.policy.resume
    facts: dict[str, Any] = {"name": loaded.policy.name, "digest": loaded.digest}
    facts |= {"resume": resume.to_rule().facts()} if resume is not None else {}
    return facts | ({"notify": told} if (told := _told(loaded.policy)) else {})


def _told(policy: GuardPolicy) -> list[dict[str, Any]]:
    notify = policy.notify
    if notify is None:
        return []
    told: list[Endpoint] = [Webhook(url=one.url, key=b"") for one in notify.webhooks]
    told += [Command(argv=notify.command)] if notify.command else []
    return [one.facts() for one in told]


def holds_else(run_dir: Path) -> bool:
    """Whether a directory without `run.json` holds more than a start leaves that was killed before it wrote that."""
    if not run_dir.exists():
        return False
    if not run_dir.is_dir():
        return True
    inside = {path.name: path for path in run_dir.iterdir()}
    inside.pop(".run.json.partial", None)
    policies = inside.pop("policy", None)
    if inside or policies is None:
        return bool(inside)
    return not policies.is_dir() or any(_POLICY_FILE.fullmatch(path.name) is None for path in policies.iterdir())


def lay_out(
    run_dir: Path, loaded: LoadedPolicy, *, run_id: str, seed: int, command: Sequence[str], mode: str | None = None
) -> None:
    """Write what is not there yet of `run.json` and the policy; nothing that is there changes.

    `mode` is "observe" for a run that is watched and not guarded.
    """
    with writing(run_dir):
        make_directory(run_dir / "policy")  # the run's own name too: a log that is on disk and has no way to it is none
    kept = run_dir / "policy" / f"{loaded.digest}.yaml"
    if not kept.exists():
        replace_durably(kept, loaded.text.encode())
    if not (run_dir / "run.json").exists():
        body: dict[str, Any] = {"id": run_id, "policy": loaded.digest, "seed": seed, "command": words(command)}
        body |= {"versions": versions()} | ({"mode": mode} if mode else {}) | _second_latch(loaded.policy, run_id)
        replace_durably(run_dir / "run.json", json.dumps(body, indent=1, sort_keys=True).encode() + b"\n")


def check_second_latch(run_dir: Path, policy: GuardPolicy) -> None:
    """Raise UsageError where the second place for a latch is none: gone, takes no file, or lies in the run."""
    facts = run_facts(run_dir) if (run_dir / "run.json").exists() else {}
    recorded = facts.get("second_latch")
    if isinstance(recorded, str) and not Path(recorded).parent.exists():
        raise UsageError(
            f"{Path(recorded).parent}, the second place for the latch of {run_dir}, is gone, and a latch may lie in "
            "it: mount its volume; where that is gone for good, and nothing froze the run, make the folder again"
        )
    if policy.freeze.second_latch is None:
        return
    folder = Path(policy.freeze.second_latch).expanduser()
    if folder.resolve().is_relative_to(run_dir.resolve()):
        raise UsageError(f"freeze.second_latch is {folder}, in the run directory: name a folder on another volume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (trial := folder / f".trial-{os.getpid()}").touch()
        trial.unlink()
    except OSError as error:
        raise UsageError(f"freeze.second_latch is {folder}, which takes no file: {error.strerror}") from error


def _second_latch(policy: GuardPolicy, run_id: str) -> dict[str, str]:
    """What `run.json` says of it, for commands that read no policy."""
    folder = policy.freeze.second_latch
    return {"second_latch": str(Path(folder).expanduser() / f"{run_id}.latch")} if folder else {}


def set_policy(run_dir: Path, loaded: LoadedPolicy) -> None:
    """From now on the directory belongs to this policy."""
    facts = run_facts(run_dir)
    if facts.get("second_latch") != _second_latch(loaded.policy, facts["id"]).get("second_latch"):
        bring_latch(run_dir)
    kept = {name: value for name, value in facts.items() if name != "second_latch"}
    body = kept | {"policy": loaded.digest} | _second_latch(loaded.policy, facts["id"])
    replace_durably(run_dir / "run.json", json.dumps(body, indent=1, sort_keys=True).encode() + b"\n")


def anchors(policy: GuardPolicy) -> list[Anchor]:
    """Where the guard policy says that checkpoints of the log are kept."""
    return [
        Anchor(
            kind=place.kind,
            place=getattr(place, "path", "") or getattr(place, "repository", ""),
            required=place.required,
        )
        for place in policy.audit.anchors
    ]


def endpoints(policy: GuardPolicy) -> list[Endpoint]:
    """Who is told, as the guard policy says. Raises UsageError for a secret that is not set, or no such program."""
    if policy.notify is None:
        return []
    places: list[Endpoint] = [Webhook(url=one.url, key=key_from(one.secret)) for one in policy.notify.webhooks]
    places += [command(policy.notify.command)] if policy.notify.command else []
    return places


def notifier(policy: GuardPolicy, run_dir: Path) -> Notifier | None:
    """What tells them; None where nobody is to be told. Raises UsageError, as `endpoints` does."""
    notify = policy.notify
    if notify is None:
        return None
    return Notifier(endpoints(policy), run_dir=run_dir, events=notify.events, within_s=notify.within_s)


def versions() -> dict[str, str]:
    """Of what is loaded and matters to a result."""
    versions = {"loopguard": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "transformers", "numpy"):
        if (module := sys.modules.get(name)) is not None:
            versions[name] = str(module.__version__)
    return versions
