"""Uploads saved prompts and adapters to the Hugging Face hub, for `prompts="org/name"` and `adapter="org/name"`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]

from petals_lightning.errors import CheckpointError, ConfigurationError, HubError
from petals_lightning.hf import adapter_files
from petals_lightning.hf.checkpoint import first_line
from petals_lightning.models.prompt_files import CARD, README, THIS_FOLDER, WEIGHTS, PromptCard


def push_prompts_to_hub(
    folder: str | Path, repo_id: str, *, token: str | None = None, private: bool | None = None
) -> str:
    """Uploads prompts that `save_prompts` wrote to the hub's model repository `repo_id`, created if missing.

    Args:
        folder: that `save_prompts` wrote.
        repo_id: "org/name".
        token: with the right to write; None takes HF_TOKEN or the login of this machine.
        private: whether a new repository is private; None: the organisation's default.

    Returns:
        The URL of the commit.

    Raises:
        CheckpointError: the folder has no prompts.
        ConfigurationError: `repo_id` is not valid, or there is no token.
        HubError: the hub cannot be reached, or refuses.
    """
    return _push(folder, repo_id, stage, "Upload prompts", token, private)


def push_adapter_to_hub(
    folder: str | Path, repo_id: str, *, token: str | None = None, private: bool | None = None
) -> str:
    """Uploads an adapter that `save_adapter` wrote. Arguments, result and errors are those of `push_prompts_to_hub`."""
    return _push(folder, repo_id, stage_adapter, "Upload adapter", token, private)


def stage(folder: str | Path, repo_id: str, target: Path) -> None:
    """Copies the files of prompts, and no others of `folder`, to `target`. The card then names the repository.

    Raises:
        CheckpointError: a part is missing, or the card cannot be read.
    """
    PromptCard.read(folder)
    _copy(folder, (WEIGHTS, CARD, README), "save_prompts", repo_id, target)


def stage_adapter(folder: str | Path, repo_id: str, target: Path) -> None:
    """As `stage`, for an adapter."""
    adapter_files.read_settings(folder)
    _copy(folder, (adapter_files.WEIGHTS, adapter_files.CONFIG, README), "save_adapter", repo_id, target)


def _copy(folder: str | Path, names: tuple[str, ...], writer: str, repo_id: str, target: Path) -> None:
    for name in names:
        if not (Path(folder) / name).is_file():
            raise CheckpointError(f"folder {str(folder)!r} has no {name}: give a folder written by {writer}")
        shutil.copy(Path(folder) / name, target / name)
    readme = target / README
    readme.write_text(readme.read_text(encoding="utf-8").replace(THIS_FOLDER, repo_id), encoding="utf-8")


def _push(
    folder: str | Path,
    repo_id: str,
    stage_files: Callable[[str | Path, str, Path], None],
    message: str,
    token: str | None,
    private: bool | None,
) -> str:
    api = HfApi(token=token)
    with TemporaryDirectory() as staged:
        stage_files(folder, repo_id, Path(staged))
        if token is None and get_token() is None:
            raise ConfigurationError(
                "there is no token for the hub: give token=…, set HF_TOKEN, or run `hf auth login`, with a token that "
                "may write (https://huggingface.co/settings/tokens)"
            )
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message=message)
        except HFValidationError as e:
            raise ConfigurationError(f"repo_id={repo_id!r}: it must be ORG/NAME ({e})") from e
        except LocalTokenNotFoundError as e:
            raise ConfigurationError(f"the hub requires a token with write access: {e}") from e
        except (HTTPError, OSError) as e:
            raise HubError(
                f"{folder} was not pushed to {repo_id!r}: {first_line(e)}. Check the network, that the token may "
                "write, and that the organisation is yours"
            ) from e
    return str(commit.commit_url)
