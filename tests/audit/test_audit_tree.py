"""The tree over a log is that of RFC 6962: the vectors of Certificate Transparency, and every shape."""

from __future__ import annotations

import doctest
import hashlib
import random

import pytest

from loopguard.audit import tree
from loopguard.audit.tree import EMPTY_ROOT, Tree, consistency, extends, inclusion, root_of, roots

# The leaves and roots that certificate-transparency tests with (merkletree/merkle_tree_test.cc), used by RFC 6962 logs.
LEAVES = [
    bytes.fromhex(text)
    for text in ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
NODES = {
    "96": "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
    "5f": "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    "6b": "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    "bc": "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    "ca": "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
    "d3": "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "0e": "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
}
MOST = 40
MANY = [number.to_bytes(4, "big") for number in range(MOST)]


def grown(leaves) -> Tree:
    one = Tree()
    for data in leaves:
        one = one.grown(data)
    return one


def defined(leaves) -> bytes:
    """MTH of RFC 6962, section 2.1, word by word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + defined(leaves[:k]) + defined(leaves[k:])).digest()


@pytest.fixture(scope="module")
def whole() -> list[bytes]:
    """The root of each size up to forty."""
    return [grown(MANY[:size]).root() for size in range(MOST + 1)]


class TestKnownAnswers:
    @pytest.mark.parametrize("size", range(9))
    def test_roots(self, size):
        assert grown(LEAVES[:size]).root().hex() == ROOTS[size]

    @pytest.mark.parametrize(
        ("index", "size", "proof"),
        [(0, 1, ""), (0, 8, "96 5f 6b"), (5, 8, "bc ca d3"), (1, 5, "6e 5f bc"), (2, 3, "fa")],
    )
    def test_inclusion_proofs(self, index, size, proof):
        made = roots(LEAVES, inclusion(index, size=size))
        known = {**NODES, "6e": ROOTS[1], "fa": ROOTS[2]}
        assert [node.hex() for node in made] == [known[word] for word in proof.split()]
        assert root_of(LEAVES[index], made, index=index, size=size).hex() == ROOTS[size]

    @pytest.mark.parametrize(
        ("old", "size", "proof"), [(1, 1, ""), (1, 8, "96 5f 6b"), (6, 8, "0e ca d3"), (2, 5, "5f bc")]
    )
    def test_consistency_proofs(self, old, size, proof):
        made = roots(LEAVES, consistency(old, size=size))
        assert [node.hex() for node in made] == [NODES[word] for word in proof.split()]
        assert extends(bytes.fromhex(ROOTS[old]), bytes.fromhex(ROOTS[size]), made, old=old, size=size)

    def test_the_example_in_the_docstring_works(self):
        assert doctest.testmod(tree).failed == 0

    def test_nothing_has_the_hash_of_nothing(self):
        assert Tree().root() == EMPTY_ROOT == bytes.fromhex(ROOTS[0])


class TestEveryShape:
    def test_a_grown_tree_has_the_root_of_the_definition(self, whole):
        assert whole == [defined(MANY[:size]) for size in range(MOST + 1)]

    def test_a_tree_keeps_one_hash_for_each_power_of_two_in_its_size(self):
        """So that a writer's memory does not grow with its log."""
        assert all(len(grown(MANY[:size]).edge) == size.bit_count() for size in range(MOST + 1))

    @pytest.mark.parametrize("size", [0, 1, 6, 7, 8])
    def test_many_leaves_at_once_make_the_same_tree(self, size):
        assert grown(MANY[:size]).grown(*MANY[size:]) == grown(MANY)
        assert grown(MANY[:size]).grown() == grown(MANY[:size])

    def test_growing_leaves_the_tree_as_it_was(self):
        """A write that is interrupted goes back to the tree before it."""
        one = grown(MANY[:7])
        root = one.root()
        assert one.grown(b"x").size == 8
        assert (one.size, one.root()) == (7, root)

    def test_every_inclusion_proof_holds_for_its_leaf_alone(self, whole):
        for size in range(1, MOST + 1):
            for index in range(size):
                proof = roots(MANY, inclusion(index, size=size))
                assert root_of(MANY[index], proof, index=index, size=size) == whole[size]
                assert root_of(b"another", proof, index=index, size=size) != whole[size]

    def test_every_consistency_proof_holds_for_its_roots_alone(self, whole):
        for size in range(1, MOST + 1):
            for old in range(1, size + 1):
                proof = roots(MANY, consistency(old, size=size))
                assert extends(whole[old], whole[size], proof, old=old, size=size)
                assert not extends(bytes(32), whole[size], proof, old=old, size=size)
                assert not extends(whole[old], bytes(32), proof, old=old, size=size)

    def test_a_log_that_was_rewritten_below_the_old_size_extends_nothing(self, whole):
        """Whatever proof is given for it, of the old leaves or of the new ones."""
        rng = random.Random(0)
        for _ in range(200):
            size = rng.randint(2, MOST)
            old = rng.randint(1, size)
            other = list(MANY[:size])
            other[rng.randrange(old)] = b"rewritten"
            root = grown(other).root()
            for leaves in (MANY, other):
                proof = roots(leaves, consistency(old, size=size))
                assert not extends(whole[old], root, proof, old=old, size=size)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_proof_with_a_changed_hash_does_not_hold(self, whole, seed):
        rng = random.Random(seed)
        for size in range(2, MOST + 1):
            index, old = rng.randrange(size), rng.randint(1, size - 1)
            for ranges, holds in (
                (
                    inclusion(index, size=size),
                    lambda p, s=size, i=index: root_of(MANY[i], p, index=i, size=s) == whole[s],
                ),
                (consistency(old, size=size), lambda p, s=size, o=old: extends(whole[o], whole[s], p, old=o, size=s)),
            ):
                proof = roots(MANY, ranges)
                assert holds(proof)
                at = rng.randrange(len(proof))
                proof[at] = bytes([proof[at][0] ^ 1]) + proof[at][1:]
                assert not holds(proof)


class TestWhatIsNoProof:
    @pytest.mark.parametrize("change", [lambda proof: proof[:-1], lambda proof: [*proof, bytes(32)]])
    def test_a_proof_of_another_length_is_refused(self, whole, change):
        """Hashes that are left over could otherwise say anything."""
        with pytest.raises(ValueError, match="the proof has"):
            root_of(MANY[3], change(roots(MANY, inclusion(3, size=11))), index=3, size=11)
        with pytest.raises(ValueError, match="the proof has"):
            extends(whole[6], whole[11], change(roots(MANY, consistency(6, size=11))), old=6, size=11)

    @pytest.mark.parametrize(("index", "size"), [(-1, 4), (4, 4), (0, 0)])
    def test_a_leaf_that_is_not_there_has_no_proof(self, index, size):
        with pytest.raises(ValueError, match="is not in a tree"):
            inclusion(index, size=size)

    @pytest.mark.parametrize(("old", "size"), [(0, 4), (5, 4)])
    def test_a_tree_extends_a_smaller_one_alone(self, old, size):
        with pytest.raises(ValueError, match="does not extend"):
            consistency(old, size=size)

    def test_too_few_leaves_make_no_proof(self):
        with pytest.raises(ValueError, match="there are 5 leaves; a proof over 4-7 needs 8"):
            roots(MANY[:5], [(4, 8)])
