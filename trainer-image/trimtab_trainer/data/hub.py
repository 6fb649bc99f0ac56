"""The Hugging Face hub, at a pinned commit. `HF_ENDPOINT` names another server with the same API (a mirror)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from trimtab_trainer.data.files import DataFile
from trimtab_trainer.data.scratch import read_secret, target_for
from trimtab_trainer.errors import BadConfiguration, InputMissing

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRAINING_SPLIT = re.compile(r"(^|[/._-])train(ing)?([/._-]|$)", re.IGNORECASE)


def download(
    uri: str,
    revision: str | None,
    secret: Path | None,
    kind: Literal["model", "dataset"],
    wanted: Callable[[str], bool],
    scratch: Path,
) -> list[DataFile]:
    """Download a repository's wanted files, or the file or folder that the URI names, into `scratch`.

    Of a whole data set only the training split is taken where file names tell one (the Hub's own convention).

    Raises:
        BadConfiguration: the revision is not a commit, or the URI names no repository.
        InputMissing: the repository, the commit or the file is not there, or access is refused.
    """
    repository, path = _parse(uri)
    if revision is None or not _COMMIT.fullmatch(revision):
        raise BadConfiguration(f"{uri}: revision is {revision!r}; pin it to a commit of 40 hex digits")
    from httpx2 import HTTPError  # the Hub client's transport
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=read_secret(secret).get("HF_TOKEN"))
    try:
        describe = api.model_info if kind == "model" else api.dataset_info
        names = [sibling.rfilename for sibling in describe(repository, revision=revision).siblings or []]
        files = []
        for remote, name in _choose(names, path, kind, wanted):
            target_for(remote, scratch)
            local = api.hf_hub_download(repository, remote, revision=revision, repo_type=kind, local_dir=scratch)
            files.append(DataFile(Path(local), name))
        return files
    except HFValidationError as error:
        raise BadConfiguration(f"{uri}: {error}") from error
    except GatedRepoError as error:
        raise InputMissing(
            f"{uri}: access is gated; accept the terms on the Hub and give HF_TOKEN in secretRef"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputMissing(
            f"{uri}: no such {kind}, or private; check the name, or give HF_TOKEN in secretRef"
        ) from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the scratch folder, not the Hub
        raise InputMissing(
            f"{uri} at {revision}: {str(error).strip()[:300]}; check name, revision and network"
        ) from error


def _parse(uri: str) -> tuple[str, str]:
    parts = urlsplit(uri)
    names = [part for part in unquote(parts.path).split("/") if part]
    if not parts.netloc or not names or ".." in names:
        raise BadConfiguration(f"{uri}: expected hf://ORGANISATION/NAME or hf://ORGANISATION/NAME/PATH")
    return f"{parts.netloc}/{names[0]}", "/".join(names[1:])


def _choose(names: list[str], path: str, kind: str, wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
    """Pairs of the name in the repository and the name relative to `path`."""
    if path in names:
        return [(path, path.rpartition("/")[2])]
    prefix = f"{path}/" if path else ""
    inside = [(name, name.removeprefix(prefix)) for name in names if name.startswith(prefix)]
    chosen = [(remote, name) for remote, name in inside if wanted(name)]
    if kind == "dataset" and not path:
        return [pair for pair in chosen if _TRAINING_SPLIT.search(pair[0])] or chosen
    return chosen
