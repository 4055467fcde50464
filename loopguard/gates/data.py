"""May this record become training data?"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from loopguard.types import Decision, Outcome, Record, Signal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from loopguard.policy.schema import Data

Reason = Literal["no_provenance", "source", "forbidden_in_prompt", "overlap", "duplicate", "own_share"]
"""Why a record is quarantined."""

WAIVABLE = frozenset({"kept_share", "mean_gain"})
"""What people may let pass: how much a loop keeps and gains may change for a reason."""

_FAULTS: frozenset[str] = frozenset({"no_provenance", "source", "forbidden_in_prompt", "overlap"})
"""Reasons that speak against the loop. Duplicates and the cap on the model's own share are the ordinary course."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the gate made of the drafts of one cycle."""

    decision: Decision
    admitted: tuple[Record, ...]
    quarantined: tuple[tuple[Record, Reason], ...]
    own_share: float
    """Share of the model's own characters in everything admitted so far, this batch included."""


@dataclass(slots=True)
class _Ledger:
    """What has been admitted since the run began."""

    seen: set[str] = field(default_factory=set)
    own_chars: int = 0
    all_chars: int = 0


class DataGate:
    """Decides what becomes training data, record by record and then for the batch as a whole.

    Record by record: provenance, source, forbidden text in the prompt, overlap with protected texts, exact duplicates,
    and the cap on what the model itself wrote. As a whole: how much the loop kept, how much it gained, and whether a
    sample of its checks holds when run again. A freeze admits nothing of the batch.

    `verdict` changes nothing; `commit` enters an allowed batch into the ledger.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self._ledger = _Ledger()
        self._protected = _Protected(data.overlap_ngram)
        self._kept_share: float | None = None
        self._kept_share_promoted: float | None = None
        self._share = 1.0
        self._waived = ""

    def adjust(self, *, share: float, waived: str) -> None:
        """How strict the next verdicts are: this share of every share that may go wrong, and a rule that trips nothing.

        What the records themselves show, faults and checks that do not hold, cannot be waived.
        """
        self._share, self._waived = share, waived

    def protect(self, texts: Iterable[str]) -> int:
        """Keep these evaluation texts out of the training data; gives how many texts are protected by now."""
        return self._protected.add(texts)

    def sample(self, records: Sequence[Record], *, salt: str) -> list[Record]:
        """The records whose checks should be run again before `verdict`; the same ones for the same salt."""
        if self._data.recheck is None:
            return []
        checked = [record for record in records if record.check is not None]
        return sorted(checked, key=lambda record: _digest(salt, record.id))[: self._data.recheck.sample]

    def verdict(
        self,
        records: Sequence[Record],
        *,
        proposed: int | None,
        rechecked: Sequence[tuple[Record, Outcome]] = (),
    ) -> Batch:
        """Judge the drafts of a cycle.

        `proposed` is how many drafts the loop made before it chose `records` of them; None where it did not choose.
        `rechecked` are the outcomes of the sample.
        """
        admitted, quarantined, ledger = self._sort(records)
        signals = [
            *self._kept(len(records), proposed),
            *self._gain(records),
            *self._recheck(rechecked, expected=len(self.sample(records, salt=""))),
            *self._quarantined(records, quarantined),
        ]
        kept_share = None if not proposed else len(records) / proposed
        own_share = ledger.own_chars / max(ledger.all_chars, 1)
        facts: dict[str, Any] = {
            "kept": len(records),
            "proposed": proposed,
            "kept_share": kept_share,
            "mean_gain": _mean_gain(records),
            "own_share": own_share,
            "recheck": {"checked": len(rechecked), "wrong": sum(not holds(r, o) for r, o in rechecked)},
        }
        passed = [one for one in signals if one.monitor == self._waived and one.monitor in WAIVABLE]
        facts |= {"waived": [signal.reason for signal in passed]} if passed else {}
        trips = tuple(signal for signal in signals if signal.level == "trip" and signal not in passed)
        if trips:
            reason = "; ".join(signal.reason for signal in trips)
            decision = Decision(
                result="freeze", gate="data", rule=trips[0].monitor, reason=reason, signals=trips, facts=facts
            )
            return Batch(decision=decision, admitted=(), quarantined=tuple(quarantined), own_share=own_share)
        decision = Decision(result="allow", gate="data", rule="default", reason="the batch is in order", facts=facts)
        return Batch(decision=decision, admitted=tuple(admitted), quarantined=tuple(quarantined), own_share=own_share)

    def commit(self, batch: Batch) -> None:
        """Enter an allowed batch into the ledger. Raises ValueError for any other."""
        if not batch.decision.allowed:
            raise ValueError(f"a batch that was not allowed ({batch.decision.rule}) cannot be committed")
        for record in batch.admitted:
            _enter(self._ledger, record)
        if batch.decision.facts["kept_share"] is not None:
            self._kept_share = batch.decision.facts["kept_share"]

    def promoted(self) -> None:
        """The cycle was promoted: what it kept is what the next cycle is compared with."""
        self._kept_share_promoted = self._kept_share

    def _sort(self, records: Sequence[Record]) -> tuple[list[Record], list[tuple[Record, Reason]], _Ledger]:
        ledger = _Ledger(set(self._ledger.seen), self._ledger.own_chars, self._ledger.all_chars)
        admitted: list[Record] = []
        quarantined: list[tuple[Record, Reason]] = []
        # People's records first: how much of the model's own output fits depends on them.
        order = sorted(records, key=lambda r: r.provenance is not None and r.provenance.source == "model")
        for record in order:
            reason = self._fault(record, ledger)
            if reason is None:
                admitted.append(record)
                _enter(ledger, record)
            else:
                quarantined.append((record, reason))
        return admitted, quarantined, ledger

    def fault(self, record: Record) -> Reason | None:
        """What speaks against one record by itself; whether it is a duplicate or too many are questions of a batch."""
        if record.provenance is None:
            return "no_provenance"
        if record.provenance.source not in self._data.sources:
            return "source"
        if any(mark in record.prompt for mark in self._data.forbidden_in_prompt):
            return "forbidden_in_prompt"
        # Apart as well: where the two meet, the first word of a completion would stick to the last of its prompt.
        if any(self._protected.overlaps(join.join((record.prompt, record.completion))) for join in ("", "\n")):
            return "overlap"
        return None

    def _fault(self, record: Record, ledger: _Ledger) -> Reason | None:
        if (fault := self.fault(record)) is not None:
            return fault
        assert record.provenance is not None
        if _digest(record.prompt, record.completion) in ledger.seen:
            return "duplicate"
        if record.provenance.source == "model":
            own, total = _chars(record)
            if ledger.own_chars + own > self._data.max_own_share * (ledger.all_chars + total):
                return "own_share"
        return None

    def _kept(self, kept: int, proposed: int | None) -> list[Signal]:
        rule = self._data.kept_share
        if rule is None or proposed is None:
            return []
        share = kept / proposed if proposed else 0.0
        previous = self._kept_share_promoted
        change = self._share * rule.max_change
        low = max(rule.min, 0.0 if previous is None else previous * (1 - change))
        high = min(rule.max, 1.0 if previous is None else previous * (1 + change))
        if low <= share <= high:
            return []
        was = "" if previous is None else f", last time {previous:.1%}"
        reason = f"the loop kept {share:.1%} of {proposed} proposals{was}; the policy allows {low:.1%} to {high:.1%}"
        return [_trip("kept_share", share, low, high, reason)]

    def _gain(self, records: Sequence[Record]) -> list[Signal]:
        mean = _mean_gain(records)
        if self._data.min_mean_gain is None or mean is None or mean >= self._data.min_mean_gain:
            return []
        reason = f"the mean gain of the kept records is {mean:.3g}; the policy asks for {self._data.min_mean_gain:.3g}"
        return [_trip("mean_gain", mean, self._data.min_mean_gain, None, reason)]

    def _recheck(self, rechecked: Sequence[tuple[Record, Outcome]], *, expected: int) -> list[Signal]:
        rule = self._data.recheck
        if rule is None or expected == 0:
            return []
        if len(rechecked) < expected:
            reason = f"only {len(rechecked)} of {expected} sampled checks were run again"
            return [_trip("recheck", math.nan, None, None, reason)]
        wrong = sum(not holds(record, outcome) for record, outcome in rechecked)
        share, most = wrong / len(rechecked), self._share * rule.max_wrong_share
        if share <= most:
            return []
        reason = f"{wrong} of {len(rechecked)} kept records do not hold when run again; the policy allows {most:.1%}"
        return [_trip("recheck", share, None, most, reason)]

    def _quarantined(self, records: Sequence[Record], quarantined: list[tuple[Record, Reason]]) -> list[Signal]:
        rule = self._data.freeze_above
        if rule is None or len(records) < rule.of_at_least:
            return []
        faults = Counter(reason for _, reason in quarantined if reason in _FAULTS)
        share, most = faults.total() / len(records), self._share * rule.quarantined_share
        if share <= most:
            return []
        [(worst, count)] = faults.most_common(1)
        reason = (
            f"{faults.total()} of {len(records)} records were quarantined ({count} for {worst}); "
            f"the policy allows {most:.1%}"
        )
        return [_trip("quarantined_share", share, None, most, reason)]

    def state_dict(self) -> dict[str, Any]:
        """The ledger and the last kept share; protected texts are not part of it, the loop names them at each start."""
        return {
            "seen": sorted(self._ledger.seen),
            "own_chars": self._ledger.own_chars,
            "all_chars": self._ledger.all_chars,
            "kept_share": self._kept_share_promoted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self._ledger = _Ledger(set(state["seen"]), state["own_chars"], state["all_chars"])
        self._kept_share = self._kept_share_promoted = state["kept_share"]


def holds(record: Record, outcome: Outcome) -> bool:
    """Whether a record's check came out as the record says: the same text, or the same number."""
    if record.check is None or not outcome.ok:
        return False
    printed, expected = outcome.text.strip(), record.check.expected.strip()
    if printed == expected:
        return True
    try:
        return math.isclose(float(printed), float(expected), rel_tol=1e-9, abs_tol=1e-9)
    except ValueError:
        return False


