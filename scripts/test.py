"""Run all checks in their own environment: `python3 scripts/test.py`.

Makes the virtual environment .venv-dev, installs qlora-phi3 with its development tools, and runs scripts/check:
lint, types, and pytest. Steps that are done already are skipped. More arguments are passed to pytest.
"""

import argparse

from environment import TORCH_NOTE, make_environment, print_step, run


def main() -> None:
    """Make the environment and run the checks in it."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=TORCH_NOTE)
    _, arguments = parser.parse_known_args()
    programs = make_environment(".venv-dev", "dev")
    print_step(" ".join(["Running lint, types and tests: scripts/check", *arguments]))
    run([str(programs / "python"), "scripts/check", *arguments])


if __name__ == "__main__":
    main()
