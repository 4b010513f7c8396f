"""What this server offers and to whom: the model, the profiles, the keys and the limits. No engine is in it, so a
route that holds a Catalog cannot generate."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.requests import Request

from uld_serve.engine.tokenizer import Tokenizer
from uld_serve.errors import UnknownModel
from uld_serve.profiles.registry import Registry
from uld_serve.server.keys import KeyRing
from uld_serve.server.policy import KeyPolicy, profile_set
from uld_serve.server.settings import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may ask, and how much: all that an application which serves no model needs to know."""

    keys: KeyRing = field(default_factory=KeyRing)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog(Access):
    """`created` is when the server started, in Unix seconds."""

    model: str
    registry: Registry
    tokenizer: Tokenizer
    max_model_len: int
    created: int

    def profiles_of_model(self, requested: str) -> list[frozenset[str]]:
        """What `base:a+b` names: [{a, b}]; [] for the base's plain name. Raises UnknownModel."""
        if requested == self.model:
            return []
        prefix, suffix = f"{self.model}:", requested[len(self.model) + 1 :]
        if not requested.startswith(prefix) or not suffix:
            raise UnknownModel("no such model; GET /v1/models lists those that are served", param="model")
        return [profile_set(suffix.split("+"), param="model")]

    def visible_profiles(self, policy: KeyPolicy) -> list[str]:
        return [name for name in self.registry.names() if policy.may_see(name)]


def catalog_of(request: Request) -> Catalog:
    catalog = request.app.state.catalog
    assert isinstance(catalog, Catalog)
    return catalog


def access_of(request: Request) -> Access:
    access = request.app.state.catalog
    assert isinstance(access, Access)
    return access


def policy_of(request: Request) -> KeyPolicy:
    """The asking key's policy. Raises Unauthenticated."""
    return access_of(request).keys.policy_of(request)
