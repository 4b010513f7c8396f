"""POST /v1/tokenize and /v1/detokenize: text to token ids and back. Reaches no engine."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI
from starlette.responses import Response

from uld_serve.errors import InvalidRequest
from uld_serve.server.admission import Parse
from uld_serve.server.catalog import Catalog, catalog_of
from uld_serve.server.protocol import DetokenizeRequest, TokenizeRequest
from uld_serve.server.responses import DetokenizeResponse, TokenizeResponse, json_response
from uld_serve.server.sampling import encode, encode_chat

PARSE_TEXT = Parse(TokenizeRequest)
PARSE_TOKENS = Parse(DetokenizeRequest)

TheCatalog = Annotated[Catalog, Depends(catalog_of)]


def add_routes(app: FastAPI) -> None:
    app.add_api_route("/v1/tokenize", tokenize, methods=["POST"], response_model=TokenizeResponse)
    app.add_api_route("/v1/detokenize", detokenize, methods=["POST"], response_model=DetokenizeResponse)


async def tokenize(request: Annotated[TokenizeRequest, Depends(PARSE_TEXT)], catalog: TheCatalog) -> Response:
    """A prompt as it is, or messages through the chat template with the assistant's turn opened."""
    if request.messages is not None:
        token_ids = await encode_chat(catalog.tokenizer, request.messages)
    else:
        token_ids = await encode(catalog.tokenizer, request.prompt or "")
    return json_response(
        TokenizeResponse(tokens=token_ids, count=len(token_ids), max_model_len=catalog.max_model_len)
    )


async def detokenize(
    request: Annotated[DetokenizeRequest, Depends(PARSE_TOKENS)], catalog: TheCatalog
) -> Response:
    """Token ids as text, special tokens written out."""
    if not all(0 <= token_id < catalog.tokenizer.vocab_size for token_id in request.tokens):
        raise InvalidRequest(f"token ids must be 0 to {catalog.tokenizer.vocab_size - 1}", param="tokens")
    text = catalog.tokenizer.decode(request.tokens, skip_special_tokens=False)
    return json_response(DetokenizeResponse(text=text))
