"""What may be said of a run whose processes were killed, from its log and from what was told outside of it.

Reads lines of JSON and nothing of ours: the log is judged by its bytes.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter

CLAIMS = {
    "lease": "an update was applied, and no lease for it was on disk",
    "settled": "updates ran while an earlier lease was not settled",
    "recorded": "an update moved weights, and the log neither records nor settles it",
    "frozen": "an update was applied in spite of a freeze",
    "forgotten": "a run came up without the freeze that somebody was told of",
    "uncalled": "a run froze, and nothing but a kill had happened",
    "request": "a request was lost, taken in twice, or read in part",
    "consent": "a resume took effect twice, or without the approvals that it names",
    "promoted": "weights act that no promotion in the log names",
    "same": "a promotion has other weights than in a run that nobody killed",
    "numbered": "two updates of one epoch have the same number",
    "anchored": "the log says that a checkpoint was kept elsewhere, and it is not there",
    "verified": "the log does not verify, or the two verifiers disagree",
    "ended": "a life ended with an error, or `status` tells of a promotion that is none",
}


class Log:
    """The records of a run, with where in which file each ends."""

    def __init__(self, folder):
        self.records, self._ends = [], []
        for name in sorted({path.name.removesuffix(".gz") for path in folder.glob("seg-*")}):
            raw = folder / name
            data = raw.read_bytes() if raw.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes())
            end = 0
            for line in data.splitlines(keepends=True):
                end += len(line)
                if line.endswith(b"\n"):
                    self.records.append(json.loads(line))
                    self._ends.append((name, end))

    def durable(self, sizes):
        """The number of the last record that was on disk when so much of the files was."""
        held = [end <= sizes.get(name, 0) or f"{name}.gz" in sizes for name, end in self._ends]
        return held.index(False) if False in held else len(held)

    def of(self, *types):
        return [record for record in self.records if record["type"] in types]


def judge(log, told):
    """Everything that is wrong, as (claim, sentence). `told` are the lines from outside, with `durable` as a number."""
    yield from _updates(log, told)
    yield from _leases(log)
    yield from _freezes(log, told)
    yield from _requests(log, told)
    yield from _consent(log, told)


def _updates(log, told):
    applied = set()
    for line in told:
        if line["what"] != "step":
            continue
        update, durable, pid = line["update"], line["durable"], line["pid"]
        before = log.records[:durable]
        lease = _lease(before)
        opened = [record for record in before if record["type"] == "log.opened"]
        if lease is None or not lease[0] <= update <= lease[1] or opened[-1]["body"]["pid"] != pid:
            yield "lease", f"update {update} in process {pid}, with {durable} records on disk: lease {lease}"
        if _in_force(before) or line["latch"]:
            yield "frozen", f"update {update} with {durable} records on disk: {_in_force(before)}, {line['latch']}"
        # Numbers begin again at the boundary; the epoch of its lease tells one update from the next of that number.
        epoch = next((r["epoch"] for r in reversed(before) if r["type"] == "update.leased"), None)
        if (epoch, update) in applied:
            yield "numbered", f"update {update} of epoch {epoch} in process {pid}"
        applied.add((epoch, update))
        if not _accounted(log.records[durable:], update):
            yield "recorded", f"update {update} in process {pid}, after record {durable}"


def _lease(records):
    """The lease in force at the end of some records."""
    lease = None
    for record in records:
        match record["type"]:
            case "update.leased":
                lease = (record["body"]["from"], record["body"]["to"])
            case "update.settled" | "freeze.entered" | "log.opened":
                lease = None
    return lease


def _in_force(records):
    turns = [record for record in records if record["type"] in ("freeze.entered", "resume.applied")]
    return turns[-1]["body"]["freeze"] if turns and turns[-1]["type"] == "freeze.entered" else None


def _accounted(after, update):
    """Whether the records behind an update say what became of it, before any other may be applied."""
    gone = False
    for record in after:
        body = record["body"]
        match record["type"]:
            case "update.applied" if not gone and body["from"] <= update <= body["to"]:
                return True
            case "update.settled" if body["from"] <= update <= body["to"]:
                return True
            case "log.opened":
                gone = True
            case "update.leased" if gone:
                return False
    return False


def _leases(log):
    """Of each process before it permits an update: what the one before it left open is settled."""
    lease, carried = None, False
    for record in log.records:
        body = record["body"]
        match record["type"]:
            case "log.opened":
                carried = lease is not None
            case "update.leased":
                if carried:
                    yield "settled", f"record {record['seq']} leases updates, and {lease} is open from before"
                lease = (body["from"], body["to"])
            case "update.applied" if lease:
                lease = (body["to"] + 1, lease[1]) if body["to"] < lease[1] else None
            case "update.settled":
                lease, carried = None, False
            case "cycle.finished" | "run.finished" if not carried:
                lease = None


def _freezes(log, told):
    for number, line in enumerate(told):
        if not _stops(line):
            continue
        step = next((later for later in told[number + 1 :] if later["what"] == "step"), None)
        if step is not None and not _ended(log, line, step):
            yield (
                "frozen",
                f"update {step['update']} in process {step['pid']} after {_stop(line)} and before any resume",
            )
        # A request is taken in at the first gate; of a latch and of a freeze a start knows.
        start = next((later for later in told[number + 1 :] if later["what"] == "open"), None)
        if start is not None and line["what"] != "submitted" and not (start["frozen"] or _ended(log, line, start)):
            yield "forgotten", f"process {start['pid']} is not frozen, after {_stop(line)}"
    ended = 0
    for record in log.of("freeze.entered", "resume.applied"):
        if record["type"] == "resume.applied":
            ended = record["seq"]
        elif not any(line["what"] == "cause" and ended <= line["durable"] < record["seq"] for line in told):
            rule, reason = record["body"]["rule"], record["body"]["reason"]
            yield "uncalled", f"record {record['seq']}: {record['body']['freeze']} ({rule}): {reason}"


def _stops(line):
    """Whether from then on nothing may be applied without a resume."""
    return line["what"] in ("frozen", "latched") or (line["what"] == "submitted" and line["kind"] == "freeze")


def _stop(line):
    return f"{line['what']} {line.get('freeze') or line.get('request') or ''} in process {line['pid']}"


def _ended(log, stop, later):
    """Whether a resume that was on disk at `later` ended the freeze that somebody was told of, or made."""
    resumes = [record for record in log.of("resume.applied") if record["seq"] <= later["durable"]]
    if stop["what"] == "frozen":
        return any(record["body"]["freeze"] == stop["freeze"] for record in resumes)
    return any(record["seq"] > stop["durable"] for record in resumes)


def _requests(log, told):
    taken = Counter(record["body"]["request"] for record in log.of(*_TAKEN))
    taken += Counter(record["body"]["approval"] for record in log.of("approval.given"))
    taken += Counter(r["body"]["approval"] for r in log.of("approval.refused") if r["body"]["approval"])
    submitted = {line["request"]: line["kind"] for line in told if line["what"] == "submitted"}
    for request in {*taken, *submitted}:
        if (times := taken[request]) != 1:
            yield "request", f"{submitted.get(request)} {request} was taken in {times} times"
    for record in log.of("note.added"):
        yield "request", record["body"]["text"]


_TAKEN = ("freeze.requested", "resume.requested", "note.requested")


def _consent(log, told):
    signed = {line["signature"] for line in told if line["what"] == "signs"}
    nonces, ended = Counter(), Counter()
    asked = {record["body"]["reason"] for record in log.of("resume.requested")}
    second = False
    for record in log.of("policy.loaded", "resume.applied"):
        body = record["body"]
        if record["type"] == "policy.loaded":
            second = body.get("resume") is not None
            continue
        ended[body["freeze"]] += 1
        if body["reason"] not in asked:
            yield "consent", f"{body['freeze']} was resumed and nobody asked"
        if second:
            nonces[body["statement"]["nonce"]] += 1
            approvals = body["approvals"]
            if len({one["person"] for one in approvals}) < 2 or not {one["signature"] for one in approvals} <= signed:
                yield "consent", f"{body['freeze']} was resumed by approvals that nobody gave, or too few"
    for what, times in (nonces + ended).items():
        if times > 1:
            yield "consent", f"{what} was resumed {times} times"
