"""Routes of files and batches.

Source: OpenAI's files and batch API. Differs: `purpose` is "batch"; nothing expires.
"""

import asyncio
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, StrictStr
from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response

from capstan.generation.serving.batches import BatchRunner
from capstan.generation.serving.bodies import parse, read_json
from capstan.generation.serving.files import FileStore, Json
from capstan.generation.serving.guard import UPLOADS
from capstan.generation.serving.replies import Refused, reply

_MOST_LISTED = 10_000


class BatchBody(BaseModel):
    """A new batch."""

    model_config = ConfigDict(extra="ignore")

    input_file_id: StrictStr
    endpoint: Literal["/v1/completions", "/v1/chat/completions"]
    completion_window: Literal["24h"] = "24h"
    metadata: dict[str, StrictStr] | None = None


def add_file_routes(app: FastAPI, store: FileStore | None, runner: BatchRunner | None) -> None:
    """Add them; to a server without a folder, as refusals that say so."""
    if store is None or runner is None:

        @app.api_route("/v1/files{rest:path}", methods=["GET", "POST", "DELETE"])
        @app.api_route("/v1/batches{rest:path}", methods=["GET", "POST"])
        async def nowhere(rest: str) -> Response:
            raise Refused(501, "This server keeps no files; start it with --files FOLDER for batches.")

        return
    _add_file_routes(app, store)
    _add_batch_routes(app, runner)


def _add_file_routes(app: FastAPI, store: FileStore) -> None:
    @app.post(UPLOADS)
    async def upload(http: HttpRequest) -> Response:
        if not http.headers.get("content-type", "").startswith("multipart/form-data"):
            raise Refused(415, "A file is sent as multipart/form-data with 'file' and 'purpose'.")
        async with http.form(max_files=1, max_fields=16) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise Refused(400, "The form has no 'file'.", param="file")
            if purpose != "batch":
                raise Refused(400, f"The purpose must be 'batch', not {purpose!r}.", param="purpose")
            name = file.filename or "file"
            return reply(await asyncio.to_thread(store.add, file.file, name=name, purpose="batch"))

    @app.get(UPLOADS)
    async def files(http: HttpRequest) -> Response:
        return reply(_page(await asyncio.to_thread(store.objects), http))

    @app.get(UPLOADS + "/{identity}")
    async def file(identity: str) -> Response:
        return reply(store.about(identity))

    @app.get(UPLOADS + "/{identity}/content")
    async def content(identity: str) -> Response:
        return FileResponse(store.data(identity), media_type="application/octet-stream")

    @app.delete(UPLOADS + "/{identity}")
    async def remove(identity: str) -> Response:
        store.remove(identity)
        return reply({"id": identity, "object": "file", "deleted": True})


def _add_batch_routes(app: FastAPI, runner: BatchRunner) -> None:
    schema = {"requestBody": {"content": {"application/json": {"schema": BatchBody.model_json_schema()}}}}

    @app.post("/v1/batches", openapi_extra=schema)
    async def create(http: HttpRequest) -> Response:
        body = parse(BatchBody, await read_json(http), name="")
        return reply(
            runner.add(
                input_file_id=body.input_file_id,
                endpoint=body.endpoint,
                window=body.completion_window,
                metadata=body.metadata,
            )
        )

    @app.get("/v1/batches")
    async def batches(http: HttpRequest) -> Response:
        return reply(_page(runner.all(), http))

    @app.get("/v1/batches/{identity}")
    async def batch(identity: str) -> Response:
        return reply(runner.get(identity))

    @app.post("/v1/batches/{identity}/cancel")
    async def cancel(identity: str) -> Response:
        return reply(runner.cancel(identity))


def _page(objects: list[Json], http: HttpRequest) -> dict[str, Any]:
    """Those after `after`, at most `limit` of them."""
    asked = http.query_params
    try:
        limit = int(asked.get("limit", _MOST_LISTED))
    except ValueError:
        limit = 0
    if not 1 <= limit <= _MOST_LISTED:
        raise Refused(400, f"limit must be from 1 to {_MOST_LISTED:,}.", param="limit")
    if after := asked.get("after"):
        places = [place for place, each in enumerate(objects) if each["id"] == after]
        objects = objects[places[0] + 1 :] if places else []
    page = objects[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
    return {"object": "list", "data": page, "has_more": len(objects) > limit, **ends}
