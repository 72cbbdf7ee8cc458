"""Endpoints beside generation and admin: models, tokens, health and metrics."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from serving.api.chat import chat_token_ids
from serving.api.context import AppContext
from serving.api.errors import ApiError
from serving.api.incoming import check_model, encode, off_loop
from serving.api.openapi import answers_as, errors
from serving.api.request_schema import DetokenizeBody, TokenizeBody
from serving.api.response_schema import ModelCard, ModelList, Text, TokenizerInfo, Tokens
from serving.metrics import CONTENT_TYPE


def health_routes(context: AppContext) -> APIRouter:
    """Open without a key: they reveal nothing about requests."""
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses=errors(503))
    async def health() -> Response:
        """Liveness: the engine thread runs."""
        if not context.engine.is_alive:
            raise ApiError(503, "The engine has stopped; the replica must be restarted.")
        return JSONResponse({"status": "ok"})

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", responses=errors(503))
    async def ready() -> Response:
        if not context.is_ready:
            raise ApiError(503, "Not ready: loading, draining or stopped.")
        return JSONResponse({"status": "ready", "draft_version": context.engine.draft_version})

    @router.head("/version", include_in_schema=False)
    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": context.version}

    @router.get("/metrics", response_class=Response, responses=answers_as(CONTENT_TYPE))
    def metrics() -> Response:
        return Response(context.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return router


def model_routes(context: AppContext) -> APIRouter:
    router = APIRouter()

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models", response_model_exclude_unset=True)
    async def list_models() -> ModelList:
        return ModelList(object="list", data=[_card(context, name) for name in context.model_names])

    @router.head("/v1/models/{model_id:path}", include_in_schema=False)
    @router.get("/v1/models/{model_id:path}", response_model_exclude_unset=True, responses=errors(404))
    async def retrieve_model(model_id: str) -> ModelCard:
        check_model(context, model_id)
        return _card(context, model_id)

    return router


def token_routes(context: AppContext) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", response_model=Tokens, responses=errors(400, 404, 413))
    async def tokenize(body: TokenizeBody) -> Response:
        check_model(context, body.model)
        codec = context.codec
        if body.messages is not None:
            tokens = await chat_token_ids(
                codec,
                body.messages,
                body.add_generation_prompt,
                {},
                continue_final_message=body.continue_final_message,
            )
        else:
            tokens = await encode(codec, body.prompt or "", add_special_tokens=body.add_special_tokens)

        def rendered() -> str:
            answer = Tokens(count=len(tokens), max_model_len=context.engine.max_seq_len, tokens=tokens)
            if body.return_token_strs:
                texts = [codec.token_text(token) for token in tokens]
                answer = answer.model_copy(update={"token_strs": texts})
            return answer.to_json()

        return Response(await off_loop(rendered, len(tokens)), media_type="application/json")

    @router.post("/detokenize", responses=errors(400, 404, 413))
    def detokenize(body: DetokenizeBody) -> Text:
        check_model(context, body.model)
        context.limits.check_tokens(len(body.tokens))
        return Text(prompt=context.codec.decode(body.tokens))

    @router.get("/tokenizer_info")
    def tokenizer_info() -> TokenizerInfo:
        """What a client needs to use `/tokenize` in place of a tokenizer of its own."""
        return context.codec.info

    return router


def _card(context: AppContext, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        object="model",
        created=context.started_at,
        owned_by="everdraft",
        max_model_len=context.engine.max_seq_len,
        sampling_defaults=dict(context.sampling_defaults),
    )
