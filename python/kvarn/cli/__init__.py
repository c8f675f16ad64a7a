# SPDX-License-Identifier: Apache-2.0
"""The command line: `kvarn doctor`, `kvarn plan`, `kvarn demo`, `kvarn eval`, `kvarn bench`."""


def main() -> None:
    """The entry point `kvarn`."""
    from kvarn.cli.commands import app

    app()
