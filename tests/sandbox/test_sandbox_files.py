"""Names that code in a cell chose never lead out of the folder that their files are written to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loopguard.sandbox.files import conflict, save, trouble

PARTS = st.one_of(
    st.sampled_from(
        ["", ".", "..", "...", "~", "a", "b", "c", " ", "-rf", "\n", "\\", "..\\", "\0", "\ud800", "ł" * 128]
    ),
    st.text(max_size=8),
)
NAMES = st.one_of(st.lists(PARTS, max_size=7).map("/".join), st.text(max_size=1100))
FEW_NAMES = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join), max_size=5)


def everything_below(folder: Path) -> set[str]:
    """Names of all files and folders, relative."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def descriptors() -> set[str]:
    """What this process holds open, where that can be seen."""
    folder = Path("/proc/self/fd")
    return (
        {f"{each.name} {each.readlink()}" for each in folder.iterdir() if each.is_symlink()}
        if folder.exists()
        else set()
    )


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["a", "a/b/c.txt", "...", "..a/b..", "~/x", " ", "-rf", "a\nb", "zażółć/łódź", "x" * 255, "\\..\\x", "C:\\x"],
    )
    def test_a_relative_name_is_one(self, name):
        """Also an odd one: only what leads elsewhere, or fits on no disk, is refused."""
        assert trouble(name, depth=8) == ""

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("", "1 to 1024 bytes"),
            ("a\0b", "no NUL"),
            ("ł" * 513, "1 to 1024 bytes"),
            ("/etc/passwd", "relative"),
            ("//", "relative"),
            ("..", "neither empty nor"),
            ("a/../b", "neither empty nor"),
            ("a/..", "neither empty nor"),
            (".", "neither empty nor"),
            ("./a", "neither empty nor"),
            ("a//b", "neither empty nor"),
            ("a/", "neither empty nor"),
            ("ł" * 128, "longer than 255 bytes"),
            ("a/" + "x" * 256, "longer than 255 bytes"),
            ("a/b/c/d", "more than 2 folders deep"),
            ("half \ud800", "not UTF-8"),
        ],
    )
    def test_what_is_refused_says_why(self, name, why):
        """The reason does not repeat the name, which may be long or hostile."""
        said = trouble(name, depth=2)
        assert why in said
        assert said.isascii()

    @given(name=NAMES, depth=st.integers(0, 6))
    @example(name="a/b", depth=0)
    def test_no_accepted_name_leaves_a_folder(self, name, depth):
        """However it is read: as it stands, normalised, or as bytes; and it is as deep as it looks."""
        if trouble(name, depth=depth):
            return
        assert os.path.normpath(f"/folder/{name}") == f"/folder/{name}"
        assert Path("/folder", name).relative_to("/folder").parts == tuple(name.split("/"))
        assert len(os.fsencode(name)) <= 1024
        assert name.count("/") <= depth

    @given(names=FEW_NAMES)
    @example(names=["a/b/c", "a"])
    @example(names=["a", "ab", "a/"])
    def test_a_conflict_is_a_name_that_another_has_as_a_folder(self, names):
        """What it names is one of them, and the beginning of another."""
        found = conflict(names)
        clashes = {one for one in names for other in names if other.startswith(f"{one}/")}
        assert found in clashes if clashes else found == ""


