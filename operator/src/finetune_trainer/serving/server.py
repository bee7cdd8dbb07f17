"""`transformers serve` pinned to one model: its handlers, generation and OpenAI schema, without its model loading.

The stock program loads whatever model a request names, lists the machine's download cache as its models, and can be
told to unload by anyone (`/load_model`, `/reset`). Here one loaded model answers under one name, and where it carries
adapters, also without them under another; everything else is refused, and `/health` is good only while a real
completion works.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from finetune_contract.smoke_prompt import API_KEY
from finetune_trainer.serving.generate import Generator
from finetune_trainer.training import modeling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

DIGEST_HEADER = b"x-model-digest"
"""Header of every answer: the digest of the model that gave it."""
DRAIN_SECONDS = 55
"""How long requests in flight may take once the server was asked to stop."""
PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models"})
"""What is kept of the stock server."""

PROBE_SECONDS = 60.0
"""A completion this recent counts for `/health`; an older one is repeated with a single token."""
PROBE_TIMEOUT_SECONDS = 20.0


class PinnedModels(ModelManager):  # type: ignore[misc]
    """A model manager that holds its models for good."""

    def __init__(self, generators: Mapping[str, Generator]) -> None:
        first = next(iter(generators))
        super().__init__(device=str(generators[first].model.device))
        self.force_model = first
        """What answers a request that names no model."""
        self.model_timeout = -1
        self._generators = dict(generators)
        self._created = int(time.time())
        for generator in generators.values():
            _bound_answers(generator.model)

    def has_model(self, name: str) -> bool:
        """Return whether a model answers under this name."""
        return name in self._generators

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Keep the name as it is: there are no revisions here."""
        return model_id

    def load_model_and_processor(self, model_id: str, *_args: Any, **_options: Any) -> tuple[Any, Any]:
        """Return a model."""
        generator = self._generators[model_id]
        return generator.model, generator.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """List the models."""
        facts = {"object": "model", "created": self._created, "owned_by": "finetune-operator"}
        return [{"id": name, **facts} for name in self._generators]

    def shutdown(self) -> None:
        """Keep the model until the process ends."""


class _Resolving:
    """Finds the model of a request; the stock handlers know a single one."""

    model_manager: PinnedModels

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        name = body.get("model") or self.model_manager.force_model
        if not self.model_manager.has_model(name):
            known = ", ".join(entry["id"] for entry in self.model_manager.get_gen_models())
            raise HTTPException(400, f"there is no model {name!r} here: use one of {known}")
        body["model"] = name
        return (name, *self.model_manager.load_model_and_processor(name))


class _Chat(_Resolving, ChatCompletionHandler):  # type: ignore[misc]
    pass


class _Completion(_Resolving, CompletionHandler):  # type: ignore[misc]
    pass


def _bound_answers(model: Any) -> None:
    """Let no answer grow beyond what the architecture takes; some fail there, others answer nonsense."""
    limit = modeling.limit_length(model.config)
    generate = model.generate

    def bounded(*, generation_config: GenerationConfig, **inputs: Any) -> Any:
        room = limit - int(inputs["input_ids"].shape[-1])
        if room < 1:
            raise ValueError(f"the prompt has {limit - room} tokens, the model takes {limit} with the answer")
        generation_config.max_new_tokens = min(generation_config.max_new_tokens or room, room)
        return generate(generation_config=generation_config, **inputs)

    model.generate = bounded


class Health:
    """Whether completions work, from the last one that did."""

    def __init__(self, generator: Generator, state: GenerationState, name: str) -> None:
        self._manager = state.get_manager(name)
        self._model = generator.model
        self._tokenizer = generator.tokenizer
        self._inputs = generator.tokenizer("Hello", return_tensors="pt").to(generator.model.device)
        self._succeeded_at = 0.0

    async def probe(self) -> str:
        """Return what is wrong; empty when a completion has worked lately or works now."""
        if time.monotonic() - self._succeeded_at < PROBE_SECONDS and self._succeeded_at:
            return ""
        config = GenerationConfig(max_new_tokens=1, do_sample=False)
        completion = self._manager.generate_non_streaming(self._model, self._tokenizer, self._inputs, config, "health")
        try:
            await asyncio.wait_for(completion, PROBE_TIMEOUT_SECONDS)
        except Exception as error:
            return f"a completion failed: {type(error).__name__}: {error}"
        self._succeeded_at = time.monotonic()
        return ""


class Gate:
    """What every request goes through: the key it must carry, and the digest that its answer does."""

    def __init__(self, app: ASGIApp, digest: str, key: str) -> None:
        self._app = app
        self._digest = digest.encode()
        self._key = f"Bearer {key}".encode() if key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._key and scope["path"] in PATHS and not self._is_known(scope):
            error = {"message": "send the API key as Authorization: Bearer", "type": "invalid_request_error"}
            await JSONResponse({"error": error}, status_code=401)(scope, receive, send)
            return

        async def send_digest(message: Message) -> None:
            if message["type"] == "http.response.start" and self._digest:
                message["headers"] = [*message.get("headers", ()), (DIGEST_HEADER, self._digest)]
            await send(message)

        await self._app(scope, receive, send_digest)

    def _is_known(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._key)


def build_app(generators: Mapping[str, Generator], digest: str = "", key: str = "") -> FastAPI:
    """Return the application that answers for models by name; with a key only those who know it.

    The first one answers where a request names none, and stands for the health of all: they share their weights.
    """
    name = next(iter(generators))
    pinned = PinnedModels(generators)
    state = GenerationState()
    app = build_server(
        pinned,
        _Chat(model_manager=pinned, generation_state=state),
        completion_handler=_Completion(model_manager=pinned, generation_state=state),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in PATHS]
    health = Health(generators[name], state, name)

    @app.get("/health")
    async def read_health() -> JSONResponse:
        problem = await health.probe()
        return JSONResponse({"status": problem or "ok"}, status_code=503 if problem else 200)

    app.add_middleware(Gate, digest=digest, key=key)
    return app


def serve(generators: Mapping[str, Generator], port: int, digest: str = "") -> None:
    """Answer requests until SIGTERM; requests in flight are finished."""
    import uvicorn

    uvicorn.run(
        build_app(generators, digest, os.environ.get(API_KEY, "")),
        host="0.0.0.0",
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
