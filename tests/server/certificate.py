"""A certificate for tests, of 127.0.0.1, which nobody else trusts."""

from __future__ import annotations

from pathlib import Path

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBZjCCAQ2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABEPgJL0G9ZNqy1lk
LtTbFk9SDwJIcg3UPuLMGxdzmt81ktMJ7VPvERMTfbeJtGlLx6wnADARREQH6RjE
BkLnJUCjTjBMMA8GA1UdEwEB/wQFMAMBAf8wHQYDVR0OBBYEFM2rDOHkgw7ipvNa
g66IiISTitTFMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAKBggqhkjOPQQD
AgNHADBEAiAKgpRu7KfakwwzpeeYxr01hDSN9iN8dj+vfHutWoZCewIgYM/crbFB
tRo7YHYFsvlyxkplYe2UOsGpq//gf7tmFEQ=
-----END CERTIFICATE-----
"""

KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgUcO7YlOpoWVPDX94
NQz0VUJZv5cSn9/KpIon0y5OUlmhRANCAARD4CS9BvWTastZZC7U2xZPUg8CSHIN
1D7izBsXc5rfNZLTCe1T7xETE323ibRpS8esJwAwEUREB+kYxAZC5yVA
-----END PRIVATE KEY-----
"""


def written(folder: Path) -> tuple[Path, Path]:
    """The files with the certificate and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    cert.write_text(CERTIFICATE)
    key.write_text(KEY)
    return cert, key
