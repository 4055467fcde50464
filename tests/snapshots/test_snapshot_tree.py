"""A state comes back as it was, to the bit and the type, and what cannot be written is refused with its place."""

import dataclasses
import json
import math
import struct
import typing
from collections import OrderedDict, UserDict

import numpy as np
import pytest
import torch
from snapshot_kit import same

from loopguard.snapshots.tree import decode, encode, legible


def there_and_back(state):
    tree, tensors = encode(state)
    return decode(json.loads(json.dumps(tree, allow_nan=False)), tensors)


@dataclasses.dataclass
class Cursor:
    epoch: int
    order: torch.Tensor


class Pair(typing.NamedTuple):
    left: int
    right: torch.Tensor


@pytest.mark.parametrize(
    "state",
    [
        None,
        {"a": [1, 2.5, "x", True, None, b"\x00\xff"], "b": (1, (2, ("three",))), "c": {}},
        {0: "zero", "0": "text", (1, "a"): 2, None: 3, 1.5: 4, b"k": 5},
        {"$tensor": "not one", "$items": []},
        [2**80, -(2**70), 1e-320, -0.0, 0.1 + 0.2],
        (3, tuple(range(625)), None),
    ],
)
def test_plain_values_come_back_with_their_types(state):
    assert same(there_and_back(state), state)


@pytest.mark.parametrize("bits", ["7ff8000000000000", "fff8000000000001", "7ff0000000000000", "fff0000000000000"])
def test_floats_that_are_not_finite_keep_their_bits(bits):
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert struct.pack(">d", there_and_back([value])[0]).hex() == bits


def test_dataclasses_named_tuples_and_foreign_mappings_become_plain_dicts():
    order = torch.arange(3)
    state = {"c": Cursor(2, order), "p": Pair(1, order), "o": OrderedDict(z=1), "u": UserDict(ids=order)}
    back = there_and_back(state)
    assert same(
        back,
        {"c": {"epoch": 2, "order": order}, "p": {"left": 1, "right": order}, "o": {"z": 1}, "u": {"ids": order}},
    )
    assert {type(back[key]) for key in back} == {dict}


def test_numpy_becomes_tensors_and_numbers():
    frozen = np.arange(4, dtype=np.uint32)[::-1]
    frozen.flags.writeable = False
    state = {"a": frozen, "f": np.float32(0.5), "d": np.float64(0.1), "i": np.int64(7), "b": np.bool_(True)}
    expected = {"a": torch.tensor([3, 2, 1, 0], dtype=torch.uint32), "f": 0.5, "d": 0.1, "i": 7, "b": True}
    assert same(there_and_back(state), expected)


def test_a_tied_weight_is_one_tensor_and_a_view_of_it_is_another():
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"in": weight, "out": torch.nn.Parameter(weight), "turned": weight.t(), "row": weight[0]}
    tree, tensors = encode(state)
    assert len(tensors) == 3
    back = decode(tree, tensors)
    assert back["in"] is back["out"]
    assert same(back["turned"], weight.t())


def test_tensors_are_handed_on_and_not_copied():
    live = torch.zeros(3)
    assert encode([live]).tensors[0].data_ptr() == live.data_ptr()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"images": [1, 2, 3, {1}]}, r"batch\.images\[3\] is a set; a state holds dicts, lists"),
        ({"model": {"a.weight": object()}}, r"batch\.model\['a\.weight'\] is a object"),
        ({"data": range(3)}, r"batch\.data is a range"),
        ((0, Cursor(1, torch.device("cpu"))), r"batch\[1\]\.order is a torch\.device"),
        ({"x": torch.zeros(2).to_sparse()}, r"batch\.x is a tensor of another layout"),
        ({"x": torch.empty(2, device="meta")}, r"batch\.x is a tensor without data"),
        ({"x": np.array(["a"])}, r"batch\.x is an array of <U1"),
        ({frozenset(): 1}, r"batch has a key of type frozenset"),
    ],
)
def test_what_cannot_be_written_is_refused_with_its_place(state, message):
    with pytest.raises(TypeError, match=message):
        encode(state, at="batch")


def test_legible_json_refuses_nothing_and_stays_strict():
    text = json.dumps(legible({1: {2}, "n": math.nan, "d": torch.device("cpu")}), allow_nan=False)
    assert json.loads(text) == {"1": [2], "n": {"$float": "nan"}, "d": "cpu"}


def test_legible_json_can_hold_keys_that_look_like_ours():
    facts = {"config": {"$tensor": 3, "n": 1}, "$items": "x"}
    assert decode(json.loads(json.dumps(legible(facts))), []) == facts


def test_a_conjugated_view_is_not_taken_for_the_tensor_itself():
    value = torch.tensor([1 + 2j], dtype=torch.complex64)
    assert len(encode([value, value.conj()]).tensors) == 2
