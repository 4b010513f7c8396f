"""Whose a profile's name is, once operators have bound other keys to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest

from uld_serve.errors import ProfileError
from uld_serve.profiles.registry import Registry
from uld_serve.server.fine_tuning.ledger import Ledger
from uld_serve.server.fine_tuning.names import Names
from uld_serve.server.policy import KeyPolicy

MAKER = KeyPolicy(name="maker", allow_base=True, may_fine_tune=True)
ADMIN = KeyPolicy(name="ops", is_admin=True, may_fine_tune=True)


@dataclass(frozen=True)
class Made:
    owner: str


class OneProfile:
    """A ledger in which a job of "maker" has made "acme"."""

    def made(self) -> dict[str, Made]:
        return {"acme": Made("maker")}

    def jobs(self, **_: object) -> list[object]:
        return []


def names(*policies: KeyPolicy) -> Names:
    return Names(Registry([]), cast(Ledger, OneProfile()), lambda: policies)


@pytest.mark.parametrize(
    "bound",
    [
        KeyPolicy(name="team", mandatory=frozenset({"acme"})),
        KeyPolicy(name="team", default=frozenset({"acme"})),
    ],
)
def test_what_binds_others_is_the_admins_alone(bound: KeyPolicy) -> None:
    with pytest.raises(ProfileError, match="choose another suffix"):
        names(MAKER, ADMIN, bound).require_free("acme", "maker")
    names(MAKER, ADMIN, bound).require_free("acme", "ops")


def test_a_maker_may_change_what_binds_nobody_else() -> None:
    names(MAKER, ADMIN, KeyPolicy(name="team")).require_free("acme", "maker")
