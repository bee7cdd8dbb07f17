"""The certificates of the progress server: made once, kept in a Secret, the same for every copy of the operator.

Called at startup by `handlers`. Pure but for randomness and the clock given: reading and writing the Secret is
`cluster`'s.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import ipaddress
import urllib.parse
from collections.abc import Mapping
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_DAYS = 3650
RENEW_DAYS = 90
"""A certificate that ends sooner is made anew; jobs started before keep the old CA until their next attempt."""
CA_KEY, CERTIFICATE_KEY, PRIVATE_KEY_KEY = "ca.crt", "tls.crt", "tls.key"


@dataclasses.dataclass(frozen=True)
class Certificates:
    """PEM texts."""

    ca: str
    certificate: str
    private_key: str


def make_certificates(url: str, now: datetime.datetime) -> Certificates:
    """Return a new CA and a certificate that it signed for the host of the URL."""
    host = urllib.parse.urlsplit(url).hostname or "localhost"
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator progress CA")])
    ca = (
        _begin(ca_name, ca_name, ca_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    certificate = (
        _begin(name, ca_name, key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_alternatives(host)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return Certificates(
        ca=_to_pem(ca),
        certificate=_to_pem(certificate),
        private_key=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
    )


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # Clocks of nodes differ.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )


def _usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(host: str) -> list[x509.GeneralName]:
    try:
        return [x509.IPAddress(ipaddress.ip_address(host))]
    except ValueError:
        # A Service has several names; clients may use any of them.
        return [x509.DNSName(host), *([x509.DNSName(f"{host}.cluster.local")] if host.endswith(".svc") else [])]


def _to_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def is_usable(certificates: Certificates, url: str, now: datetime.datetime) -> bool:
    """Is the certificate for the URL's host, and valid for a good while yet?"""
    host = urllib.parse.urlsplit(url).hostname or "localhost"
    try:
        certificate = x509.load_pem_x509_certificate(certificates.certificate.encode())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    is_long = certificate.not_valid_after_utc - now > datetime.timedelta(days=RENEW_DAYS)
    return is_long and set(_alternatives(host)) <= set(names)


def to_secret(certificates: Certificates, name: str, namespace: str) -> dict[str, Any]:
    """Return the Secret that keeps the certificates."""
    texts = {
        CA_KEY: certificates.ca,
        CERTIFICATE_KEY: certificates.certificate,
        PRIVATE_KEY_KEY: certificates.private_key,
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": name, "namespace": namespace},
        "data": {key: base64.b64encode(text.encode()).decode() for key, text in texts.items()},
    }


def from_secret(secret: Mapping[str, Any]) -> Certificates:
    """Return the certificates that a Secret keeps; empty texts where it keeps none."""
    data = secret.get("data") or {}
    texts = [base64.b64decode(data.get(key) or "").decode() for key in (CA_KEY, CERTIFICATE_KEY, PRIVATE_KEY_KEY)]
    return Certificates(*texts)
