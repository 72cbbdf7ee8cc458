"""The HTTP app of one replica: routes behind the auth middleware. Starts and closes nothing."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from serving.api.admin import admin_routes
from serving.api.auth_middleware import AuthMiddleware
from serving.api.body_limit import BodyLimit
from serving.api.chat import chat_routes
from serving.api.completions import completion_routes
from serving.api.context import AppContext
from serving.api.errors import install_error_handlers
from serving.api.openapi import describe
from serving.api.operations import health_routes, model_routes, token_routes
from serving.api.rate_limits import LIMIT_HEADERS
from serving.api.request_ids import REQUEST_ID_HEADER
from serving.api.responses import responses_routes


def create_app(context: AppContext, *, sends_request_id: bool = True) -> FastAPI:
    """An ASGI app that needs no lifespan: the context's owner made its parts and closes them.

    `sends_request_id`: see `AuthMiddleware`."""
    app = FastAPI(title="everdraft", version=context.version)
    for routes in (
        completion_routes,
        chat_routes,
        responses_routes,
        model_routes,
        token_routes,
        health_routes,
        admin_routes,
    ):
        app.include_router(routes(context))
    install_error_handlers(app)
    describe(app, context.keys)
    app.add_middleware(BodyLimit, limits=context.limits)
    app.add_middleware(
        AuthMiddleware,
        keys=context.keys,
        refused_calls=context.refused_calls,
        sends_request_id=sends_request_id,
    )
    if context.allowed_origins:  # outermost: a browser asks without a key first, and shows no error without
        app.add_middleware(
            CORSMiddleware,
            allow_origins=context.allowed_origins,
            allow_methods=("*",),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID_HEADER, "Retry-After", *LIMIT_HEADERS),
        )
    return app
