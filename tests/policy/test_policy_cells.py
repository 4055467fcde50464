"""What a sandbox is told of a profile: all of it, and nothing else."""

import dataclasses

from policy_kit import small

from loopguard.controller.cells import cell_spec
from loopguard.policy.schema import Profile
from loopguard.sandbox.base import CellSpec, EgressRule
from loopguard.types import Limits

FULL = {
    "image": "loopguard/python:9",
    "mode": "episode",
    "runtime": "runc",
    "privileges": "strict",
    "cells": 7,
    "queue": 0,
    "background": True,
    "egress": {
        "allow": [
            {"host": "b.example.org", "port": 8443},
            {"host": "a.example.org", "port": 443, "secret_headers": {"X-Key": "KEY", "Authorization": "TOKEN"}},
        ]
    },
    "preload": ["math"],
    "limits": {
        "wall": "3s",
        "memory": "99MiB",
        "pids": 5,
        "cpus": 0.5,
        "tmpfs": "20MiB",
        "output": "3KiB",
        "flood": "2MiB",
        "files": 6,
        "files_size": "9MiB",
        "files_depth": 4,
    },
}


def test_every_key_of_a_profile_reaches_the_cell():
    spec = cell_spec(small(sandbox__profiles__offline=FULL).sandbox.profiles["offline"])
    assert spec == CellSpec(
        image="loopguard/python:9",
        mode="episode",
        runtime="runc",
        privileges="strict",
        cells=7,
        queue=0,
        background=True,
        egress=(
            EgressRule(host="b.example.org", port=8443),
            EgressRule(host="a.example.org", port=443, secret_headers=(("Authorization", "TOKEN"), ("X-Key", "KEY"))),
        ),
        preload=("math",),
        limits=Limits(
            wall_s=3.0,
            memory_mib=99,
            pids=5,
            cpus=0.5,
            tmpfs_mib=20,
            output_kib=3,
            flood_mib=2,
            files=6,
            files_mib=9,
            files_depth=4,
        ),
        calls_per_cell=500,
    )


def test_no_key_is_left_behind():
    """A profile and a cell's spec have the same keys, so that neither learns what the other never hears of."""
    assert {*Profile.model_fields} == {field.name for field in dataclasses.fields(CellSpec)}


def test_what_a_policy_leaves_out_is_what_a_cell_takes_for_granted():
    """Policy and sandbox have the same defaults, so neither can be surprised by the other."""
    spec = cell_spec(small(sandbox__profiles__offline={"image": "i:1"}).sandbox.profiles["offline"])
    granted = {f.name: f.default for f in dataclasses.fields(CellSpec) if f.default is not dataclasses.MISSING}
    assert granted.keys() == {"privileges", "queue", "background", "egress"}
    assert {name: getattr(spec, name) for name in granted} == granted
    assert (spec.limits.files, spec.limits.files_mib, spec.limits.files_depth) == (64, 8, 8)
