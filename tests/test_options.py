"""An option of a client or a server is declared once: Python, Hydra, the command line and the docs follow from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import typer
from hydra.utils import instantiate
from omegaconf import OmegaConf
from typer.testing import CliRunner

from petals_lightning.cli.app import app
from petals_lightning.cli.options import with_options
from petals_lightning.client import ClientConfig
from petals_lightning.errors import ConfigurationError
from petals_lightning.models import AutoDistributedModel, auto
from petals_lightning.options import ABOVE_0, Option, command_line, described, make, option, options_of
from petals_lightning.server.config import ServerConfig
from petals_lightning.strategies import LocalSwarm, PrivateSwarm, PublicSwarm, SwarmProvider, swarm_provider
from petals_lightning.training import schema
from tools import options_page
from tools.testing.swarms import PREFIX

PEER = "/ip4/127.0.0.1/tcp/1/p2p/Qm"
SWARMS: list[Any] = [LocalSwarm, PublicSwarm, lambda **options: PrivateSwarm(PEER, **options)]
SETTINGS: list[Any] = [schema.LocalSwarmConfig, schema.PublicSwarmConfig, schema.PrivateSwarmConfig]


@described
@dataclass(frozen=True)
class Extended(ClientConfig):
    """With one option more."""

    calmness: float = option(2.0, "Seconds to stay calm.", ABOVE_0)


def settable(config: type) -> list[Option]:
    return [each for each in options_of(config) if not each.secret]


def others(config: type, folder: Path) -> dict[str, Any]:
    """A value for every option that is not its default."""
    (folder / "token").write_text("0123456789abcdef")
    (folder / "token").chmod(0o600)
    special = {
        "wire_dtype": "float32",
        "dtype": "float16",
        "quant_type": "nf4",
        "allowed_quantization": ("int8", "nf4"),
        "token_file": str(folder / "token"),
        "block_indices": (0, 2),
        "graph_bytes": 1 << 29,
        "cache_bytes": 1 << 29,
        "balance_quality": 0.5,
    }
    values = {each.name: special.get(each.name, other(each)) for each in settable(config)}
    assert all(values[each.name] != each.default for each in settable(config))
    return values


def other(each: Option) -> Any:
    if each.is_list:
        return ("12D3KooWA", "12D3KooWB")
    if each.kind is bool:
        return not each.default
    if each.kind is str:
        return "something"
    return (each.default or 0) + (1 if each.kind is int else 0.5)


def nullable(config: type) -> set[str]:
    return {each.name for each in options_of(config) if each.takes_none}


@pytest.fixture(params=[ClientConfig, Extended], ids=["client", "one option more"])
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """The options of a client, also as they are when somebody adds one to their dataclass."""
    for module in (auto, swarm_provider):
        monkeypatch.setattr(module, "ClientConfig", request.param)
    return request.param


def test_from_pretrained_takes_every_option(config, tiny_checkpoint, tmp_path, monkeypatch):
    class Connected(Exception):
        pass

    def connect(model: Any, checkpoint: Any, config: Any, **ways: Any) -> None:
        raise Connected(config)

    monkeypatch.setattr(auto, "_connect", connect)
    values = others(config, tmp_path)
    none = dict.fromkeys(values.keys() - nullable(config))
    for given in (values, {"client_config": config(**values)}, {"client_config": config(**values), **none}):
        with pytest.raises(Connected) as connected:
            AutoDistributedModel.from_pretrained(str(tiny_checkpoint("llama")), dht_prefix=PREFIX, **given)
        assert connected.value.args == (config(**values),)


@pytest.mark.parametrize("swarm", SWARMS, ids=["local", "public", "private"])
def test_swarms_take_every_option(swarm, config, tmp_path):
    values = others(config, tmp_path)
    source: SwarmProvider = swarm(**values)
    assert source.client_config == config(**values)
    source = swarm(**dict.fromkeys(values.keys() - {"hedge_factor"}), hedge_factor=ClientConfig.hedge_factor)
    expected = {"min_microbatch_tokens": 1 << 30} if swarm is LocalSwarm else {}
    assert source.client_config == config(**expected)
    with pytest.raises(TypeError, match="request_timeoot"):
        swarm(request_timeoot=1)


@pytest.mark.parametrize("section", SETTINGS, ids=["local", "public", "private"])
def test_a_run_has_a_setting_for_every_option(section, tmp_path):
    values = others(ClientConfig, tmp_path)
    assert values.keys() <= {each.name for each in fields(section)}
    assert "swarm_token" not in {each.name for each in fields(section)}, "settings are logged"
    needed = (
        {"num_servers": 1, "start_timeout": 1.0} if section is schema.LocalSwarmConfig else {"initial_peers": [PEER]}
    )
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    cfg = OmegaConf.merge(OmegaConf.structured(section), needed, given)
    assert instantiate(cfg, _convert_="all").client_config == ClientConfig(**values)
    cfg = OmegaConf.merge(OmegaConf.structured(section), needed, {"min_microbatch_tokens": 64})
    assert instantiate(cfg, _convert_="all").client_config == ClientConfig()


def test_a_new_option_is_a_new_setting():
    @dataclass
    @schema.with_options_of(Extended)
    class Section(schema.SwarmConfig):
        pass

    assert {each.name for each in fields(Section)} == {each.name for each in settable(Extended)}
    assert OmegaConf.structured(Section).calmness is None


@pytest.mark.parametrize(
    ("command", "config"), [("chat", ClientConfig), ("generate", ClientConfig), ("serve", ServerConfig)]
)
def test_a_command_has_a_flag_for_every_option(command, config):
    commands: Any = typer.main.get_command(app)
    flags = {each.name: each for each in commands.commands[command].params}
    for each in settable(config):
        flag = flags[each.name]
        assert (flag.opts, flag.help) == ([each.flag], each.meaning)
        given = (
            each.default,
            each.default / each.unit if each.unit > 1 and each.default is not None else None,
            None if each.is_list else each.default,
        )
        assert flag.default in given
    assert "swarm_token" not in flags


@pytest.mark.parametrize("config", [ClientConfig, Extended, ServerConfig])
def test_a_command_line_says_every_option(config, tmp_path):
    got: list[Any] = []

    def command(options: Any) -> None:
        got.append(options)

    command.__annotations__["options"] = config
    program = typer.Typer()
    program.command()(with_options(command))
    expected = config(**others(config, tmp_path))
    for words in (command_line(expected), []):
        done = CliRunner().invoke(program, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert got == [expected, config()]
    for each in settable(config):
        if each.rule is ABOVE_0:
            with pytest.raises(ConfigurationError, match=f"^{each.flag} is 0: it must be above 0"):
                CliRunner().invoke(program, [each.flag, "0"], catch_exceptions=False)


@pytest.mark.parametrize("config", [ClientConfig, Extended, ServerConfig])
def test_a_value_out_of_bounds_is_named(config):
    for each in options_of(config):
        assert each.meaning.endswith(".")
        assert f"{each.name}: {each.meaning}" in config.__doc__
        if each.rule is not None:
            with pytest.raises(ConfigurationError, match=f"^{each.name} is -1.5: "):
                config(**{each.name: -1.5})
            if not each.takes_none:
                with pytest.raises(ConfigurationError, match=f"^{each.name} is None: "):
                    config(**{each.name: None})


def test_a_token_of_a_file_is_read_again_with_another_file(tmp_path):
    config = ClientConfig(**others(ClientConfig, tmp_path)).with_token()
    assert config.swarm_token == "0123456789abcdef"
    (tmp_path / "other").write_text("fedcba9876543210\n")
    other = make(ClientConfig, {"token_file": str(tmp_path / "other")}, config).with_token()
    assert other.swarm_token == "fedcba9876543210"
    assert "0123456789abcdef" not in repr(config)


def test_the_page_of_options_is_made_of_them():
    assert options_page.PAGE.read_text(encoding="utf-8") == options_page.page(), "run `python -m tools.options_page`"
    for each in (*options_of(ClientConfig), *options_of(ServerConfig)):
        assert f"| `{each.name}` |" in options_page.page()
