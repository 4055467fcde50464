"""Tensors as files: plain safetensors, bit for bit, and nothing else under their hash."""

import hashlib
import json

import pytest
import torch
from snapshot_kit import same

from loopguard.errors import SnapshotError
from loopguard.snapshots.tensors import names_of_dtypes, read_tensors, verify_file, write_tensors

safetensors = pytest.importorskip("safetensors.torch", reason="its own reader is the judge of the format")


def of_every_kind():
    raw = torch.randint(0, 255, (48,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensors = [raw.view(dtype) for dtype in names_of_dtypes() if dtype != torch.bool]
    turned = torch.arange(6.0).reshape(2, 3).t()
    return [
        *tensors,
        torch.tensor([True, False]),
        torch.tensor(3),
        torch.empty(0, 4),
        turned,
        torch.ones(2).expand(3, 2),
    ]


def test_every_element_type_comes_back_to_the_bit(tmp_path):
    tensors = of_every_kind()
    digest = write_tensors(tmp_path / "t", tensors)
    assert hashlib.sha256((tmp_path / "t").read_bytes()).hexdigest() == digest
    assert same(read_tensors(tmp_path / "t", digest), tensors)


def test_the_library_of_the_format_reads_the_same(tmp_path):
    tensors = of_every_kind()
    write_tensors(tmp_path / "t", tensors)
    found = safetensors.load_file(tmp_path / "t")
    assert same([found[f"t{i:06d}"] for i in range(len(tensors))], tensors)


def test_a_conjugated_tensor_is_written_as_it_reads(tmp_path):
    value = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    digest = write_tensors(tmp_path / "t", [value.conj()])
    assert torch.equal(read_tensors(tmp_path / "t", digest)[0], value.conj())


def test_no_tensors_at_all_are_a_file_too(tmp_path):
    assert read_tensors(tmp_path / "t", write_tensors(tmp_path / "t", [])) == []


def test_every_changed_byte_and_every_cut_is_found(tmp_path):
    path = tmp_path / "t"
    digest = write_tensors(path, [torch.arange(3.0), torch.tensor([1, 2])])
    whole = path.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    damaged += [whole[:i] for i in range(len(whole))] + [whole + b"\x00"]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(SnapshotError, match="not what the manifest says"):
            read_tensors(path, digest)
        with pytest.raises(SnapshotError, match="not what the manifest says"):
            verify_file(path, digest)


def test_a_header_that_promises_the_earth_allocates_nothing(tmp_path):
    entry = {"t000000": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}
    header = json.dumps(entry).encode()
    (tmp_path / "t").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SnapshotError):
        read_tensors(tmp_path / "t", "0" * 64)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SnapshotError, match="gone.safetensors cannot be read"):
        read_tensors(tmp_path / "gone.safetensors", "0" * 64)
