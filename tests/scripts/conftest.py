"""Lets the tests import the scripts; last in the path, since `scripts/test.py` has the name of a standard module."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
