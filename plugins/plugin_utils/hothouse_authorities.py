"""Which certificate authority is whose: by what credentials hold, whether an authority is one of their environment."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

# Fingerprints of the authorities whose place that of the environment took, with spaces in between.
REPLACED = "ca_replaced"


def certificates(text: str) -> list[x509.Certificate]:
    """All certificates in a text of PEM, none if it is anything else."""
    try:
        return x509.load_pem_x509_certificates(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        return []


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the public key in hexadecimal: an authority that was renewed with its key is the same."""
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).hexdigest()


def belongs(authority: x509.Certificate, credentials: Mapping[str, str]) -> bool:
    """Whether an authority is or was that of these credentials, or has issued one of their certificates."""
    mark = fingerprint(authority)
    if mark in str(credentials.get(REPLACED) or "").split():
        return True
    for name, text in credentials.items():
        if not name.endswith(("_certificate", "_certificate_old")):
            continue
        for certificate in certificates(str(text or "")):
            if fingerprint(certificate) == mark or issued(certificate, authority):
                return True
    return False


def issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether a certificate was issued by this authority."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def foreign(text: str, credentials: Mapping[str, str]) -> bool:
    """Whether a host that trusts the authorities in this PEM is one of another environment than these credentials."""
    found = certificates(text)
    return bool(found) and not any(belongs(authority, credentials) for authority in found)


def refusal(host: str, file: object) -> str:
    """Why a host does not go together with the credentials in a file, and what to do."""
    return (
        f"The host {host} trusts another authority than that of {file}: it is one of another environment, or has "
        "credentials of another generation. Nothing was changed on the hosts. Look at its address in hosts.yml. If it "
        "is right, get the newest credentials.yml from the colleague who deployed last, or fetch what the hosts know "
        "into a new one with playbooks/recover.yml. Only if the host is to get the credentials of this file all the "
        "same, add `-e credentials_replace=true`; see docs/credentials.md, A file that is missing."
    )
