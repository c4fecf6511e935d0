"""Run the tests in an environment of their own: `python3 scripts/test.py`.

Makes the virtual environment .venv-dev, installs qlora-phi3 with its development tools into it, and runs scripts/check:
lint, types, and pytest. Done once, the first steps are skipped. Further arguments go to pytest.
"""

import argparse

from environment import TORCH_NOTE, make_environment, run, say


def main() -> None:
    """Make the environment and run the checks in it."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=TORCH_NOTE)
    _, arguments = parser.parse_known_args()
    programs = make_environment(".venv-dev", "dev")
    say(" ".join(["Running lint, types and tests: scripts/check", *arguments]))
    run([str(programs / "python"), "scripts/check", *arguments])


if __name__ == "__main__":
    main()
