"""`loopguard doctor`: is this machine fit, and if not, what to do."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from loopguard.integrations.frameworks import Standing, standings
from loopguard.sandbox.attest import old_runc

_IMAGE = "loopguard/python:1"
_FREE_MIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's report."""

    state: Literal["fine", "note", "trouble"]
    what: str
    found: str
    do: str = ""
    section: Literal["machine", "frameworks"] = "machine"


def doctor(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where runs will be kept.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at Python, Docker, the sandbox image, the disk, the clock, and what can be guarded in which framework.

    Each line says what is fine, what is not, and what to do. A framework that cannot be guarded is a note.

    loopguard doctor

    Exit codes: 0 nothing stands in the way, 1 something does.
    """
    findings = [_python(), _platform(), *_engine(), _disk(run_dir), _clock(), _training()]
    findings += map(_framework, standings())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        _print(findings)
    raise typer.Exit(1 if any(finding.state == "trouble" for finding in findings) else 0)


def _print(findings: list[Finding]) -> None:
    section = "machine"
    for finding in findings:
        if finding.section != section:
            section = finding.section
            print(f"\n{section}")
        print(f"{finding.state:8} {finding.what:12} {finding.found}")
        if finding.do:
            print(f"{'':8} {'':12} -> {finding.do}")


def _python() -> Finding:
    return Finding(state="fine", what="python", found=f"{platform.python_version()} at {sys.executable}")


def _platform() -> Finding:
    system = platform.system()
    if system in {"Linux", "Darwin"}:
        return Finding(state="fine", what="platform", found=f"{system} {platform.release()}")
    return Finding(state="trouble", what="platform", found=system, do="use Linux, macOS, or Windows through WSL2")


def _engine() -> list[Finding]:
    info = _docker("info", "--format", "{{json .}}")
    if info is None:
        what = "no docker command" if shutil.which("docker") is None else "no Docker engine answers"
        do = "loopguard sandbox build, or start Docker; a guard policy without tools needs none, nor does observing"
        return [Finding(state="trouble", what="engine", found=what, do=do)]
    facts = json.loads(info)
    cgroup = facts.get("CgroupVersion", "1")
    found = [
        Finding(state="fine", what="engine", found=f"Docker {facts['ServerVersion']}, {facts['Driver']}"),
        Finding(state="fine", what="cgroup", found=f"version {cgroup}"),
        _runtimes(sorted(facts.get("Runtimes", {}))),
    ]
    runc = _docker(
        "version", "--format", '{{range .Server.Components}}{{if eq .Name "runc"}}{{.Version}}{{end}}{{end}}'
    )
    if why := old_runc((runc or "").strip()):
        found.append(Finding(state="trouble", what="runc", found=why, do="update Docker"))
    if _docker("image", "inspect", "--format", "{{.Id}}", _IMAGE) is None:
        image = Finding(state="trouble", what="image", found=f"{_IMAGE} is not built", do="loopguard sandbox build")
    else:
        image = Finding(state="fine", what="image", found=_IMAGE)
    return [*found, image]


def _runtimes(names: list[str]) -> Finding:
    if "runsc" in names:
        return Finding(state="fine", what="runtimes", found=", ".join(names))
    do = "only for a policy with `runtime: runsc`: install gVisor and register it with the engine"
    return Finding(state="note", what="runtimes", found=f"{', '.join(names)}; no runsc", do=do)


def _docker(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # `docker info` prints what the client knows, and exits with 0 on some versions, even where no engine answers.
    return done.stdout if done.returncode == 0 and "ServerErrors" not in done.stdout else None


def _disk(run_dir: Path) -> Finding:
    place = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    free_mib = shutil.disk_usage(place).free // 2**20
    found = f"{free_mib:,} MiB free at {place}"
    if free_mib < _FREE_MIB:
        return Finding(state="trouble", what="disk", found=found, do="free some, or use --run-dir on another disk")
    return Finding(state="fine", what="disk", found=found)


def _clock() -> Finding:
    newest = Path(__file__).stat().st_mtime
    now = time.time()
    if now < newest - 86_400:
        return Finding(
            state="trouble",
            what="clock",
            found=f"{time.strftime('%Y-%m-%d', time.gmtime(now))}, which is before LoopGuard was installed",
            do="set the clock: the audit log's times and an approval's expiry depend on it",
        )
    return Finding(state="fine", what="clock", found=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)))


def _training() -> Finding:
    absent = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if absent:
        do = "only for the reference loops and attach(): pip install 'loopguard[train]'"
        return Finding(state="note", what="training", found=f"{', '.join(absent)} not installed", do=do)
    return Finding(state="fine", what="training", found="torch, transformers and safetensors are installed")


def _framework(standing: Standing) -> Finding:
    told = {"guardable": standing.says, "not installed": standing.says}
    says = told.get(standing.state, f"{standing.state}: {standing.says}")
    return Finding(
        state="fine" if standing.state == "guardable" else "note",
        what=standing.name,
        found=f"{standing.version}, {says}" if standing.version else says,
        do=standing.do,
        section="frameworks",
    )