class _Protected:
    """Evaluation texts, as the n-grams of words they consist of."""

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._grams: set[int] = set()
        self._texts = 0

    def add(self, texts: Iterable[str]) -> int:
        for text in texts:
            self._grams.update(self._of(text))
            self._texts += 1
        return self._texts

    def overlaps(self, text: str) -> bool:
        return not self._grams.isdisjoint(self._of(text))

    def _of(self, text: str) -> list[int]:
        # A text shorter than n words is one gram by itself, so that it has to match whole.
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return [hash(tuple(words[i : i + self._ngram])) for i in range(max(1, len(words) - self._ngram + 1))]


def _enter(ledger: _Ledger, record: Record) -> None:
    own, total = _chars(record)
    ledger.seen.add(_digest(record.prompt, record.completion))
    ledger.own_chars += own
    ledger.all_chars += total


def _chars(record: Record) -> tuple[int, int]:
    """How many characters of a record the model wrote (its completion), and how many there are."""
    by_model = record.provenance is not None and record.provenance.source == "model"
    return (len(record.completion) if by_model else 0), len(record.prompt) + len(record.completion)


def _mean_gain(records: Sequence[Record]) -> float | None:
    gains = [record.gain for record in records if record.gain is not None]
    return sum(gains) / len(gains) if gains else None


def _trip(rule: str, value: float, low: float | None, high: float | None, reason: str) -> Signal:
    direction: Literal["up", "down"] | None = None
    if high is not None and value > high:
        direction = "up"
    elif low is not None and value < low:
        direction = "down"
    return Signal(
        level="trip",
        monitor=rule,
        metric=rule,
        value=value,
        at=0,
        low=low,
        high=high,
        direction=direction,
        reason=reason,
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode("utf-8", errors="surrogatepass")).hexdigest()[:24]
