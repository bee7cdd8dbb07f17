"""Checks a pod's token by its signature, where the operator may not ask the API server whose it is.

An operator limited to namespaces has no right to TokenReview, which is for the whole cluster; the keys that sign tokens
are public to every ServiceAccount. Used by `cluster`. Pure.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

LEEWAY_SECONDS = 60
CURVES: Mapping[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
HASHES: Mapping[str, hashes.HashAlgorithm] = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}


def review_claims(token: str, keys: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return what a TokenReview's status would say of a token. `keys` is the API server's key set."""
    try:
        claims = _verify(token, keys)
        is_current = claims.get("nbf", 0) - LEEWAY_SECONDS <= now < claims["exp"]
        pod = claims["kubernetes.io"]["pod"]
        audiences = claims["aud"]
    except (ValueError, KeyError, TypeError, InvalidSignature):
        return {"authenticated": False}
    if not is_current:
        return {"authenticated": False}
    extra = {
        "authentication.kubernetes.io/pod-name": [pod["name"]],
        "authentication.kubernetes.io/pod-uid": [pod["uid"]],
    }
    return {
        "authenticated": True,
        "audiences": audiences if isinstance(audiences, list) else [audiences],
        "user": {"username": str(claims.get("sub")), "extra": extra},
    }


def _verify(token: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    head, body, signature = token.split(".")
    header = json.loads(_decode(head))
    key = next(each for each in [*keys.get("keys", ()), {}] if not each or each.get("kid") == header.get("kid"))
    signed, raw, algorithm = f"{head}.{body}".encode(), _decode(signature), str(header.get("alg"))
    if key.get("kty") == "RSA" and algorithm.startswith("RS"):
        public = rsa.RSAPublicNumbers(_to_int(key["e"]), _to_int(key["n"])).public_key()
        public.verify(raw, signed, padding.PKCS1v15(), HASHES[algorithm[2:]])
    elif key.get("kty") == "EC" and algorithm.startswith("ES"):
        curve = ec.EllipticCurvePublicNumbers(_to_int(key["x"]), _to_int(key["y"]), CURVES[key["crv"]]).public_key()
        half = len(raw) // 2
        parts = encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))
        curve.verify(parts, signed, ec.ECDSA(HASHES[algorithm[2:]]))
    else:
        # "none" and symmetric algorithms end here: whoever writes the header must not choose how it is checked.
        raise ValueError("no key of the API server signed this token")
    claims: dict[str, Any] = json.loads(_decode(body))
    return claims


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _to_int(text: str) -> int:
    return int.from_bytes(_decode(text), "big")
