"""Everything but generation: models, tokens, health, metrics, and what an operator may see."""

import dataclasses
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from serving.api.chat import chat_token_ids
from serving.api.context import AppContext
from serving.api.errors import ApiError
from serving.api.incoming import check_model, encode
from serving.api.request_schema import DetokenizeBody, TokenizeBody
from serving.api.response_schema import ModelCard, ModelList, Text, Tokens
from serving.metrics import CONTENT_TYPE


def health_routes(context: AppContext) -> APIRouter:
    """Open to all: they say nothing about requests."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """Liveness: the engine thread runs."""
        if not context.engine.is_alive:
            raise ApiError(503, "The engine has stopped; the replica must be restarted.")
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        if not context.is_ready:
            raise ApiError(503, "Not ready: loading, draining or stopped.")
        return JSONResponse({"status": "ready", "draft_version": context.engine.draft_version})

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": context.version}

    @router.get("/metrics")
    def metrics() -> Response:
        return Response(context.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return router


def model_routes(context: AppContext) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", response_model_exclude_unset=True)
    async def list_models() -> ModelList:
        return ModelList(object="list", data=[_card(context)])

    @router.get("/v1/models/{model_id:path}", response_model_exclude_unset=True)
    async def retrieve_model(model_id: str) -> ModelCard:
        check_model(context, model_id)
        return _card(context)

    return router


def token_routes(context: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", response_model_exclude_unset=True)
    async def tokenize(body: TokenizeBody) -> Tokens:
        check_model(context, body.model)
        codec = context.codec
        if body.messages is not None:
            tokens = await chat_token_ids(codec, body.messages, body.add_generation_prompt, {})
        else:
            text = body.prompt or ""
            tokens = await encode(codec, text, add_special_tokens=body.add_special_tokens)
        answer = Tokens(count=len(tokens), max_model_len=context.engine.max_seq_len, tokens=tokens)
        if not body.return_token_strs:
            return answer
        return answer.model_copy(update={"token_strs": [codec.token_text(token) for token in tokens]})

    @router.post("/detokenize")
    def detokenize(body: DetokenizeBody) -> Text:
        check_model(context, body.model)
        return Text(prompt=context.codec.decode(body.tokens))

    return router


def admin_routes(context: AppContext) -> APIRouter:
    """Behind the admin key."""
    router = APIRouter()

    @router.get("/admin/status")
    def status() -> dict[str, Any]:
        """The ServingStatus that the learner gets too."""
        return dataclasses.asdict(context.status())

    return router


def _card(context: AppContext) -> ModelCard:
    return ModelCard(
        id=context.model_name,
        object="model",
        created=context.started_at,
        owned_by="everdraft",
        max_model_len=context.engine.max_seq_len,
    )
