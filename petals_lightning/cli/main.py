"""Entry point of `petals-lightning`: one line for a user's error, commands in modules of their own."""

from __future__ import annotations

import os
import sys

# Before torch is imported anywhere: spinning OpenMP threads starve every other process on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of NumPy's: they spin too

import typer

from petals_lightning.cli import bootstrap, chat, generate, serve, status
from petals_lightning.errors import PetalsLightningError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve and use language models whose blocks live in a swarm.",
)
app.command("serve")(serve.serve)
app.command("bootstrap")(bootstrap.bootstrap)
app.command("status")(status.status)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)


def main() -> None:
    """Runs the command; an error that a user can mend is one line on stderr and exit status 1."""
    try:
        app()
    except PetalsLightningError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
