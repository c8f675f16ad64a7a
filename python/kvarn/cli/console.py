# SPDX-License-Identifier: Apache-2.0
"""Where all commands write, and how they fail."""

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)


def fail(message: object) -> typer.Exit:
    """Says what is wrong on the error channel; raise what this returns."""
    err.print(f"kvarn: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(1)
