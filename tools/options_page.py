"""Writes docs/options.md from the dataclasses of options: `python -m tools.options_page`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from petals_lightning.client import ClientConfig
from petals_lightning.options import Option, options_of
from petals_lightning.server.config import ServerConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
_HEAD = """# Options of clients and servers

Each option is a field of `ClientConfig` (`petals_lightning/client/config.py`) or of `ServerConfig`
(`petals_lightning/server/config.py`, `limits.py`): its name, type, default, meaning and bounds are there and nowhere
else. `python -m tools.options_page` writes this page from them.

An option of a client is a keyword argument of `from_pretrained` and of the swarms that a `RemoteBlockStrategy` takes, a
setting of a run (`swarm.audit_rate=0.05`), and a flag of `petals-lightning chat`, `generate` and `api`
(`--audit-rate 0.05`). Settings take null for the default. Lists are written `swarm.blocked_servers=[ID,ID]`, or as a
flag for each value.

An option of a server is a field of the config that `Server` takes, and a flag of `petals-lightning serve`.
"""


def page() -> str:
    """The text of docs/options.md."""
    parts = [_HEAD]
    for group, options in groupby([*options_of(ClientConfig), *options_of(ServerConfig)], lambda each: each.group):
        parts += [f"## {group}", "", *_table(options), ""]
    return "\n".join(parts)


def _table(options: Iterable[Option]) -> list[str]:
    rows = [f"| `{each.name}` | {_flag(each)} | {_default(each)} | {each.meaning} |" for each in options]
    return ["| option | flag | default | meaning |", "|---|---|---|---|", *rows]


def _flag(each: Option) -> str:
    if each.secret:
        return "Python only"
    return f"`{each.flag}`" + (f", `--no-{each.flag[2:]}`" if each.default is True else "")


def _default(each: Option) -> str:
    if each.default in (None, ()):
        return each.default_words or "none"
    return f"{each.default // each.unit} GiB" if each.unit == 1 << 30 else f"`{each.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
