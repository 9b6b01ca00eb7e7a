"""The routes of the HTTP API, and what it says where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from flume_common.metrics import registry_of
from flume_common.readiness import Check, readiness
from flume_common.telemetry import version
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from flume_router.errors import NoWeightNode, RouterError
from flume_router.http.chat import ChatApi
from flume_router.http.completions import CompletionApi
from flume_router.http.context import RequestContext
from flume_router.http.endpoint import CompletionEndpoint
from flume_router.http.errors import ErrorReply, HttpError, reply_of, unexpected
from flume_router.http.metrics import families
from flume_router.http.version import HttpVersion
from flume_router.service import Service


def build_app(service: Service, *, cors_origins: Sequence[str] = ()) -> Starlette:
    """`cors_origins`: of pages whose scripts may call us; "*" for any."""
    chat = CompletionEndpoint(ChatApi(), service)
    completions = CompletionEndpoint(CompletionApi(), service)
    pages = _Pages(service)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", pages.models),
            Route("/v1/models/", pages.models),
            Route("/v1/models/{model:path}", pages.model),
            Route("/health", pages.health),
            Route("/healthz", pages.alive),
            Route("/livez", pages.alive),
            Route("/live", pages.alive),
            Route("/readyz", pages.ready),
            Route("/readyz/{check}", pages.ready_check),
            Route("/version", pages.version),
            Route("/metrics", pages.metrics),
        ],
        middleware=[Middleware(RequestContext), Middleware(HttpVersion), *_cors(cors_origins)],
        exception_handlers={
            HTTPException: _no_such_route,
            RouterError: _refuse,
            Exception: _fail,
        },
    )


def _cors(origins: Sequence[str]) -> list[Middleware]:
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    ]


class _Pages:
    """The small ones, each a document about the service as it is now."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = registry_of(lambda: families(service))

    async def models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._service.require_model(request.path_params["model"])
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.model,
            "object": "model",
            "created": int(service.started_at_s),
            "owned_by": "kernelflume",
            "max_model_len": service.pool.context_tokens if service.pool.ready else None,
        }

    async def health(self, _request: Request) -> Response:
        """For people: says what is missing."""
        if self._service.ready:
            return _json({"status": "ok"})
        draining = self._service.in_flight.draining
        nobody = NoWeightNode(self._service.model, self._service.pool.why_not)
        message = "this router is shutting down" if draining else str(nobody)
        return _json({"status": "unavailable", "message": message}, status=503, headers={"retry-after": "1"})

    async def alive(self, _request: Request) -> Response:
        """The process runs; depends on nothing else."""
        return PlainTextResponse("ok")

    async def ready(self, request: Request) -> Response:
        """Whether new requests should come here; `?verbose` lists the checks.

        Without etcd we serve on the members known last, so that is told but decides nothing.
        """
        facts = {"store_connected": self._service.pool.store_connected}
        said = readiness(self._checks(), facts, verbose="verbose" in request.query_params)
        return PlainTextResponse(said.text, said.status)

    async def ready_check(self, request: Request) -> Response:
        """One of the checks, by its name."""
        checks = self._checks()
        name = request.path_params["check"]
        if name not in checks:
            raise HTTPException(404)
        said = readiness({name: checks[name]}, {}, verbose="verbose" in request.query_params)
        return PlainTextResponse(said.text, said.status)

    def _checks(self) -> dict[str, Check]:
        pool = self._service.pool
        return {
            "weight-node": pool.met or "; ".join(pool.why_not),
            "canary": pool.canary_failure or True,
            "not-draining": not self._service.in_flight.draining,
        }

    async def version(self, _request: Request) -> Response:
        return _json({"version": version()})

    async def metrics(self, _request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        failure = HttpError(
            405, f"Invalid method for URL ({place})", code="method_not_supported", headers=error.headers
        )
    else:
        failure = HttpError(error.status_code, f"Invalid URL ({place})", code="unknown_url")
    return _error(reply_of(failure))


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RouterError)
    return _error(reply_of(error))


async def _fail(_request: Request, _error_: Exception) -> Response:
    return _error(unexpected())


def _error(reply: ErrorReply) -> Response:
    return _json(reply.body, status=reply.status, headers=dict(reply.headers))


def _json(document: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(document), status, headers, media_type="application/json")
