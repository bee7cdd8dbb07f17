"""Task files of one's own: those on S3 are fetched with the folder they lie in, so that their data lies beside them.

Called before the tasks are read, by `evaluate` and by `prepare`. No torch.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence

from finetune_trainer.reporting import emit
from finetune_trainer.storage import Access, open_store
from finetune_trainer.storage.transfer import download_files, list_with_retries

REMOTE = "s3://"


def fetch_tasks(names: Sequence[str], secret_prefix: str, root: pathlib.Path) -> tuple[str, ...]:
    """Return the names of the tasks, with the path below `root` for each file that had to be fetched."""
    return tuple(
        _fetch(name, Access("spec.evaluation", "task", secret_prefix, f"tasks[{index}]"), root)
        if name.startswith(REMOTE)
        else name
        for index, name in enumerate(names)
    )


def _fetch(name: str, access: Access, root: pathlib.Path) -> str:
    source, _, file = name.rpartition("/")
    if not file.endswith((".yaml", ".yml")) or "/" not in source.removeprefix(REMOTE):
        hint = "Write s3://BUCKET/FOLDER/TASK.yaml, with the task's data in the same folder."
        raise access.invalid(name, "no task file (YAML) in a folder", hint)
    store = open_store(source, "", access, root)
    listing = list_with_retries(store, access, source)
    if file not in [one.name for one in listing.files]:
        raise access.not_found(name)
    # By revision: changed files never mix with those of before.
    mark = hashlib.sha256(f"{source} {listing.revision}".encode()).hexdigest()[:12]
    folder = pathlib.Path("tasks") / mark
    download_files(store, listing.files, root / folder, access)
    emit("task files fetched", source=source, files=len(listing.files))
    return str(folder / file)
