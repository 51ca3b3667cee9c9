"""Shared fixtures: tiny checkpoints of every family, and real swarms on loopback."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve the servers

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from petals_lightning.data import TextClassificationDataModule
from petals_lightning.strategies.server_process import ServerProcess
from tests.helpers.families import (
    RECURRENT_CONFIGS,
    RECURRENT_STD,
    TINY_CONFIGS,
    save_heavier_checkpoint,
    save_tiny_checkpoint,
)
from tests.helpers.text_models import save_tiny_text_model, write_dataset
from tools.testing.servers import start_server
from tools.testing.swarms import SERVERS, InProcessSwarm, serve_options

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes that tests start are interrupted by tests

QUICK_FAMILIES = ("llama", "gpt2")
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--servers", choices=SERVERS, default="ours",
        help="servers of the tests' swarms: ours; petals: such that offer Petals' methods alone; mixed: by turns; "
        "split: ours, each on two devices",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `also_on` runs on those kinds of servers, too, unless `--servers` says which."""
    kinds = {kind: None for mark in metafunc.definition.iter_markers("also_on") for kind in mark.args}
    if kinds and metafunc.config.getoption("servers") == "ours":
        metafunc.parametrize("servers", ["ours", *kinds], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _is_wanted(item)]
    # The longest first: workers end together.
    items.sort(key=lambda item: item.path.parent.name != "training" and item.path.stem != "test_notebooks")
    for item in items:
        mark, servers = item.get_closest_marker("ours"), _parameters(item).get("servers")
        if mark is not None and (servers or config.getoption("servers")) != "ours":
            item.add_marker(pytest.mark.skip(reason=f"only on our servers: {mark.args[0]}"))
        if _is_variant(item):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Loading a model collects garbage, which takes 0.4 s if it looks at everything that libraries have created."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # hypothesis, which may be imported now, looks for referrers


def _parameters(item: pytest.Item) -> dict[str, Any]:
    call = getattr(item, "callspec", None)
    return call.params if call is not None else {}


def _is_wanted(item: pytest.Item) -> bool:
    """Whether one of its marks `also_on` names its kind of servers, with its other parameters."""
    parameters, marks = _parameters(item), list(item.iter_markers("also_on"))
    if not marks or parameters.get("servers", "ours") == "ours":
        return True
    return any(
        parameters["servers"] in mark.args and all(parameters[name] in values for name, values in mark.kwargs.items())
        for mark in marks
    )


def _is_variant(item: pytest.Item) -> bool:
    """Whether another test, which is quick, does the same on our servers, or with a Llama or a GPT-2."""
    parameters, has_swarm = _parameters(item), "start_swarm" in getattr(item, "fixturenames", ())
    is_other_family = has_swarm and parameters.get("family", "llama") not in QUICK_FAMILIES
    return is_other_family or parameters.get("servers", "ours") != "ours"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_checkpoint("llama")` is the folder of a random 4-block model of that family."""
    made: dict[str, Path] = {}
    configs = TINY_CONFIGS | RECURRENT_CONFIGS

    def make(family: str) -> Path:
        if family not in made:
            std: dict[str, Any] = {"std": RECURRENT_STD} if family in RECURRENT_CONFIGS else {}
            made[family] = save_tiny_checkpoint(configs[family](), tmp_path_factory.mktemp(family), **std)
        return made[family]

    return make


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with its tokenizer."""
    return save_tiny_text_model(tmp_path_factory.mktemp("text_model"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 training, 16 validation and 16 test texts in two classes."""
    return write_dataset(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def data(text_model: Path, texts: Path) -> TextClassificationDataModule:
    """Those texts for that model; 5 training batches."""
    return TextClassificationDataModule(str(text_model), str(texts), batch_size=8)


@pytest.fixture(scope="session")
def heavier_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_heavier_checkpoint(tmp_path_factory.mktemp("heavier"))


@pytest.fixture
def servers(request: pytest.FixtureRequest) -> str:
    """Which servers the swarms of the test have, one of `SERVERS`."""
    return getattr(request, "param", request.config.getoption("servers"))


@pytest.fixture
def start_swarm(servers: str) -> Iterator[Callable[..., InProcessSwarm]]:
    """`start_swarm(checkpoint, [(0, 1), (1, 4)])` is a running swarm; it ends with the test."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(InProcessSwarm(*args, **{"servers": servers, **kwargs}))


@pytest.fixture
def start_servers(servers: str) -> Iterator[Callable[..., dict[str, ServerProcess]]]:
    """`start_servers(checkpoint, [(0, 2), (2, 4)])` are servers as processes, by peer id; they end with the test."""
    started: list[ServerProcess] = []

    def start(checkpoint: Path, spans: Sequence[tuple[int, int]]) -> dict[str, ServerProcess]:
        extra = [serve_options(servers, number) for number in range(len(spans))]
        first = start_server(checkpoint, spans[0], (), *extra[0])
        started.append(first)
        first.wait_until_ready()
        others = [
            start_server(checkpoint, span, [first.maddr], *options)
            for span, options in zip(spans[1:], extra[1:], strict=True)
        ]
        started.extend(others)
        return {server.peer_id: server for server in [first, *(server.wait_until_ready() for server in others)]}

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data and models beside the checkout; tests that need it skip where it is missing."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs real data in {SHARED / 'data'}, which is not part of the project")
    return SHARED / "data"
