"""The commands of `petals-lightning`, each in a module of its own."""

from __future__ import annotations

import typer

from petals_lightning.cli import bootstrap, chat, generate, serve, status

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
