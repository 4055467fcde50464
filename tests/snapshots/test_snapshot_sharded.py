"""Sharded states: two ranks save together, the same or fewer ranks load, and an error of one is an error of all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopguard.errors import SnapshotError
from loopguard.snapshots import SnapshotStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this torch has no distributed package with gloo",
    ),
]


def ranks(mode, folder, count, *rest):
    """What each rank came to."""
    script = Path(__file__).with_name("sharded_rank.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), mode, str(folder), str(rank), str(count), *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(count)
    ]
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=90)
            assert process.returncode == 0, err
            results.append(json.loads(out))
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # closes its pipes, where another one has failed
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, ranks("save", folder, 2)


def test_both_ranks_get_one_name_for_a_folder_that_is_whole(saved):
    folder, (first, second) = saved
    assert first["digest"] == second["digest"]
    assert first["losses"] != second["losses"]  # the ranks do have dropout and data of their own
    store = SnapshotStore(folder / "snapshots")
    store.verify(first["digest"])
    assert store.facts(first["digest"]) == {"update": 3}
    assert [path.name for path in store.root.iterdir()] == [first["digest"]]


def test_two_ranks_go_on_bit_for_bit_each_with_its_own_generators(saved):
    folder, before = saved
    after = ranks("load", folder, 2, before[0]["digest"])
    assert [one["losses"] for one in after] == [one["losses"] for one in before]
    assert [one["of"] for one in after] == [0, 1]


def test_one_rank_loads_what_two_have_saved(saved):
    folder, before = saved
    (alone,) = ranks("load", folder, 1, before[0]["digest"])
    assert alone["whole"] == alone["live"] == before[0]["whole"]
    assert alone["of"] == 0


def test_each_rank_keeps_its_part_in_memory_and_goes_back_to_it_bit_for_bit(tmp_path):
    """And what is in memory can be saved, long after the weights have moved on."""
    for one in ranks("ring", tmp_path, 2):
        assert one["losses"][0] == one["losses"][1]
        assert len(set(one["whole"])) == 1
        assert one["in_place"]
        assert "use save_sharded" in one["refused"]


def test_what_one_rank_cannot_save_no_rank_waits_for(tmp_path):
    results = ranks("refused", tmp_path, 2)
    assert [one["error"][:40] for one in results] == ["TypeError: rank 1: state.odd is a set; a"] * 2
    assert not (tmp_path / "snapshots").exists()


def test_a_damaged_shard_is_an_error_on_every_rank(saved, tmp_path):
    folder, (first, _) = saved
    digest = first["digest"]
    shutil.copytree(folder / "snapshots", tmp_path / "snapshots")
    shard = next((tmp_path / "snapshots" / digest / "shards").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SnapshotError, match="is not what the manifest says"):
        SnapshotStore(tmp_path / "snapshots").verify(digest)
    errors = [one["error"] for one in ranks("load", tmp_path, 2, digest)]
    assert errors[0] == errors[1]
    assert shard.name in errors[0]


def test_a_full_disk_is_an_error_on_every_rank_and_leaves_nothing(small_disk):
    (small_disk / "filler").write_bytes(bytes(250_000))
    errors = [one["error"] for one in ranks("save", small_disk, 2)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("DiskError: rank ")
    assert "No space left" in errors[0]
    assert list((small_disk / "snapshots").iterdir()) == []


def test_a_plain_reader_says_who_can_read_it(saved):
    folder, (first, _) = saved
    with pytest.raises(SnapshotError, match="was written by several ranks"):
        SnapshotStore(folder / "snapshots").read(first["digest"])
