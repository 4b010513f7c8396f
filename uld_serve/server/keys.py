"""Who is asking: from the Authorization header to a KeyPolicy. Called by admission and by every route that shows
what a key may see. Knows hashes only; a key itself is never kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from hmac import compare_digest

from starlette.requests import Request

from uld_serve.errors import Unauthenticated
from uld_serve.server.policy import DEVELOPMENT, KeyPolicy

KEY_VARIABLE = "ULD_SERVE_API_KEY"
ADMIN_KEY_VARIABLE = "ULD_SERVE_ADMIN_KEY"


def sha256_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Policies by the SHA-256 of their key. Empty means development: everyone gets DEVELOPMENT."""

    policies: Mapping[bytes, KeyPolicy] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.policies)

    @property
    def is_open(self) -> bool:
        return not self.policies

    def policy_of(self, request: Request) -> KeyPolicy:
        """Raises Unauthenticated unless exactly one `Authorization: Bearer <key>` holds a known key."""
        if self.is_open:
            return DEVELOPMENT
        given = [value for name, value in request.headers.raw if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer":
            raise Unauthenticated("send your key as 'Authorization: Bearer <key>'")
        digest = sha256_of(key.strip())
        found: KeyPolicy | None = None
        for known, policy in self.policies.items():  # all of them: the time taken tells nothing
            if compare_digest(known, digest):
                found = policy
        if found is None:
            raise Unauthenticated("this key is not known here")
        return found
