"""Tokens of pods, checked by their signature alone."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from finetune_operator.tokens import review_claims

NOW = 1_800_000_000.0
CLAIMS = {
    "aud": ["finetune.dev/progress"],
    "exp": NOW + 600,
    "nbf": NOW - 600,
    "sub": "system:serviceaccount:team-a:default",
    "kubernetes.io": {"namespace": "team-a", "pod": {"name": "pod-1", "uid": "uid-1"}},
}
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    return encode(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def keys():
    public, point = RSA_KEY.public_key().public_numbers(), EC_KEY.public_key().public_numbers()
    return {
        "keys": [
            {"kid": "rsa", "kty": "RSA", "n": number(public.n), "e": number(public.e)},
            {"kid": "ec", "kty": "EC", "crv": "P-256", "x": number(point.x), "y": number(point.y)},
        ]
    }


def sign(algorithm="RS256", kid="rsa", **changes):
    head = encode(json.dumps({"alg": algorithm, "kid": kid}).encode())
    signed = f"{head}.{encode(json.dumps({**CLAIMS, **changes}).encode())}"
    if algorithm == "RS256":
        signature = RSA_KEY.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    elif algorithm == "ES256":
        parts = decode_dss_signature(EC_KEY.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        signature = b"".join(part.to_bytes(32, "big") for part in parts)
    elif algorithm == "HS256":
        public = json.dumps(keys()["keys"][0]).encode()
        signature = hmac.new(public, signed.encode(), hashlib.sha256).digest()
    else:
        signature = b""
    return f"{signed}.{encode(signature)}"


@pytest.mark.parametrize(("algorithm", "kid"), [("RS256", "rsa"), ("ES256", "ec")])
def test_a_signed_token_says_what_a_review_would(algorithm, kid):
    assert review_claims(sign(algorithm, kid), keys(), NOW) == {
        "authenticated": True,
        "audiences": ["finetune.dev/progress"],
        "user": {
            "username": "system:serviceaccount:team-a:default",
            "extra": {
                "authentication.kubernetes.io/pod-name": ["pod-1"],
                "authentication.kubernetes.io/pod-uid": ["uid-1"],
            },
        },
    }


def tampered():
    head, _, signature = sign().split(".")
    return f"{head}.{encode(json.dumps({**CLAIMS, 'sub': 'system:serviceaccount:team-b:x'}).encode())}.{signature}"


@pytest.mark.parametrize(
    "token",
    [
        sign(exp=NOW - 1),
        sign(nbf=NOW + 600),
        sign(kid="unknown"),
        sign("RS256", "ec"),
        sign("ES256", "rsa"),
        sign("HS256"),
        sign("none"),
        sign(**{"kubernetes.io": {"namespace": "team-a"}}),
        tampered(),
        "",
        "a.b",
        "a.b.c",
        "....",
    ],
)
def test_any_other_token_is_refused(token):
    assert review_claims(token, keys(), NOW) == {"authenticated": False}


def test_no_keys_accept_nothing():
    assert review_claims(sign(), {}, NOW) == {"authenticated": False}
