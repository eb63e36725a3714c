"""The description of the machine in bench.json."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from benchmarks.machine import machine

TWO_CPUS = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu vme

processor\t: 1
model\t\t: 18
"""


def test_a_processor_has_its_family_and_model(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(TWO_CPUS)
    assert machine(tmp_path / "cpuinfo") == f"AMD EPYC, cpu family 25, model 17, {os.cpu_count()} cores"


def test_an_unknown_processor_has_its_architecture(tmp_path: Path) -> None:
    assert machine(tmp_path / "missing") == f"{platform.machine()}, {os.cpu_count()} cores"
