"""A few faults of scripts/torture.py: each run is resumed and ends as the undisturbed one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "torture.py"


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs Linux and gcc")
def test_killed_runs_and_full_disks_end_in_the_undisturbed_adapter():
    command = [sys.executable, SCRIPT, "kill-middle", "full", "flip", "--first", "30", "--every", "150", "--times", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split("|")[1:3] for line in result.stdout.splitlines() if line.startswith("| ")]
    assert [(kind.strip(), number.strip()) for kind, number in rows[1:]] == [("kill-middle", "3"), ("full", "3")]
