"""The files in deploy/: what can be checked of them without Docker."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from petals_lightning.cli.app import app

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def with_values(text: str, **given: str) -> str:
    return VARIABLE.sub(lambda found: given.get(found[1], found[2]), text)


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_each_service_runs_a_command_that_exists(service):
    written = COMPOSE["services"][service]["command"]
    name, *arguments = shlex.split(with_values(written, BOOTSTRAP="/dns4/bootstrap/tcp/31337/p2p/Qm"))
    group: Any = typer.main.get_command(app)
    context = group.commands[name].make_context(name, arguments)
    if name == "serve":
        assert context.params["initial_peers"] == ["/dns4/bootstrap/tcp/31337/p2p/Qm"]
        port = COMPOSE["services"][service]["healthcheck"]["test"][-1]
        assert f":{context.params['metrics_port']}/metrics" in port


def test_services_name_images_volumes_and_services_that_exist():
    services, built = COMPOSE["services"], set()
    for service in services.values():
        for volume in service["volumes"]:
            assert volume.split(":")[0] in COMPOSE["volumes"]
        assert set(service.get("depends_on", ())) <= services.keys()
        if "build" in service:
            built.add(service["image"])
            context = (DEPLOY / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
            for argument in service["build"]["args"]:
                assert f"ARG {argument}=" in DOCKERFILE
    assert {service["image"] for service in services.values()} == built
    assert sum(name.startswith("server-") for name in services) == 3


def test_the_image_copies_files_that_exist_and_ends_with_our_command():
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    known = "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"
    assert {line.split()[0] for line in lines} <= set(known)
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    for name in copied:
        assert (DEPLOY.parent / name).exists(), name
    for link in (path for path in (DEPLOY.parent / "petals_lightning").iterdir() if path.is_symlink()):
        assert link.resolve().name in copied, f"{link.name} would point to nothing in the image"
    assert 'ENTRYPOINT ["petals-lightning"]' in lines
    assert 'petals-lightning = "petals_lightning.cli.main:main"' in (DEPLOY.parent / "pyproject.toml").read_text()
    constraints = (DEPLOY.parent / "constraints.txt").read_text()
    assert len(re.findall(r"^torch==", constraints, flags=re.MULTILINE)) == 1, "the image installs that line"
