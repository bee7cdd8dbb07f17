"""Remote and local storage behind one small interface: hf://, s3://, https://, pvc:// and plain paths.

`open_store` is the door for reading, `publish.publish_folder` for writing. No torch here; client libraries are imported
by the store that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.storage.access import Access
from finetune_trainer.storage.base import Listing, RemoteFile, Store
from finetune_trainer.storage.location import Location, parse_location

if TYPE_CHECKING:
    import pathlib

__all__ = ["Access", "Listing", "Location", "RemoteFile", "Store", "open_store", "parse_location"]


def open_store(source: str, revision: str, access: Access, workspace_root: pathlib.Path) -> Store:
    """Return the store of one source. Nothing is contacted yet."""
    location = parse_location(source, access)
    if location.scheme == "hf":
        from finetune_trainer.storage.hub import HubStore

        return HubStore(location, revision, access)
    if location.scheme == "s3":
        from finetune_trainer.storage.s3 import S3Store

        return S3Store(location, revision, access)
    if location.scheme in ("https", "http"):
        from finetune_trainer.storage.web import WebStore

        return WebStore(location, revision, access)
    from finetune_trainer.storage.local import LocalStore

    return LocalStore(location, revision, access, workspace_root)