class TestSave:
    def test_files_come_to_lie_where_their_names_say(self, tmp_path):
        """With folders, with bytes of every kind, for nobody but their owner."""
        files = {"a.bin": bytes(range(256)), "deep/er/b": b"b", "deep/c": b""}
        assert save(files, tmp_path / "new" / "out") == list(files)
        out = tmp_path / "new" / "out"
        assert {name: (out / name).read_bytes() for name in files} == files
        assert (out / "a.bin").stat().st_mode & 0o777 == 0o600

    def test_nothing_to_save_is_an_empty_folder(self, tmp_path):
        """So that who asked for a folder finds one."""
        assert save({}, tmp_path / "out") == []
        assert everything_below(tmp_path) == {"out"}

    @settings(max_examples=60, deadline=None)
    @given(files=st.dictionaries(NAMES, st.binary(max_size=4), max_size=4))
    @example(files={"..": b"", "a": b""})
    @example(files={"a": b"", "../out2/a": b""})
    @example(files={"x" * 255: b"", "/".join("x" * 15 for _ in range(64)): b"deep"})
    def test_nothing_is_written_beside_the_folder(self, files):
        """Whatever the names are: all of them below it, or, where one is refused, nothing at all."""
        with tempfile.TemporaryDirectory() as name:
            top = Path(name)
            if any(trouble(each, depth=64) for each in files):
                with pytest.raises(ValueError, match="is no name for a file"):
                    save(files, top / "out")
                assert everything_below(top) == set()
            elif not conflict(files):
                save(files, top / "out")
                assert {each: (top / "out" / each).read_bytes() for each in files} == files
                assert [each.name for each in top.iterdir()] == ["out"]

    @settings(max_examples=60, deadline=None)
    @given(names=FEW_NAMES)
    def test_names_without_a_conflict_fit_into_one_folder(self, names):
        """And those with one do not, in whatever order they come."""
        with tempfile.TemporaryDirectory() as folder:
            files = dict.fromkeys(names, b"x")
            if conflict(names):
                with pytest.raises(OSError, match=r"exists|[Nn]ot a directory|Is a directory"):
                    save(files, Path(folder))
            else:
                assert save(files, Path(folder)) == list(files)

    @pytest.mark.parametrize("bad", ["../x", "/tmp/x", "a/../../x", "", "a\0", "half \ud800", "d/" * 65 + "x"])
    def test_one_bad_name_and_nothing_is_written(self, tmp_path, bad):
        """Not even the folder, whatever place the bad name has among the good ones."""
        for files in ({"good": b"1", bad: b"2"}, {bad: b"2", "good": b"1"}):
            with pytest.raises(ValueError, match="is no name for a file"):
                save(files, tmp_path / "out")
        assert everything_below(tmp_path) == set()

    def test_a_name_that_is_too_deep_for_the_caller(self, tmp_path):
        """The depth is the caller's to say."""
        with pytest.raises(ValueError, match="more than 1 folders deep"):
            save({"a/b/c": b""}, tmp_path / "out", depth=1)
        assert save({"a/b": b""}, tmp_path / "out", depth=1) == ["a/b"]

    @pytest.mark.parametrize("target", ["victim", "nothing-there", "folder"])
    @pytest.mark.parametrize("name", ["link", "link/file", "sub/link", "sub/link/file"])
    def test_a_planted_link_is_not_followed(self, tmp_path, target, name):
        """Neither as the file nor as a folder on the way, wherever it leads."""
        (tmp_path / "victim").write_text("untouched")
        (tmp_path / "folder").mkdir()
        out = tmp_path / "out"
        (out / "sub").mkdir(parents=True)
        link = out / name.partition("/file")[0]
        link.symlink_to(tmp_path / target)
        before = everything_below(tmp_path)
        with pytest.raises(OSError, match=r"exists|Not a directory|symbolic links"):
            save({name: b"evil"}, out)
        assert everything_below(tmp_path) == before
        assert (tmp_path / "victim").read_text() == "untouched"
        assert link.is_symlink()

    @pytest.mark.parametrize("kind", ["file", "folder", "fifo", "hard link"])
    def test_what_is_there_already_stays(self, tmp_path, kind):
        """A file of any kind: nothing is overwritten, and a pipe without a reader holds nobody up."""
        there, other = tmp_path / "out" / "there", tmp_path / "other"
        there.parent.mkdir()
        other.write_text("old")
        match kind:
            case "file":
                there.write_text("old")
            case "folder":
                there.mkdir()
            case "fifo":
                os.mkfifo(there)
            case "hard link":
                there.hardlink_to(other)
        before = there.lstat()
        with pytest.raises(FileExistsError):
            save({"there": b"new"}, there.parent)
        assert (there.lstat().st_ino, there.lstat().st_size) == (before.st_ino, before.st_size)
        assert other.read_text() == "old"

    def test_no_descriptor_stays_open(self, tmp_path):
        """After success, a bad name, a link, a file that was there, and a file in the place of a folder."""
        (tmp_path / "loop").symlink_to("loop")
        before = descriptors()
        save({"a": b"1", "b/c/d": b"2"}, tmp_path)
        for name in ("..", "loop", "loop/x", "b/c/d", "a/x", "b/c/d/e/f", "b"):
            with pytest.raises((ValueError, OSError)):
                save({name: b""}, tmp_path)
        assert descriptors() == before

    def test_a_disk_that_refuses_is_told_as_it_is(self, tmp_path):
        """A place that is no folder at all raises what the system said."""
        (tmp_path / "out").write_text("")
        with pytest.raises(FileExistsError):
            save({"a": b""}, tmp_path / "out")
