"""The Merkle tree over the records of one stream, as RFC 6962 defines it, and what can be proven with it.

A chain of hashes shows order; a tree shows with a few hashes that one record is in a log, or that a longer log only
added to a shorter one. The data of leaf `n` are the 32 bytes of the `hash` of record `n + 1`.

Nothing here keeps the leaves. A tree holds its right edge, one hash for each power of two in its size, and a proof is
made from one reading of the log: it consists of the roots of a few ranges of leaves, and each range is a tree.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Range = tuple[int, int]

EMPTY_ROOT = hashlib.sha256().digest()
HASH_BYTES = 32


class Tree(NamedTuple):
    """A tree of some size, by the roots of the full subtrees at its right edge, largest first.

    A value: `grown` gives another tree. So a writer can note what a record would make of it before it is written.

    >>> Tree().grown(b"").root().hex()[:16]
    '6e340b9cffb37a98'
    """

    size: int = 0
    edge: tuple[bytes, ...] = ()

    def grown(self, *leaves: bytes) -> Tree:
        """The tree with one more leaf for each of these data. Many at once cost half as much."""
        sha256, size, edge = hashlib.sha256, self.size, [*self.edge]
        for data in leaves:
            node, full = sha256(b"\0" + data).digest(), size
            # Each 1 at the end of the size is a full subtree of that height, which the new node completes.
            while full & 1:
                node = sha256(b"\1" + edge.pop() + node).digest()
                full >>= 1
            edge.append(node)
            size += 1
        return Tree(size, tuple(edge))

    def root(self) -> bytes:
        """The hash that stands for all leaves and their order."""
        if not self.edge:
            return EMPTY_ROOT
        node = self.edge[-1]
        for left in reversed(self.edge[:-1]):
            node = _joined(left, node)
        return node


EMPTY = Tree()


def roots(leaves: Iterable[bytes], ranges: Sequence[Range], *, front: Tree = EMPTY) -> list[bytes]:
    """The roots of some ranges of leaves, each a start and an end that is left out, from one reading of the data.

    Where the first leaves are gone, `front` is the tree that they made, and `leaves` are those behind it. Raises
    ValueError where the leaves end before a range does, or where a range takes a part of the front by itself.
    """
    trees = [_begun(front, start, end) for start, end in ranges]
    for index, data in enumerate(leaves, front.size):
        for number, (start, end) in enumerate(ranges):
            if start <= index < end:
                trees[number] = trees[number].grown(data)
    for tree, (start, end) in zip(trees, ranges, strict=True):
        if tree.size != end - start:
            raise ValueError(f"there are {start + tree.size} leaves; a proof over {start}-{end - 1} needs {end}")
    return [tree.root() for tree in trees]


def _begun(front: Tree, start: int, end: int) -> Tree:
    """What the front holds of a range: full subtrees at its edge, each of them within the range."""
    most, at, size, kept = min(front.size, end), 0, 0, []
    for node, width in zip(front.edge, _widths(front.size), strict=True):
        if start <= at and at + width <= most:
            kept.append(node)
            size += width
        at += width
    if size != max(most - start, 0):
        raise ValueError(f"leaves {start}-{end - 1} lie in a front of {front.size} leaves that is gone")
    return Tree(size, tuple(kept))


def _widths(size: int) -> list[int]:
    """The sizes of the full subtrees that a tree of this size consists of, largest first."""
    return [1 << height for height in reversed(range(size.bit_length())) if size >> height & 1]


def inclusion(index: int, *, size: int) -> list[Range]:
    """The ranges whose roots prove that leaf `index` is in the tree of this size, in the order of the proof."""
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} is not in a tree of {size} leaves")
    return _beside(index, 0, size)


def consistency(old: int, *, size: int) -> list[Range]:
    """The ranges whose roots prove that the tree of this size begins with the `old` leaves of a smaller one."""
    if not 0 < old <= size:
        raise ValueError(f"a tree of {size} leaves does not extend one of {old}; give 1 to {size}")
    return _before(old, 0, size, known=True)


def root_of(data: bytes, proof: Sequence[bytes], *, index: int, size: int) -> bytes:
    """The root that an inclusion proof leads to. The leaf is in the tree if that is the tree's root.

    Raises ValueError where the proof has another length than one for this index and size.
    """
    node = hashlib.sha256(b"\0" + data).digest()
    ranges = inclusion(index, size=size)
    _same_length(proof, ranges)
    for other, (start, _) in zip(proof, ranges, strict=True):
        node = _joined(other, node) if start < index else _joined(node, other)
    return node


def extends(old_root: bytes, root: bytes, proof: Sequence[bytes], *, old: int, size: int) -> bool:
    """Whether a consistency proof shows that the larger tree begins with all of the smaller one.

    Raises ValueError where the proof has another length than one for these sizes.
    """
    ranges = consistency(old, size=size)
    _same_length(proof, ranges)
    if old == size:
        return old_root == root
    known = dict(zip(ranges, proof, strict=True))
    if all(start > 0 for start, _ in ranges):
        # The smaller tree is one full subtree of the larger one, so that its root is not said again.
        known[0, old] = old_root
    return _rebuilt(known, 0, old) == old_root and _rebuilt(known, 0, size) == root


def _rebuilt(known: dict[Range, bytes], start: int, end: int) -> bytes:
    """The root of a range from the roots of its parts; empty, which is no root, where a part is not known."""
    if (start, end) in known:
        return known[start, end]
    if end - start < 2:
        return b""
    middle = start + _split(end - start)
    left, right = _rebuilt(known, start, middle), _rebuilt(known, middle, end)
    return _joined(left, right) if left and right else b""


def _beside(index: int, start: int, end: int) -> list[Range]:
    """From the leaf upward, the subtrees that are joined to the one that holds it."""
    if end - start == 1:
        return []
    middle = start + _split(end - start)
    if index < middle:
        return [*_beside(index, start, middle), (middle, end)]
    return [*_beside(index, middle, end), (start, middle)]


def _before(old: int, start: int, end: int, *, known: bool) -> list[Range]:
    """SUBPROOF of RFC 6962, section 2.1.2; `known`: whether this subtree is one that the smaller tree's root tells."""
    if old == end:
        return [] if known else [(start, end)]
    middle = start + _split(end - start)
    if old <= middle:
        return [*_before(old, start, middle, known=known), (middle, end)]
    return [*_before(old, middle, end, known=False), (start, middle)]


def _split(size: int) -> int:
    """The largest power of two below a size."""
    return 1 << ((size - 1).bit_length() - 1)


def _joined(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _same_length(proof: Sequence[bytes], ranges: Sequence[Range]) -> None:
    if len(proof) != len(ranges):
        raise ValueError(f"the proof has {len(proof)} hashes; one for these numbers has {len(ranges)}")
