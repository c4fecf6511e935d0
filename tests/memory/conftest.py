"""Lets these tests import what measures real steps; last in the path, as for tests/scripts."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
