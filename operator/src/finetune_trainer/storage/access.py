"""With which credentials a place is opened, and how its failures are told: in the words of the job's spec."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile

from finetune_contract.environment import CREDENTIAL_KEYS
from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError

_ADDRESS_KEYS = ("HF_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_CA_BUNDLE")
"""Keys that are no secrets: what the pod has unprefixed serves every source that brings none of its own."""


class TemporaryError(Exception):
    """A request failed in a way that may pass; `retry` tries it again for a while."""


@dataclasses.dataclass(frozen=True)
class Access:
    """One source or destination as the job names it."""

    field: str
    """Path of its field, as in `spec.dataset.sources[1]`."""
    kind: str
    """model, dataset or destination."""
    secret_prefix: str = ""
    source_field: str = "source"
    """The field below `field` that holds the URL."""

    def read_credentials(self) -> dict[str, str]:
        """Return the credentials and addresses for this place from the environment, under their plain names."""
        found = {}
        for key in CREDENTIAL_KEYS:
            value = os.environ.get(self.secret_prefix + key)
            if not value and key in _ADDRESS_KEYS:
                value = os.environ.get(key)
            if value:
                found[key] = value
        return found

    @property
    def secret_field(self) -> str:
        """Path of the field that names the Secret."""
        return f"{self.field}.secretRef"

    def not_found(self, what: str, hint: str = "") -> TrainerError:
        """Return the error for something that does not exist."""
        reasons = {"model": Reason.MODEL_NOT_FOUND, "dataset": Reason.DATASET_NOT_FOUND}
        reason = reasons.get(self.kind, Reason.DESTINATION_UNAVAILABLE)
        message = f"{self.field}.{self.source_field}: {what} does not exist"
        advice = hint or f"Check {self.field}.{self.source_field} for a typing error."
        return TrainerError(reason, ExitCode.NO_INPUT, message, advice)

    def refused(self, what: str, why: str) -> TrainerError:
        """Return the error for missing or refused credentials."""
        keys = "HF_TOKEN" if "hf://" in what else "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return TrainerError(
            Reason.CREDENTIALS_REFUSED,
            ExitCode.NO_PERMISSION,
            f"{self.field}.{self.source_field}: access to {what} was refused: {why}",
            f"Name a Secret with {keys} in {self.secret_field}, or give the pod's service account the right to it.",
        )

    def unavailable(self, what: str, why: str) -> TrainerError:
        """Return the error for a service that did not answer in time."""
        is_destination = self.kind == "destination"
        reason = Reason.DESTINATION_UNAVAILABLE if is_destination else Reason.SOURCE_UNAVAILABLE
        return TrainerError(
            reason,
            ExitCode.UNAVAILABLE,
            f"{self.field}.{self.source_field}: {what} did not answer: {why}",
            f"Check the host in {self.field}.{self.source_field}, the endpoint in {self.secret_field}, "
            "and that pods may reach it.",
        )

    def invalid(self, what: str, why: str, hint: str) -> TrainerError:
        """Return the error for a setting that cannot work."""
        message = f"{self.field}.{self.source_field}: {what}: {why}"
        return TrainerError(Reason.INVALID_CONFIG, ExitCode.CONFIG, message, hint)


def read_ca_bundle(credentials: dict[str, str]) -> str | None:
    """Return the path of the CA bundle to trust, or None for the system's. A Secret holds PEM text, not a path."""
    value = credentials.get("AWS_CA_BUNDLE", "")
    if not value:
        return os.environ.get("SSL_CERT_FILE") or None
    if "-----BEGIN" not in value:
        return value
    with tempfile.NamedTemporaryFile("w", suffix=".crt", delete=False) as file:
        file.write(value)
    return str(pathlib.Path(file.name))
