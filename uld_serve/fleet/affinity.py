"""Which replica a request should go to: the one that has seen its beginning, unless that one has much more to do than
the others. Pure functions, asked by door and router. Decides nothing about what is answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

KEY_BYTES = 16
HEADER = b"x-forget-profile"


def route_key(headers: Iterable[tuple[bytes, bytes]], body: bytes, *, prefix_chars: int) -> str:
    """A name for all requests that could share cached keys and values: the asking key, the profiles asked for and the
    first `prefix_chars` characters (or token ids) of the prompt. What cannot be read gets some name: the replica
    refuses it in the right words."""
    fields = _object(body)
    parts = [
        *(value for name, value in headers if name in (b"authorization", HEADER)),
        str(fields.get("model", "")).encode(errors="replace"),
        json.dumps(fields.get("forget_profile"), sort_keys=True).encode(),
        _beginning(fields, prefix_chars) if fields else body,
    ]
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def preference(key: str, loads: Mapping[str, int], *, slack: int) -> list[str]:
    """The replicas named by `loads` (requests that each runs), best first.

    Highest random weight: when a replica comes or goes, only the keys that it gains or had move. A replica with more
    than `slack` requests above the least loaded one comes after those that have not.
    """
    least = min(loads.values(), default=0)
    return sorted(loads, key=lambda name: (loads[name] > least + slack, _weight(key, name), name))


def _weight(key: str, replica: str) -> bytes:
    """Smaller is better."""
    return hashlib.blake2b(f"{key}|{replica}".encode(), digest_size=8).digest()


def _object(body: bytes) -> Mapping[str, object]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _beginning(fields: Mapping[str, object], length: int) -> bytes:
    prompt = fields.get("prompt", fields.get("messages"))
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return repr(prompt[:length]).encode()
    text = ""
    for piece in _pieces(prompt):
        text += piece
        if len(text) >= length:
            break
    return text[:length].encode(errors="replace")


def _pieces(value: object) -> Iterator[str]:
    """The strings and numbers in there, in order: of several prompts the first ones."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name in ("role", "content", "text"):
            yield from _pieces(value.get(name))
    elif isinstance(value, Sequence):
        for one in value:
            yield from _pieces(one)
    elif isinstance(value, int):
        yield f"{value},"
