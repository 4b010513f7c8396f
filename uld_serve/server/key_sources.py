"""Where a server's keys come from: its settings and, for containers, the environment. Called by whoever starts one;
says what may not be started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from uld_serve.errors import InvalidRequest
from uld_serve.server.keys import ADMIN_KEY_VARIABLE, KEY_VARIABLE, KeyRing, sha256_of
from uld_serve.server.listener import is_loopback
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.settings import ServerSettings

MIN_KEY_CHARS = 16


def key_ring(settings: ServerSettings, environment: Mapping[str, str]) -> KeyRing:
    """The file's keys, one that may see everything if ULD_SERVE_API_KEY is set and an admin's if ULD_SERVE_ADMIN_KEY is
    (for containers). Unless they are to share it, the prefix cache keeps them apart, by their names and never by the
    keys themselves."""
    policies = {bytes.fromhex(key.sha256): key.policy for key in settings.keys}
    for policy in (
        KeyPolicy(name=KEY_VARIABLE, allow_base=True, logprobs=True),
        KeyPolicy(
            name=ADMIN_KEY_VARIABLE,
            allowed=frozenset(),
            is_admin=True,
            may_read_metrics=True,
            may_fine_tune=True,
        ),
    ):
        key = environment.get(policy.name)
        if key is not None:
            if len(key) < MIN_KEY_CHARS:
                raise InvalidRequest(f"{policy.name} must have at least {MIN_KEY_CHARS} characters")
            digest = sha256_of(key.encode())
            if digest in policies:
                raise InvalidRequest(
                    f"{policy.name} is the key of '{policies[digest].name}' too, and one key cannot mean both"
                )
            policies[digest] = policy
    if not settings.cache.share_between_keys:
        policies = {digest: replace(one, cache_salt=f"key {one.name}") for digest, one in policies.items()}
    return KeyRing(policies)


def safe_keys(settings: ServerSettings) -> KeyRing:
    """The keys, if who holds none of them cannot reach what he must not. Raises InvalidRequest."""
    keys = key_ring(settings, os.environ)
    require_safe_address(settings.host, keys)
    if settings.admin.port is not None:
        require_safe_address(settings.admin.host, keys)
        if not (keys.is_open or any(policy.is_admin for policy in keys.policies.values())):
            raise InvalidRequest(
                "nobody could use the admin listener: give a key `admin = true` (uld-serve keys new NAME --admin), or "
                f"set {ADMIN_KEY_VARIABLE}"
            )
    return keys


def require_safe_address(host: str, keys: KeyRing) -> None:
    """Without keys everybody who reaches the port may do everything, so only this machine may reach it."""
    if keys.is_open and not is_loopback(host):
        raise InvalidRequest(
            f"refusing to listen on {host} without keys: add [[keys]] to --config, set {KEY_VARIABLE}, "
            "or listen on 127.0.0.1"
        )
