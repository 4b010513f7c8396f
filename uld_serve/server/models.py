"""GET /v1/models, /v1/models/{id} and /v1/forget_profiles: what the asking key may use. Reaches no engine."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI
from starlette.responses import Response

from uld_serve.errors import UnknownModel
from uld_serve.server.catalog import Catalog, catalog_of, policy_of
from uld_serve.server.policy import KeyPolicy
from uld_serve.server.responses import (
    ForgetProfileCard,
    ForgetProfileList,
    KeyViews,
    ModelCard,
    ModelList,
    json_response,
)

OWNER = "uld-serve"

TheCatalog = Annotated[Catalog, Depends(catalog_of)]
ThePolicy = Annotated[KeyPolicy, Depends(policy_of)]


def add_routes(app: FastAPI) -> None:
    app.add_api_route("/v1/models", list_models, methods=["GET"], response_model=ModelList)
    app.add_api_route("/v1/models/{model_id:path}", get_model, methods=["GET"], response_model=ModelCard)
    app.add_api_route(
        "/v1/forget_profiles", list_forget_profiles, methods=["GET"], response_model=ForgetProfileList
    )


async def list_models(catalog: TheCatalog, policy: ThePolicy) -> Response:
    """The base, where this key may ask it, and `base:profile` for every profile that the key may use."""
    return json_response(ModelList(object="list", data=_cards(catalog, policy)))


async def get_model(model_id: str, catalog: TheCatalog, policy: ThePolicy) -> Response:
    """One of them."""
    for card in _cards(catalog, policy):
        if card.id == model_id:
            return json_response(card)
    raise UnknownModel("no such model; GET /v1/models lists those that are served", param="model")


async def list_forget_profiles(catalog: TheCatalog, policy: ThePolicy) -> Response:
    """The profiles that this key may use, whether they are in every answer that it gets, and whether it may also see
    the base and log-probabilities."""
    cards = [_profile_card(catalog, policy, name) for name in catalog.visible_profiles(policy)]
    views = KeyViews(allow_base=policy.allow_base, logprobs=policy.logprobs)
    return json_response(ForgetProfileList(object="list", data=cards, key=views))


def _cards(catalog: Catalog, policy: KeyPolicy) -> list[ModelCard]:
    """The base's plain name first, where it means something for this key, then base:profile for each profile."""
    base = [_card(catalog, catalog.model, parent=None)] if policy.may_name_nothing else []
    return base + [
        _card(catalog, f"{catalog.model}:{name}", parent=catalog.model)
        for name in catalog.visible_profiles(policy)
    ]


def _card(catalog: Catalog, model_id: str, *, parent: str | None) -> ModelCard:
    return ModelCard(id=model_id, object="model", created=catalog.created, owned_by=OWNER, parent=parent)


def _profile_card(catalog: Catalog, policy: KeyPolicy, name: str) -> ForgetProfileCard:
    version = catalog.registry.get(name)
    return ForgetProfileCard(
        name=name,
        object="forget_profile",
        digest=version.digest,
        method=version.profile.method,
        rule=version.profile.rule.kind,
        strength=version.profile.rule.strength,
        model=f"{catalog.model}:{name}",
        is_mandatory=name in policy.mandatory,
    )
