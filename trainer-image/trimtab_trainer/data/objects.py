"""Object stores: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage.

A secret's keys are the stores' usual names (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`,
`AWS_REGION`, `GOOGLE_SERVICE_ACCOUNT_KEY`, `AZURE_STORAGE_ACCOUNT_NAME`, …). Without a secret the pod's own identity or
environment counts. Connection errors are retried by the store client.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from trimtab_trainer.data.files import DataFile
from trimtab_trainer.data.scratch import read_secret, target_for
from trimtab_trainer.errors import BadConfiguration, InputMissing

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_RETRIES: dict[str, Any] = {"max_retries": 6, "retry_timeout": timedelta(minutes=3)}
_KEYS = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
"""What the names of a store's keys begin with; a secret may hold those of several stores."""


def download(uri: str, secret: Path | None, wanted: Callable[[str], bool], scratch: Path) -> list[DataFile]:
    """Stream the object that the URI names, or the wanted ones below that prefix, into `scratch`.

    Raises:
        BadConfiguration: the store's options are wrong.
        InputMissing: no such bucket or object, or access is refused.
    """
    import obstore
    from obstore.exceptions import BaseError, NotFoundError

    key = unquote(urlsplit(uri).path).strip("/")
    store = _open(uri, secret)
    try:
        names = {}
        if key:
            try:
                names = {key: (PurePosixPath(key).name, obstore.head(store, key)["size"])}
            except (NotFoundError, FileNotFoundError):
                names = {}
        if not names:
            listed = [meta for page in obstore.list(store, key or None) for meta in page]
            every = {meta["path"]: (meta["path"].removeprefix(key).lstrip("/"), meta["size"]) for meta in listed}
            names = {path: (name, size) for path, (name, size) in every.items() if name and wanted(name)}
        if not names:
            raise InputMissing(f"{uri}: no usable object there; check bucket and path")
        return [_stream(store, path, name, size, scratch) for path, (name, size) in sorted(names.items())]
    except (BaseError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the scratch folder, not the store
        raise InputMissing(f"{uri}: {_first_line(error)}; check the uri, the secret and the endpoint") from error


def _open(uri: str, secret: Path | None) -> ObjectStore:
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    parts = urlsplit(uri)
    options = {
        name.lower(): value for name, value in read_secret(secret).items() if name.startswith(_KEYS[parts.scheme])
    }
    plain = any("endpoint" in name and value.startswith("http://") for name, value in options.items())
    connect: Any = from_url  # its overloads want the store's kind to be known beforehand
    try:
        store: ObjectStore = connect(
            f"{parts.scheme}://{parts.netloc}",
            config=options,
            client_options={"allow_http": plain},
            retry_config=_RETRIES,
        )
    except (BaseError, ValueError, TypeError) as error:
        raise BadConfiguration(f"{uri}: {_first_line(error)}; check the keys of the secret") from error
    return store


def _stream(store: ObjectStore, path: str, name: str, size: int, scratch: Path) -> DataFile:
    import obstore

    target = target_for(name, scratch)
    with target.open("wb") as file:
        for chunk in obstore.get(store, path).stream(min_chunk_size=8 << 20):
            file.write(chunk)
    if target.stat().st_size != size:
        raise InputMissing(f"{path}: {target.stat().st_size} bytes came, {size} were announced; try again")
    return DataFile(target, name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
