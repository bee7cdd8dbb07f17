"""Uploading to S3 so that what arrived is known to be what left.

Every part carries its MD5, which the server checks on arrival; the whole object's ETag is compared with the one these
parts must give. Where a server makes ETags in another way, the object is read back and its SHA-256 compared.
"""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import math
from typing import TYPE_CHECKING, Any

import botocore.exceptions

from finetune_trainer.storage.access import Access, TemporaryError
from finetune_trainer.storage.publish import COMPLETE, LocalFile, damaged, refuse_other_content
from finetune_trainer.storage.s3 import explain_s3_error, make_s3_client

if TYPE_CHECKING:
    from finetune_trainer.storage.location import Location

PART_BYTES = 64 * 1024 * 1024
MAX_PARTS = 10_000
NUM_PARALLEL = 4
_ERRORS = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError)


class S3Target:
    """The prefix `<path>/<digest>/` of a bucket."""

    def __init__(self, location: Location, digest: str, access: Access, part_bytes: int = PART_BYTES) -> None:
        self.url = f"{location.text.rstrip('/')}/{digest}"
        self._bucket = location.container
        self._prefix = f"{location.path.strip('/')}/{digest}/"
        self._access = access
        self._part_bytes = part_bytes
        self._client = make_s3_client(access)

    def read_complete(self) -> bytes | None:
        try:
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + COMPLETE)["Body"].read()
        except _ERRORS as error:
            if _is_missing_key(error):
                return None
            raise self._explain(error) from error

    def has_same(self, file: LocalFile) -> bool:
        key = self._prefix + file.name
        try:
            head = self._client.head_object(Bucket=self._bucket, Key=key)
        except _ERRORS as error:
            if _is_missing_key(error):
                return False
            raise self._explain(error) from error
        if head["ContentLength"] == file.size and head.get("Metadata", {}).get("sha256") == file.sha256:
            return True
        raise refuse_other_content(self._access, f"{self.url}/{file.name}")

    def write_file(self, file: LocalFile) -> None:
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

    def write_complete(self, content: bytes) -> None:
        digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        try:
            self._client.put_object(
                Bucket=self._bucket, Key=self._prefix + COMPLETE, Body=content, ContentMD5=digest,
                ContentType="application/json",
            )  # fmt: skip
        except _ERRORS as error:
            raise self._explain(error) from error

    def _put(self, key: str, file: LocalFile) -> str:
        content = file.path.read_bytes()
        digest = hashlib.md5(content, usedforsecurity=False)
        self._client.put_object(
            Bucket=self._bucket, Key=key, Body=content, ContentMD5=base64.b64encode(digest.digest()).decode(),
            Metadata={"sha256": file.sha256},
        )  # fmt: skip
        return digest.hexdigest()

    def _put_parts(self, key: str, file: LocalFile) -> str:
        part_bytes = max(self._part_bytes, math.ceil(file.size / MAX_PARTS))
        upload = self._client.create_multipart_upload(
            Bucket=self._bucket, Key=key, Metadata={"sha256": file.sha256}
        )["UploadId"]  # fmt: skip
        try:
            with concurrent.futures.ThreadPoolExecutor(NUM_PARALLEL) as pool:
                jobs = [
                    pool.submit(self._put_part, key, upload, file, number * part_bytes, part_bytes)
                    for number in range(math.ceil(file.size / part_bytes))
                ]
                try:
                    parts = [job.result() for job in jobs]
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
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

    def _put_part(self, key: str, upload: str, file: LocalFile, start: int, length: int) -> tuple[str, bytes]:
        with open(file.path, "rb") as source:
            source.seek(start)
            content = source.read(length)
        md5 = hashlib.md5(content, usedforsecurity=False).digest()
        answer = self._client.upload_part(
            Bucket=self._bucket, Key=key, UploadId=upload, PartNumber=start // length + 1, Body=content,
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


def _code(error: Exception) -> str:
    if isinstance(error, botocore.exceptions.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def _is_missing_key(error: Exception) -> bool:
    # A missing bucket is NoSuchBucket on GET; HEAD answers 404 for both, and is asked after a GET.
    return _code(error) in ("NoSuchKey", "404", "NotFound")
