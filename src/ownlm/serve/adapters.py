"""Adapters loaded and unloaded while the server runs, by the requests that vLLM takes for it. For administrators."""

import asyncio

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ownlm import hub
from ownlm.artifact import Workspace
from ownlm.errors import NotFound
from ownlm.serve.service import Exchange, read_body
from ownlm.serve.wire import BadRequest, LoadAdapter, UnloadAdapter, parse


class Loading:
    """One adapter at a time is read, in a thread of its own, while others write."""

    def __init__(self, workspace: Workspace | None) -> None:
        self.workspace, self.turn = workspace, asyncio.Lock()

    async def load(self, exchange: Exchange, request: Request) -> Response:
        """POST /v1/load_lora_adapter"""
        wire = parse(LoadAdapter, await read_body(request))
        if hub.parse(wire.lora_path) is not None:
            raise BadRequest("An adapter of a hub is not downloaded for a request.", param="lora_path")
        load = exchange.service.model.adapters.load
        async with self.turn:
            try:
                await asyncio.to_thread(
                    load, wire.lora_name, wire.lora_path, workspace=self.workspace, replace=wire.load_inplace
                )
            except NotFound as fault:
                raise BadRequest(str(fault), param="lora_path", status=404, code="adapter_not_found") from None
        return PlainTextResponse(f"Success: LoRA adapter '{wire.lora_name}' added successfully.")

    async def unload(self, exchange: Exchange, request: Request) -> Response:
        """POST /v1/unload_lora_adapter: its name is free at once; answers under way with it go on to their end."""
        wire = parse(UnloadAdapter, await read_body(request))
        try:
            exchange.service.model.adapters.unload(wire.lora_name)
        except NotFound as fault:
            raise BadRequest(str(fault), param="lora_name", status=404, code="adapter_not_found") from None
        return PlainTextResponse(f"Success: LoRA adapter '{wire.lora_name}' removed successfully.")
