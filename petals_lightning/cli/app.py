"""The commands of `petals-lightning`, each in a module of its own."""

from __future__ import annotations

import typer

from petals_lightning.cli import api, bootstrap, chat, dashboard, generate, serve, status, train
from petals_lightning.cli.options import MaddrCommand

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, serve and use language models whose blocks live in a swarm.",
)
app.command("train", context_settings=train.HYDRAS_OWN)(train.train)
app.command("serve", cls=MaddrCommand)(serve.serve)
app.command("bootstrap", cls=MaddrCommand)(bootstrap.bootstrap)
app.command("status", cls=MaddrCommand)(status.status)
app.command("generate", cls=MaddrCommand)(generate.generate)
app.command("chat", cls=MaddrCommand)(chat.chat)
app.command("api", cls=MaddrCommand)(api.api)
app.command("dashboard", cls=MaddrCommand)(dashboard.dashboard)
