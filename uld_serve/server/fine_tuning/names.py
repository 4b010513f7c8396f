"""Which profile names a key may make its own. A job must never take the place of what others are made to forget, so
what no job of the same key has made is left alone. Asked when a job is created and again before it goes live."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from uld_serve.errors import Forbidden, ProfileError
from uld_serve.profiles.registry import Registry
from uld_serve.server.fine_tuning.ledger import Ledger
from uld_serve.server.fine_tuning.records import ACTIVE
from uld_serve.server.policy import DEVELOPMENT, KeyPolicy


@dataclass(frozen=True, slots=True)
class Names:
    """`policies` are the keys' as they are when asked; none: a server that is open to this machine."""

    registry: Registry
    ledger: Ledger
    policies: Callable[[], Iterable[KeyPolicy]]

    def require_free(self, name: str, owner: str) -> None:
        """Raises ProfileError (409) for a name that is not this key's to give, Forbidden if the key may no longer."""
        policies = list(self.policies()) or [DEVELOPMENT]
        policy = next((one for one in policies if one.name == owner), None)
        if policy is None or not policy.may_fine_tune:
            raise Forbidden("the key that asked for this job may no longer make profiles")
        made = self.ledger.made().get(name)
        if made is not None:
            # Once an operator has bound others to it, it is no longer its maker's to change.
            binds_others = any(name in one.mandatory | one.default for one in policies if one.name != owner)
            is_free = policy.is_admin or (made.owner == owner and not binds_others)
        else:
            is_free = name not in self.registry.names() and not any(
                name in one.mandatory | one.default for one in policies
            )
        if not is_free or (not policy.is_admin and self._is_another_keys_job(name, owner)):
            raise ProfileError(
                "this name is taken by a profile that no job of this key has made; choose another suffix",
                param="suffix",
                code="profile_name_taken",
            )

    def _is_another_keys_job(self, name: str, owner: str) -> bool:
        return any(job.name == name and job.owner != owner for job in self.ledger.jobs(statuses=ACTIVE))
