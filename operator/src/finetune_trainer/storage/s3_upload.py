"""Uploading to S3 so that what arrived is known to be what left.

Every part carries its MD5, which the server checks on arrival; the whole object's ETag is compared with the one these
parts must give. Where a server makes ETags in another way, the object is read back and its SHA-256 compared. What is
read from the disk is compared with the file's SHA-256 before the object comes into being.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import hashlib
import math
from typing import TYPE_CHECKING, Any

import botocore.exceptions

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.access import Access, TemporaryError
from finetune_trainer.storage.publish import COMPLETE, LocalFile, damaged, refuse_other_content
from finetune_trainer.storage.s3 import explain_s3_error, list_objects, make_s3_client

if TYPE_CHECKING:
    from finetune_trainer.storage.base import RemoteFile
    from finetune_trainer.storage.location import Location

PART_BYTES = 64 * 1024 * 1024
MAX_PARTS = 10_000
NUM_PARALLEL = 4
_ERRORS = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError)


class ChangedFileError(TrainerError):
    """A file on this machine is not what its digest says; nothing of it was uploaded."""

    def __init__(self, file: LocalFile) -> None:
        message = f"{file.path}: its content is not what was saved (SHA-256 differs)"
        super().__init__(Reason.DESTINATION_UNAVAILABLE, ExitCode.INTERNAL, message)


class S3Folder:
    """The prefix `<path of the location>/<name>/` of a bucket. Methods raise TrainerError for good, TemporaryError for
    now.
    """

    def __init__(self, location: Location, name: str, access: Access, part_bytes: int = PART_BYTES) -> None:
        self.url = f"{location.text.rstrip('/')}/{name}"
        """Where its objects are found."""
        self._bucket = location.container
        self._prefix = f"{location.path.strip('/')}/{name}/"
        self._access = access
        self._part_bytes = part_bytes
        self._client = make_s3_client(access)

    def list_files(self) -> tuple[RemoteFile, ...]:
        """Return the objects below the prefix, by names relative to it."""
        try:
            return list_objects(self._client, self._bucket, self._prefix)
        except _ERRORS as error:
            raise self._explain(error) from error

    def read(self, name: str) -> bytes | None:
        """Return the content of a small object, or None when it is not there."""
        try:
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()
        except _ERRORS as error:
            if _is_missing_key(error):
                return None
            raise self._explain(error) from error

    def read_digest(self, name: str) -> tuple[int, str] | None:
        """Return size and SHA-256 of an uploaded file, or None when it is not there."""
        try:
            head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
        except _ERRORS as error:
            if _is_missing_key(error):
                return None
            raise self._explain(error) from error
        return head["ContentLength"], head.get("Metadata", {}).get("sha256", "")

    def upload(self, file: LocalFile) -> None:
        """Copy a file, over whatever is there, and verify what arrived."""
        key = self._prefix + file.name
        try:
            etag = self._put(key, file) if file.size <= self._part_bytes else self._put_parts(key, file)
            head = self._client.head_object(Bucket=self._bucket, Key=key)
            if head["ETag"].strip('"') == etag and head["ContentLength"] == file.size:
                return
            found = self._read_back(key)
            if found != file.sha256:
                self._client.delete_object(Bucket=self._bucket, Key=key)
                raise damaged(self._access, f"{self.url}/{file.name}", file, found)
        except _ERRORS as error:
            raise self._explain(error) from error

    def write(self, name: str, content: bytes) -> None:
        """Write a small object of JSON."""
        digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        try:
            self._client.put_object(
                Bucket=self._bucket, Key=self._prefix + name, Body=content, ContentMD5=digest,
                ContentType="application/json",
            )  # fmt: skip
        except _ERRORS as error:
            raise self._explain(error) from error

    def delete(self, name: str) -> None:
        """Delete an object; one that is not there is no error."""
        try:
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
        except _ERRORS as error:
            raise self._explain(error) from error

    def abort_uploads(self) -> None:
        """Remove the parts that uploads killed half-way have left below the prefix, where that is allowed."""
        with contextlib.suppress(*_ERRORS):
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for upload in page.get("Uploads", ()):
                    self._abort(upload["Key"], upload["UploadId"])

    def _put(self, key: str, file: LocalFile) -> str:
        content = file.path.read_bytes()
        _require_same(file, hashlib.sha256(content).hexdigest())
        digest = hashlib.md5(content, usedforsecurity=False)
        self._client.put_object(
            Bucket=self._bucket, Key=key, Body=content, ContentMD5=base64.b64encode(digest.digest()).decode(),
            Metadata={"sha256": file.sha256},
        )  # fmt: skip
        return digest.hexdigest()

    def _put_parts(self, key: str, file: LocalFile) -> str:
        upload = self._client.create_multipart_upload(
            Bucket=self._bucket, Key=key, Metadata={"sha256": file.sha256}
        )["UploadId"]  # fmt: skip
        try:
            parts = self._send_parts(key, upload, file)
            listed: Any = [{"PartNumber": index + 1, "ETag": etag} for index, (etag, _) in enumerate(parts)]
            self._client.complete_multipart_upload(
                Bucket=self._bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": listed}
            )
        except BaseException:
            # Parts that are left behind cost money and show nowhere.
            self._abort(key, upload)
            raise
        joined = hashlib.md5(b"".join(md5 for _, md5 in parts), usedforsecurity=False).hexdigest()
        return f"{joined}-{len(parts)}"

    def _send_parts(self, key: str, upload: str, file: LocalFile) -> list[tuple[str, bytes]]:
        """Send a file in one pass over it, a few parts at a time; return ETag and MD5 of each."""
        part_bytes = max(self._part_bytes, math.ceil(file.size / MAX_PARTS))
        sha256 = hashlib.sha256()
        jobs: list[concurrent.futures.Future[tuple[str, bytes]]] = []
        with concurrent.futures.ThreadPoolExecutor(NUM_PARALLEL) as pool:
            try:
                with open(file.path, "rb") as source:
                    while content := source.read(part_bytes):
                        jobs.append(pool.submit(self._put_part, key, upload, len(jobs) + 1, content))
                        sha256.update(content)
                        if len(jobs) >= NUM_PARALLEL:
                            # Memory holds a few parts: the next is read when an earlier one has gone.
                            jobs[-NUM_PARALLEL].result()
                _require_same(file, sha256.hexdigest())
                return [job.result() for job in jobs]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _put_part(self, key: str, upload: str, number: int, content: bytes) -> tuple[str, bytes]:
        md5 = hashlib.md5(content, usedforsecurity=False).digest()
        answer = self._client.upload_part(
            Bucket=self._bucket, Key=key, UploadId=upload, PartNumber=number, Body=content,
            ContentMD5=base64.b64encode(md5).decode(),
        )  # fmt: skip
        return answer["ETag"], md5

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)
        except _ERRORS:
            return

    def _read_back(self, key: str) -> str:
        digest = hashlib.sha256()
        for chunk in self._client.get_object(Bucket=self._bucket, Key=key)["Body"].iter_chunks(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()

    def _explain(self, error: Exception) -> Exception:
        if _code(error) in ("BadDigest", "InvalidDigest"):
            return TemporaryError("a part was damaged on its way")
        return explain_s3_error(error, self._access, self.url)


class S3Target(S3Folder):
    """The place of one published model: `<path>/<digest>/`."""

    def read_complete(self) -> bytes | None:
        return self.read(COMPLETE)

    def has_same(self, file: LocalFile) -> bool:
        found = self.read_digest(file.name)
        if found is None:
            return False
        if found == (file.size, file.sha256):
            return True
        raise refuse_other_content(self._access, f"{self.url}/{file.name}")

    def write_file(self, file: LocalFile) -> None:
        self.upload(file)

    def write_complete(self, content: bytes) -> None:
        self.write(COMPLETE, content)


def _require_same(file: LocalFile, sha256: str) -> None:
    if sha256 != file.sha256:
        raise ChangedFileError(file)


def _code(error: Exception) -> str:
    if isinstance(error, botocore.exceptions.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def _is_missing_key(error: Exception) -> bool:
    # A missing bucket is NoSuchBucket on GET; HEAD answers 404 for both, and is asked after a GET.
    return _code(error) in ("NoSuchKey", "404", "NotFound")
