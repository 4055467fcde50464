"""What of a folder would still be there after a power cut: a model, fed with every sync.

A file keeps what was there at its last sync, a folder the names that it had at its own. What was not synced is lost, or
with `chance` may be there in part, in any order: a name without its file's content, a removal that did not happen, the
beginning of a line, zeros in place of it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class Disk:
    """The folder `root`, all of which is on disk when this is made. `keep` is a folder on the same file system."""

    def __init__(self, root, keep):
        self.root, self.keep = Path(root), Path(keep)
        shutil.rmtree(self.keep, ignore_errors=True)
        self.keep.mkdir()
        self._names = {}
        """Of each folder: the names that are on disk, and whose they are."""
        self._sizes = {}
        """Of each file: how much of its content is."""
        self._held = []
        """Open folders: so their numbers are not given to others."""
        self._folder(self.root, deep=True)

    def sync(self, fd):
        """A file or a folder was synced."""
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if not path.is_relative_to(self.root):
            return
        if path.is_dir():
            self._folder(path)
        else:
            self._file(path, os.fstat(fd))

    def there(self, folder):
        """The files of a folder that are on disk by name, with how much of each; of a folder that is not, none."""
        at = self.root.stat().st_ino
        for part in folder.relative_to(self.root).parts:
            at = self._names.get(at, {}).get(part)
        names = self._names.get(at, {})
        return {name: self._sizes[number] for name, number in names.items() if number in self._sizes}

    def lose(self, into, *, chance=None):
        """Make `into` what `root` is after the power came back; with `chance`, a generator, by it."""
        now = {path.stat().st_ino: path for path in (self.root, *self.root.rglob("*"))}
        self._build(self.root.stat().st_ino, now, Path(into), chance)

    def _folder(self, path, *, deep=False):
        number = path.stat().st_ino
        if number not in self._names:
            self._held.append(os.open(path, os.O_RDONLY))
        names = {}
        for entry in os.scandir(path):
            inner = entry.inode()
            names[entry.name] = inner
            if entry.is_dir():
                if deep:
                    self._folder(path / entry.name, deep=True)
            elif deep:
                self._file(path / entry.name, entry.stat())
            else:
                self._hold(path / entry.name, inner)
        self._names[number] = names

    def _file(self, path, found):
        self._hold(path, found.st_ino)
        self._sizes[found.st_ino] = found.st_size

    def _hold(self, path, number):
        """Keep the content of a file for as long as this lives, whatever becomes of its name."""
        self._sizes.setdefault(number, 0)
        held = self.keep / str(number)
        if not os.path.lexists(held):
            os.link(path, held)

    def _build(self, number, now, out, chance):
        out.mkdir()
        folder = now.get(number)
        current = {entry.name: entry.inode() for entry in os.scandir(folder)} if folder else {}
        synced = self._names.get(number, {})
        for name in sorted({*synced, *(current if chance else ())}):
            inner = synced.get(name)
            if chance and current.get(name) != inner:
                inner = chance.choice([inner, current.get(name)])
            if inner is None:
                continue
            held = self.keep / str(inner)
            path = held if held.exists() else now.get(inner)
            if path is None or path.is_dir():
                self._build(inner, now, out / name, chance)
            else:
                self._copy(path, self._sizes.get(inner, 0), out / name, chance)

    def _copy(self, path, synced, out, chance):
        data = path.read_bytes()
        whole, data = len(data), data[:synced]
        if chance and whole > synced:
            more = path.read_bytes()[synced : chance.randint(synced, whole)]
            data += chance.choice([b"", more, bytes(len(more))])
        out.write_bytes(data)
