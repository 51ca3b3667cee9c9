"""`petals-lightning api`: the model, and what was tuned for it, for programs that speak OpenAI's API."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petals_lightning.cli.generation import ModelOptions
from petals_lightning.cli.http import ApiKeyFile, Host, Port, Run, bind, check_access, run_app
from petals_lightning.cli.options import configure_logging, say, with_options
from petals_lightning.client import ClientConfig
from petals_lightning.errors import ConfigurationError
from petals_lightning.library_messages import libraries_to_root_log

if TYPE_CHECKING:
    from petals_lightning.api.generation import ServedModel


@with_options
def api(
    options: ModelOptions,
    client: ClientConfig,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Tuned prompts, by the name with which requests choose them.", metavar="NAME=DIR"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="LoRA in PEFT's format, likewise; of the same name as prompts: both.", metavar="NAME=DIR"),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: ApiKeyFile = None,
    run: Run = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a request and its answer at most.", show_default="2048, or the model's limit"),
    ] = None,
    max_streams: Annotated[int, typer.Option(help="Generations at once; others wait.")] = 64,
    idle_sessions: Annotated[int, typer.Option(help="Conversations whose keys and values stay on servers.")] = 16,
    idle_timeout: Annotated[float, typer.Option(help="Seconds for which they stay.")] = 120.0,
    chat_template: Annotated[
        bool, typer.Option(help="Use the tokenizer's chat template, as tuning did; else the simple form User: …")
    ] = True,
    merge_system: Annotated[
        bool, typer.Option("--merge-system", help="Put system texts before the first message.")
    ] = False,
) -> None:
    """Serve MODEL by OpenAI's API, and a page that shows the swarm. Tokens are those of `generate` and `chat`."""
    tuned = _tuned_parts(options.model, prompts or [], adapter or [])
    for name, value, least in (
        ("--max-length", max_length, 2), ("--max-streams", max_streams, 1), ("--idle-sessions", idle_sessions, 0),
        ("--idle-timeout", idle_timeout, 0),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ConfigurationError(f"{name} is {value:g}: it must be at least {least}")
    keys, peers = check_access(host, api_key_file), options.peers()
    configure_logging()

    from petals_lightning.api.app import create_app, is_loopback
    from petals_lightning.api.generation import GenerationThreads, ServedModel
    from petals_lightning.api.swarm_watch import SwarmWatch
    from petals_lightning.data.dialogue_format import DialogueFormat
    from petals_lightning.hf.tokenizer import load_tokenizer
    from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
    from petals_lightning.models.sampling import longest_text
    from petals_lightning.models.trainable import share_frozen
    from petals_lightning.swarm import SwarmNode

    libraries_to_root_log()
    hub: dict[str, Any] = {"revision": options.revision, "token": options.token}
    tokenizer = load_tokenizer(options.model, **hub)
    form = DialogueFormat(tokenizer, use_chat_template=chat_template, merge_system=merge_system)
    with ExitStack() as stack:
        listening = stack.enter_context(bind(host, port))
        node = SwarmNode(
            peers, host_maddrs=(), identity_path=client.identity_path, client_mode=True,
            connect_timeout=max(client.connect_timeout, 5.0),
        )  # fmt: skip
        stack.enter_context(node.start())
        models: dict[str, ServedModel] = {}
        base: Any = None
        for name, parts in tuned.items():
            model = AutoDistributedModelForCausalLM.from_pretrained(
                options.model, node=node, dht_prefix=options.dht_prefix,
                client_config=replace(client, identity_path=None), **parts, **hub,
            )  # fmt: skip
            stack.callback(model.close)
            base = base or model
            share_frozen(model, base)
            limit = longest_text(model)
            models[name] = ServedModel(name, model, tokenizer, form, min(max_length or 2048, limit))
        blocks = remote_blocks(base)
        watch = SwarmWatch(
            node, [base.config.dht_prefix], len(blocks), others=False, token=client.with_token().swarm_token
        )
        app = create_app(
            watch,
            models=models,
            threads=GenerationThreads(max_streams=max_streams, idle_sessions=idle_sessions, idle_timeout=idle_timeout),
            keys=keys,
            is_local=is_loopback(host) and keys is None,
            run=run,
        )
        say(f"models: {', '.join(models)}")
        run_app(app, listening, "OpenAI's API at /v1, the page at /,", node)


def _tuned_parts(model: str, prompts: list[str], adapters: list[str]) -> dict[str, dict[str, Any]]:
    """Arguments of `from_pretrained` for each name, the base model's first.

    Raises:
        ConfigurationError: an option is not NAME=DIR, or a name is there twice.
    """
    base = Path(model).resolve().name if Path(model).is_dir() else model
    found: dict[str, dict[str, Any]] = {base: {}}
    for kind, given in (("prompts", prompts), ("adapter", adapters)):
        for each in given:
            name, equals, source = each.partition("=")
            if not (name and equals and source):
                raise ConfigurationError(
                    f"--{kind} {each!r}: give a name, by which requests choose it, and a folder or hub id: NAME=DIR"
                )
            if name == base or kind in found.get(name, {}):
                raise ConfigurationError(f"--{kind} {each!r}: the name {name!r} is taken; choose another")
            found.setdefault(name, {})[kind] = source
    return found
