"""What a policy may say of the audit log: how often it is summed up, and where that is kept."""

import pytest
from policy_kit import small

from loopguard.controller.directory import anchors


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("[{kind: file, path: anchors.jsonl}]", "audit.anchors[0].path is 'anchors.jsonl'; expected an absolute path"),
        ("[{kind: git, repository: ../r}]", "audit.anchors[0].repository is '../r'; expected an absolute path"),
        ("[{kind: file}]", "audit.anchors[0].path is missing: the file"),
        ("[{kind: print, path: /x}]", "audit.anchors[0]: unknown key 'path'"),
        ("[{kind: ftp}]", "audit.anchors[0].kind is 'ftp'; expected one of file, git, print"),
        ("[{kind: print}, {kind: print, required: true}]", "audit.anchors[1] is there a second time; keep one"),
    ],
)
def test_an_anchor_is_one_place_that_can_be_found(findings, written, said):
    (line,) = findings(("promotion:\n", f"audit: {{anchors: {written}}}\npromotion:\n"))
    assert said in line
    assert line.startswith("31:")


@pytest.mark.parametrize("every", ["0", "1000001", "1.5"])
def test_checkpoints_come_after_a_whole_number_of_records(findings, every):
    (line,) = findings(("promotion:\n", f"audit: {{checkpoint_every: {every}}}\npromotion:\n"))
    assert "audit.checkpoint_every is" in line


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{code: kept}", "audit.payloads.code is 'kept'; expected one of head, digest, keep"),
        ("{printed: head}", "audit.payloads.printed is 'head'; expected one of digest, keep"),
        ("{stderr: keep}", "audit.payloads: unknown key 'stderr'"),
    ],
)
def test_what_is_kept_of_a_payload_is_one_of_a_few_words(findings, written, said):
    (line,) = findings(("promotion:\n", f"audit: {{payloads: {written}}}\npromotion:\n"))
    assert said in line


def test_the_places_reach_the_log_as_they_were_written():
    places = [{"kind": "file", "path": "/a", "required": True}, {"kind": "git", "repository": "~/b"}, {"kind": "print"}]
    told = anchors(small(audit__anchors=places))
    assert [(str(one), one.required) for one in told] == [("file /a", True), ("git ~/b", False), ("print", False)]
