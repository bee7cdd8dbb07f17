"""Objects in S3 and in everything that speaks its protocol, through boto3.

Credentials come from the source's Secret (variables with its prefix), else from the pod's identity by boto3's own
chain. Uploading is `s3_upload`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import boto3
import botocore.exceptions
from botocore.config import Config

from finetune_trainer.storage.access import Access, TemporaryError, read_ca_bundle
from finetune_trainer.storage.base import Listing, RemoteFile, make_listing_revision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from types_boto3_s3.client import S3Client

    from finetune_trainer.storage.location import Location

_CHUNK = 1 << 20
_REFUSED = {
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
    "XAdminUserNotFound",
}
"""Codes that servers send with status 400 or 404 although they are about credentials."""
_MISSING = {"404", "NoSuchBucket", "NoSuchKey", "NoSuchVersion", "NotFound"}
_TEMPORARY_STATUSES = {408, 409, 425, 429}
_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.TokenRetrievalError,
)


def make_s3_client(access: Access) -> S3Client:
    """Return a client for the place's endpoint, region, CA and credentials."""
    credentials = access.read_credentials()
    endpoint = credentials.get("AWS_ENDPOINT_URL_S3")
    # Servers other than AWS's own often refuse the checksums that boto3 adds by itself.
    checksums: dict[str, Any] = (
        {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        if endpoint
        else {}
    )
    config = Config(
        connect_timeout=5,
        read_timeout=30,
        retries={"mode": "standard", "total_max_attempts": 2},
        max_pool_connections=32,
        **checksums,
    )
    session = boto3.session.Session(
        aws_access_key_id=credentials.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=credentials.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=credentials.get("AWS_SESSION_TOKEN"),
        region_name=credentials.get("AWS_REGION") or ("us-east-1" if endpoint else None),
    )
    return session.client("s3", endpoint_url=endpoint, verify=read_ca_bundle(credentials), config=config)


def explain_s3_error(error: Exception, access: Access, what: str) -> Exception:
    """Return what an error of boto3 means for the job."""
    if isinstance(error, _NO_CREDENTIALS):
        return access.refused(what, "there are no credentials")
    if isinstance(error, botocore.exceptions.ClientError):
        return _explain_answer(error, access, what)
    if isinstance(error, botocore.exceptions.SSLError):
        hint = "Put the CA's PEM text under AWS_CA_BUNDLE into the Secret, or ask for it in the operator's caBundle."
        return access.invalid(what, "its certificate is not trusted", hint)
    if isinstance(error, botocore.exceptions.ParamValidationError | ValueError):
        hint = "Check the bucket's name, and AWS_ENDPOINT_URL_S3 in the Secret."
        return access.invalid(what, str(error).splitlines()[0], hint)
    if isinstance(error, botocore.exceptions.NoRegionError):
        return access.invalid(what, "no region", "Add AWS_REGION to the Secret.")
    if isinstance(error, botocore.exceptions.BotoCoreError | OSError):
        return TemporaryError(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return error


def _explain_answer(error: botocore.exceptions.ClientError, access: Access, what: str) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    # An answer to HEAD has no body, and so its status for a code.
    said = f"HTTP {status}" if code.isdigit() or not code else code
    if status in (401, 403) or code in _REFUSED:
        return access.refused(what, said)
    if status == 404 or code in _MISSING:
        return access.not_found(what)
    if status >= 500 or status in _TEMPORARY_STATUSES or not status:
        return TemporaryError(said)
    hint = f"Check {access.field}.{access.source_field}, and AWS_REGION and AWS_ENDPOINT_URL_S3 in the Secret."
    return access.invalid(what, f"the server answered {said}", hint)


def list_objects(client: S3Client, bucket: str, prefix: str) -> tuple[RemoteFile, ...]:
    """Return the objects below a prefix that ends with a slash. Raises boto3's errors."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return tuple(
        RemoteFile(
            entry["Key"].removeprefix(prefix), entry["Size"], f"etag:{entry['ETag'].strip(chr(34))}", key=entry["Key"]
        )
        for page in pages
        for entry in page.get("Contents", ())
        if not entry["Key"].endswith("/")
    )


class S3Store:
    """One object, or all objects below a prefix."""

    def __init__(self, location: Location, revision: str, access: Access) -> None:
        self._location = location
        self._revision = revision
        self._access = access
        self._opened: S3Client | None = None

    def list_files(self) -> Listing:
        try:
            listing = None if self._location.path.endswith("/") else self._read_object()
            return listing or self._list_prefix()
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError, ValueError) as error:
            raise explain_s3_error(error, self._access, self._location.text) from error

    def stream(self, file: RemoteFile, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        options: dict[str, Any] = {}
        if start or length is not None:
            options["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        kind, _, version = file.version.partition(":")
        options |= {"VersionId": version} if kind == "version" else {"IfMatch": f'"{version}"'}
        try:
            body = self._client.get_object(Bucket=self._location.container, Key=file.key, **options)["Body"]
            yield from body.iter_chunks(_CHUNK)
        except botocore.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("InvalidRange", "416"):
                return
            if code in ("PreconditionFailed", "412"):
                raise TemporaryError(f"{file.name} changed while it was read") from error
            raise explain_s3_error(error, self._access, self._location.text) from error
        except (botocore.exceptions.BotoCoreError, OSError) as error:
            raise explain_s3_error(error, self._access, self._location.text) from error

    @property
    def _client(self) -> S3Client:
        if self._opened is None:
            self._opened = make_s3_client(self._access)
        return self._opened

    def _read_object(self) -> Listing | None:
        key = self._location.path
        pinned = self._revision if not self._revision.startswith(("etag:", "listing:")) else ""
        version: dict[str, Any] = {"VersionId": pinned.removeprefix("version:")} if pinned else {}
        try:
            head = self._client.head_object(Bucket=self._location.container, Key=key, **version)
        except botocore.exceptions.ClientError as error:
            # Without the right to list, S3 answers 403 for a missing object; the listing then tells.
            if str(error.response.get("Error", {}).get("Code", "")) in _MISSING and not version:
                return None
            raise
        version_id = head.get("VersionId")
        has_version = bool(version_id) and version_id != "null"
        revision = f"version:{version_id}" if has_version else f"etag:{head['ETag'].strip(chr(34))}"
        self._refuse_change(revision)
        name = key.rpartition("/")[2]
        sha256 = head.get("Metadata", {}).get("sha256", "")
        file = RemoteFile(name, head["ContentLength"], revision, sha256, key)
        return Listing(revision, (file,))

    def _list_prefix(self) -> Listing:
        prefix = self._location.path.rstrip("/") + "/"
        files = list_objects(self._client, self._location.container, prefix)
        if not files:
            raise self._access.not_found(self._location.text)
        revision = make_listing_revision(files)
        self._refuse_change(revision)
        return Listing(revision, files)

    def _refuse_change(self, revision: str) -> None:
        """Refuse content that differs from what the plan was made for."""
        wanted = self._revision
        if wanted.startswith(("etag:", "listing:")) and wanted != revision:
            raise self._access.not_found(
                f"revision {wanted} of {self._location.text}",
                f"It has changed since; remove {self._access.field}.revision to take it as it is now.",
            )
