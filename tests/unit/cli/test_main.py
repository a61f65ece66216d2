"""The frame of the command line: what it imports, how it fails."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

from tests.unit.cli.conftest import Run

HEAVY = ("torch", "transformers", "kubernetes", "boto3", "tunewright_trainer", "tunewright_operator")


def test_help_imports_nothing_heavy() -> None:
    """Help and completion answer at once: every command's module is imported when it runs."""
    code = (
        "import sys; from typer.testing import CliRunner; from tunewright_cli.main import app; "
        "result = CliRunner().invoke(app, ['--help']); assert result.exit_code == 0, result.output; "
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_it_is_a_kubectl_plugin_too() -> None:
    """`kubectl tunewright` finds `kubectl-tunewright`."""
    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    assert scripts["tunewright"] == scripts["kubectl-tunewright"] == "tunewright_cli.main:main"


def test_every_command_has_help(run: Run) -> None:
    """One line in the overview, and its options."""
    overview = run("--help").stdout
    for command in ("validate", "plan", "convert", "run", "watch", "get-adapter", "chat"):
        assert command in overview
        assert run(command, "--help").exit_code == 0


def test_a_wrong_option_is_a_usage_error(run: Run) -> None:
    """2, as every command line has it; never confused with an invalid file."""
    assert run("validate", "--bogus").exit_code == 2
