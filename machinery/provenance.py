"""Where files come from: the command, the code, the day, the machine and the versions that made them.

Exercised by `python -m pytest tests/test_report.py`.
"""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from machinery.files import read_json, write_json

PACKAGES = ("torch", "transformers", "numpy")


def remember(folder, stage, seconds, speed):
    """Write down in seconds.json, speed.json and made.json of a folder how long a stage took, how fast it was
    (machinery/speed.py), and what made it."""
    values = {"seconds.json": round(seconds, 1), "speed.json": speed, "made.json": provenance()}
    for name, value in values.items():
        write_json(folder / name, {**read_json(folder / name, {}), stage: value})


def provenance():
    """{what: text} about this process."""
    versions = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(Path(__file__).resolve().parent),
        "date": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        "machine": machine(),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def commit(folder):
    """The commit of the code in a folder, and whether it was changed since; "unknown" where git does not know."""
    command = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=7",
        "--exclude=*",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine():
    """Processor and system in words."""
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        rows = []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    name = next(iter(names), platform.processor() or platform.machine())
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"
