"""The report: one file, the same bytes for the same log, and safe whatever the model wrote."""

from __future__ import annotations

import html.parser
import math
import random
import re
import shutil
from datetime import date
from xml.etree import ElementTree

import pytest
from audit_stories import HOSTILE, Loop, finished, frozen_twice, open_log, plain_log
from typer.testing import CliRunner

from loopguard.audit import keys, read
from loopguard.audit.report import clauses, render, thin, ticks, write_report
from loopguard.cli.audit import app
from loopguard.errors import UsageError


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("report") / "calc"
    frozen_twice(run_dir, updates=48, calls=12)
    return run_dir


@pytest.fixture(scope="module")
def page(story):
    return render(story)


class Seen(html.parser.HTMLParser):
    """Which elements and attributes a page has, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def named(page: str, name: str) -> ElementTree.Element:
    return next(svg for svg in svgs(page) if svg.get("aria-label", "").startswith(f"{name} by"))


def of_class(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in svg.iter() if name in (element.get("class") or "").split()]


class TestOneFile:
    def test_has_no_script_and_no_link_to_anywhere(self, page):
        """It opens years later without a network, and nothing in it runs."""
        seen = Seen(page)
        assert not seen.tags & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
        assert not seen.attributes & {"href", "src", "srcset", "onload", "onclick"}
        assert "http://" not in page.replace("http-equiv", "")
        assert "https://" not in page
        assert "url(" not in page
        assert "@import" not in page
        assert "//" not in page
        assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page

    def test_the_same_log_gives_the_same_bytes_wherever_it_lies(self, story, page, tmp_path):
        shutil.copytree(story, tmp_path / "elsewhere" / "copy")
        assert render(tmp_path / "elsewhere" / "copy") == page

    def test_is_written_beside_the_log(self, story, page):
        path = write_report(story)
        assert path == story / "report.html"
        assert path.read_text(encoding="utf-8") == page
        assert not list(story.glob(".report*"))

    def test_a_run_without_a_log_is_a_usage_error(self, tmp_path):
        with pytest.raises(UsageError, match="holds no audit log"):
            write_report(tmp_path)

    def test_every_drawing_is_well_formed(self, page):
        assert len(svgs(page)) == 2 + 4


class TestContent:
    def test_the_top_says_run_state_policy_and_check(self, page):
        text = Seen(page).text
        for part in ("run-a", "frozen", "log: unanchored", "toolformer", "6 promoted cycles", "2 freezes"):
            assert part in text

    def test_each_freeze_has_a_card(self, page):
        """Gate, rule, value against range, since when, what was undone, who resumed or what to do."""
        text = Seen(page).text
        for part in (
            *("update gate, rule jump(loss)", "loss 0.0041, expected 1.2 to 2.03", "update 273 looks wrong first"),
            *("updates 241-277 were undone", "dana let it go on", "labels were shifted; fixed in 3f1c"),
            *("promotion gate, rule panel.correct", "loopguard resume . --by NAME --reason TEXT"),
        ):
            assert part in text
        assert page.index(">f2 <") < page.index(">f1 <")

    def test_curves_tell_applied_undone_and_withheld_apart(self, page):
        """The faulty updates are drawn as undone, the withheld one as a cross, the freezes as lines."""
        loss = named(page, "loss")
        assert len(of_class(loss, "undone")) == 2
        assert len(of_class(loss, "kept")) == 1
        assert len(of_class(loss, "withheld")) == 1
        assert len(of_class(loss, "freeze")) == 2
        assert len(of_class(loss, "range")) == 1
        assert len(of_class(loss, "cycle")) > 6
        assert not of_class(named(page, "grad_norm"), "range")

    def test_an_open_range_is_told_and_not_drawn(self, tmp_path):
        """A bound without an upper end would be a line over the whole curve."""
        with open_log(tmp_path / "run") as log:
            log.append("update.applied", {"from": 1, "to": 2, "readings": {"loss": [1.0, 2.0]}})
            signal = {"metric": "loss", "value": "NaN", "low": 0.0, "high": None}
            log.append("freeze.entered", {"freeze": "f1", "update": 2, "signals": [signal]})
        page = render(tmp_path / "run")
        assert not of_class(named(page, "loss"), "range")
        assert "loss nan, expected at least 0" in Seen(page).text

    def test_promotions_stand_on_the_curves(self, page):
        """One mark for each time that the actor changed."""
        for name in ("loss", "grad_norm"):
            marks = of_class(named(page, name), "promotion")
            assert [mark[0].text for mark in marks] == [f"cycle {cycle} was promoted" for cycle in range(6)]
        assert not of_class(named(page, "correct"), "promotion")

    def test_a_card_has_margin_duration_and_approvals(self, page):
        text = Seen(page).text
        for part in (
            *(
                "expected 1.2 to 2.03 (score 11.3), 1.196 too low",
                "correct 0.9352, expected 0.1 to 0.7352, 0.2 too high",
            ),
            *("frozen for 32 min", "no approvals: one name and a reason were enough"),
            *("0 s when the log ends, and not resumed", "nobody yet: anybody with a name and a reason"),
            *("went on from what was promoted in cycle 4", "capsule freezes/f2, to be replayed"),
        ):
            assert part in text

    def test_signed_resumes_name_people_and_keys(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("freeze.entered", {"freeze": "f1", "gate": "data", "rule": "x", "reason": "y"})
            signed = [{"person": name, "key": f"SHA256:{name}"} for name in ("dana", "eli")]
            body = {"freeze": "f1", "by": "sam", "reason": "fine", "disposition": "rollback", "approvals": signed}
            log.append("resume.applied", body)
        assert "dana (key SHA256:dana) and eli (key SHA256:eli)" in Seen(render(tmp_path / "run")).text

    def test_where_people_have_to_sign_the_card_says_who_and_how(self, tmp_path):
        rule = {"approvals": 2, "people": {"eli": [], "dana": []}, "within_s": 60.0}
        rule |= {"requester_may_approve": False, "execute_within_s": 60.0}
        with open_log(tmp_path / "run") as log:
            log.append("policy.loaded", {"name": "two", "digest": log.policy, "resume": rule})
            log.append("freeze.entered", {"freeze": "f1", "gate": "data", "rule": "x", "reason": "y"})
        text = Seen(render(tmp_path / "run")).text
        assert "nobody yet: 2 of dana, eli have to sign; whoever asks does not count" in text
        assert "loopguard approve . --key FILE" in text

    def test_roll_backs_tools_and_checkpoints_have_tables(self, tmp_path):
        """Weights that went back, tools that were only refused, and what the framework saved."""
        with open_log(tmp_path / "run") as log:
            body = {"call": "c1", "result": "deny", "rule": "x", "reason": "y"}
            log.append("tool.decided", {**body, "tool": "sh"})
            log.append("tool.decided", {**body, "tool": "python", "result": "allow"})
            log.append("tool.finished", {"call": "c1", "status": "timeout"})
            log.append(
                "promotion.rolled_back", {"from": "a", "to": "b" * 64, "cycle": 3, "by": "dana", "reason": "bad"}
            )
            log.append("update.settled", {"from": 7, "to": 9, "restored": "c" * 64})
            log.append("promotion.settled", {"snapshot": "d" * 64, "applied": False})
            for update in range(1, 31):
                log.append("checkpoint.saved", {"checkpoint": f"out/checkpoint-{update}", "update": update})
            log.append("checkpoint.loaded", {"checkpoint": "out/checkpoint-30", "update": 30, "weights": "e" * 64})
        text = Seen(render(tmp_path / "run")).text
        for part in (
            *("python 1 0 1 0", "sh 0 1 0 0", "snapshot bbbbbbbbbbbb of cycle 3 dana: bad"),
            *("updates 7-9 were permitted, and a crash left no record of them", "that a crash had cut was undone"),
            *("the last 12 of 31", "saved 30", "loaded 30 eeeeeeeeeeee out/checkpoint-30"),
        ):
            assert part in text
        assert "out/checkpoint-19 " not in text

    def test_says_what_was_trusted_or_that_nothing_was(self, story, tmp_path):
        assert "keys trusted none anchors trusted none" in Seen(render(story)).text
        head = str(read.last(story).seq) + ":" + read.last(story).hash
        text = Seen(render(story, expect_head=head)).text
        assert "Verification: ok (0)" in text
        assert "keys trusted none anchors trusted none" not in text
        key = keys.SigningKey.made("gpu7").public
        assert f"keys trusted {key} anchors trusted none" in Seen(render(story, keys=[str(key)])).text

    def test_panels_show_what_was_not_promoted(self, page):
        dots = of_class(named(page, "correct"), "dot")
        assert [dot.get("class") for dot in dots] == ["dot ok"] * 6 + ["dot no"]

    def test_the_footer_says_how_to_check_it(self, story, page):
        head = read.last(story)
        assert f"loopguard audit verify . --expect-head {head.seq}:{head.hash}" in Seen(page).text

    def test_a_finished_run_has_no_card(self, tmp_path):
        finished(tmp_path / "run", cycles=2)
        text = Seen(render(tmp_path / "run")).text
        assert "finished" in text
        assert "This run has never frozen." in text

    def test_a_log_without_a_cycle_is_a_page_too(self, tmp_path):
        plain_log(tmp_path / "run")
        assert "running or stopped" in Seen(render(tmp_path / "run")).text

    def test_a_latch_without_a_record_is_frozen(self, tmp_path):
        finished(tmp_path / "run", cycles=1)
        (tmp_path / "run" / "latch").write_text("{}")
        assert "The latch is set." in Seen(render(tmp_path / "run")).text

    def test_an_altered_log_says_so_on_top_and_ends_before_the_damage(self, tmp_path):
        """A report never makes an altered log look whole."""
        frozen_twice(tmp_path / "run", updates=16, calls=4)
        path = read.segments(tmp_path / "run")[0]
        lines = path.read_bytes().splitlines(keepends=True)
        lines[40] = lines[40].replace(b'"seq":41', b'"seq":42')
        path.write_bytes(b"".join(lines))
        text = Seen(render(tmp_path / "run")).text
        assert "The audit log does not verify (tamper)." in text
        assert "This report ends before the damage: audit/controller/seg-000000000001.jsonl:41" in text
        assert str(tmp_path) not in text


class TestClauses:
    def test_each_has_a_version_a_date_a_gist_evidence_and_a_command(self):
        assert len(clauses()) == len({clause["id"] for clause in clauses()})
        for clause in clauses():
            assert clause.keys() == {"id", "version", "checked_on", "basis", "gist", "evidence", "command"}
            assert date.fromisoformat(clause["checked_on"])
            assert clause["basis"] in {"read", "second-hand", "from memory"}
            assert all(clause.values())

    @pytest.mark.parametrize("name", ["Article 12", "Article 14", "Article 15", "Article 19", "Article 72"])
    def test_the_articles_of_the_ai_act_are_there(self, name):
        assert any(name in clause["id"] and clause["id"].startswith("EU AI Act") for clause in clauses())

    @pytest.mark.parametrize("clause", clauses(), ids=lambda clause: clause["id"])
    def test_its_command_is_one_that_there_is(self, clause, story, tmp_path):
        """Run as it stands there, on a real run: evidence that no command shows is none."""
        program, group, *words = clause["command"].split()
        assert (program, group) == ("loopguard", "audit")
        named = {"RUN": str(story), "FILE.tar.gz": str(tmp_path / "out.tar.gz")}
        result = CliRunner().invoke(app, [named.get(word, word) for word in words], catch_exceptions=False)
        assert result.exit_code in {0, 20}

    def test_the_page_shows_them_and_says_that_it_is_no_legal_advice(self, page):
        text = Seen(page).text
        assert "This is no legal advice." in text
        assert all(clause["gist"] in text and clause["checked_on"] in text for clause in clauses())


class TestHostileText:
    @pytest.fixture
    def hostile(self, tmp_path):
        """A run in which everything that can be text is an attack."""
        loop = Loop(tmp_path / "run", calls=4)
        loop.log.append("policy.loaded", {"name": HOSTILE, "digest": HOSTILE})
        loop.log.append("cycle.started", {}, cycle=0)
        body = {"call": HOSTILE, "tool": HOSTILE, "code_head": HOSTILE, "rule": HOSTILE, "reason": HOSTILE}
        loop.log.append("tool.decided", {**body, "result": "deny"}, cycle=0)
        loop.log.append("tool.decided", {**body, "result": "allow"}, cycle=0)
        loop.log.append("tool.finished", {"call": HOSTILE, "status": HOSTILE}, cycle=0)
        loop.log.append("data.quarantined", {"reason": HOSTILE, "count": 1, "records": [HOSTILE]}, cycle=0)
        readings = {HOSTILE: [1.0, "NaN", HOSTILE, None, 2.0]}
        loop.log.append("update.applied", {"from": 1, "to": 5, "readings": readings}, cycle=0)
        loop.log.append("update.withheld", {"update": 6, "readings": {HOSTILE: math.inf}}, cycle=0)
        panel = {HOSTILE: 1.0, "nan": math.nan, "text": HOSTILE}
        loop.log.append("eval.finished", {"panel": panel}, cycle=0)
        loop.log.append("promotion.decided", {"result": HOSTILE, "panel": panel}, cycle=0)
        loop.log.append("cycle.finished", {"result": HOSTILE}, cycle=0)
        signal = {"metric": HOSTILE, "value": HOSTILE, "low": HOSTILE, "high": math.nan, "score": HOSTILE}
        body = {"freeze": HOSTILE, "gate": HOSTILE, "rule": HOSTILE, "reason": HOSTILE, "signals": [signal, HOSTILE]}
        loop.log.append("freeze.entered", {**body, "next": [HOSTILE], "restored": HOSTILE, "capsule": HOSTILE}, cycle=0)
        loop.log.append("note.added", {"by": HOSTILE, "text": HOSTILE})
        told = dict.fromkeys(("from", "to", "cycle", "by", "reason", "snapshot", "because", "restored"), HOSTILE)
        for kind in ("promotion.rolled_back", "snapshot.restored", "update.settled", "promotion.settled"):
            loop.log.append(kind, told, cycle=0)
        loop.log.append("checkpoint.saved", {"checkpoint": HOSTILE, "update": HOSTILE, "weights": HOSTILE})
        approvals = [{"person": HOSTILE, "key": HOSTILE}]
        loop.log.append("resume.applied", {"freeze": HOSTILE, "by": HOSTILE, "reason": HOSTILE, "approvals": approvals})
        loop.log.close()
        return tmp_path / "run"

    def test_becomes_text_and_nothing_else(self, hostile):
        """No element, no attribute, no control or bidirectional character gets through."""
        page = render(hostile)
        seen = Seen(page)
        assert "b" in seen.tags  # ours
        assert not seen.tags & {"script"}
        assert not {name for name in seen.attributes if name.startswith("on")}
        assert page.replace("\n", "").isprintable()
        assert "\\u001b[31m\\u202e\\u2066" in seen.text
        assert len(svgs(page)) == len(re.findall("<svg", page))


class TestDrawing:
    def test_thinning_keeps_both_extremes_of_each_stretch(self):
        """A single spike among 50,000 points stays visible."""
        rng = random.Random(1)
        points = [(float(x), rng.random()) for x in range(50_000)]
        points[31_234] = (31_234.0, 9.0)
        points[31_235] = (31_235.0, -9.0)
        thinned = thin(points)
        assert len(thinned) <= 2000
        assert (31_234.0, 9.0) in thinned
        assert (31_235.0, -9.0) in thinned
        assert thinned == sorted(thinned)

    def test_few_points_stay_as_they_are(self):
        points = [(float(x), 1.0) for x in range(2000)]
        assert thin(points) == points

    def test_a_long_run_gives_a_small_file(self, tmp_path):
        with open_log(tmp_path / "run") as log:
            log.append("cycle.started", {}, cycle=1)
            for first in range(1, 60_001, 500):
                readings = {"loss": [1 + 1 / (first + n) for n in range(500)]}
                log.append("update.applied", {"from": first, "to": first + 499, "readings": readings}, sync=False)
        assert len(render(tmp_path / "run")) < 80_000

    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [(0, 10, [0, 2, 4, 6, 8, 10]), (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3, 3, [-2, 0, 2]), (5, 5, [5])],
    )
    def test_axes_have_round_numbers(self, low, high, expected):
        assert ticks(low, high) == pytest.approx(expected)

    @pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e300, -1e300], [5e-324, 1.0], [1e9, 1e9 + 1]])
    def test_odd_curves_are_drawn(self, tmp_path, values):
        with open_log(tmp_path / "run") as log:
            log.append("update.applied", {"from": 1, "to": len(values), "readings": {"loss": values}})
        assert len(of_class(named(render(tmp_path / "run"), "loss"), "kept")) == 1
