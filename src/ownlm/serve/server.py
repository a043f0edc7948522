"""Serving until told to stop: the address is taken first, then the model loaded, then uvicorn runs."""

import errno
import ipaddress
import socket
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from pathlib import Path

import uvicorn

from ownlm import device
from ownlm.artifact import Workspace
from ownlm.catalog import Catalog
from ownlm.errors import Busy, UserError
from ownlm.generate.model import Model
from ownlm.generate.opening import load_decoder
from ownlm.kernels.native import KV
from ownlm.report import Reporter
from ownlm.serve.app import MAX_WAITING, SLOTS, create_app
from ownlm.serve.guard import MAX_HEADER_BYTES, Keys
from ownlm.serve.worker import Worker

SHUTDOWN_S = 10  # open streams may finish; then they are cut


def serve(
    ref: str | Path | Model,
    *,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    draft: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Collection[str] = (),
    admin_keys: Collection[str] = (),
    allowed_hosts: Collection[str] = (),
    allowed_origins: Collection[str] = (),
    workspace: Workspace | None = None,
    reporter: Reporter | None = None,
    slots: int = SLOTS,
    kv: KV | None = None,
    max_waiting: int = MAX_WAITING,
    record_text: bool = False,
    ready: Callable[[uvicorn.Server, str], None] | None = None,
    tensor_parallel: int = 1,
) -> None:
    """Serve a model over HTTP until Ctrl-C or SIGTERM.

    adapter     merged into a model that is named, as in `load`
    adapters    by name, to be asked for as models beside it; more may come and go over HTTP
    admin_keys  who may load and unload adapters, see `create_app`
    draft, tensor_parallel  for a model that is named, as in `load`
    kv          how keys and values are kept, as `Model` has it; None: as the model is set
    ready       called with the running server and its address once it answers; `server.should_exit = True` ends it
    Raises Busy when the port is taken, UserError beyond loopback without API keys, what `load` raises, and RankLost when a process of
    a split model ends.
    """
    reporter = reporter or Reporter.silent()
    Keys(api_keys), Keys(admin_keys)
    if not api_keys and not is_loopback(host):
        raise UserError(
            f"{host} can be reached from other machines, and there is no API key.",
            where="serve",
            cure="Set OWNLM_API_KEYS (or api_keys=), or stay on 127.0.0.1.",
        )
    with closing(listen(host, port)) as listener:
        workspace = workspace or Workspace(device.home(), reporter)
        model = ref
        if not isinstance(model, Model):
            model = load_decoder(
                model, adapter=adapter, draft=draft, workspace=workspace, tensor_parallel=tensor_parallel
            )
        for name, one in (adapters or {}).items():
            model.adapters.load(name, one, workspace=workspace)
        model.kv = kv or model.kv
        with closing(Catalog(workspace.root)) as catalog:
            app = create_app(
                model,
                api_keys=api_keys,
                admin_keys=admin_keys,
                allowed_hosts=allowed_hosts,
                allowed_origins=allowed_origins,
                slots=slots,
                max_waiting=max_waiting,
                record=catalog.record_requests,
                record_text=record_text,
                workspace=workspace,
            )
            config = uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
            address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            server = Announcing(config, lambda: announce(server, address, model, reporter, ready))
            worker: Worker = app.state.service.worker
            worker.on_lost = server.leave
            # uvicorn ends in order on Ctrl-C and then raises it again, for which there is no use here.
            with suppress(KeyboardInterrupt):
                server.run(sockets=[listener])
            if worker.lost is not None:
                raise worker.lost
    reporter.line("Stopped.")


class Announcing(uvicorn.Server):
    """A server that says when it answers."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_started = started

    def leave(self) -> None:
        """End in order. From any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self.on_started()


def announce(
    server: uvicorn.Server,
    address: str,
    model: Model,
    reporter: Reporter,
    ready: Callable[[uvicorn.Server, str], None] | None,
) -> None:
    """Tell people and programs where the server is."""
    reporter.line(f"{model.ref} answers at {address}  (chat page; Ctrl-C stops)")
    reporter.line(f"  OpenAI     base_url={address}/v1  model={model.name}")
    reporter.line(f"  Replicate  REPLICATE_BASE_URL={address}  model=ownlm/{model.name}")
    for one in model.loaded_adapters:
        reporter.line(f"  adapter    model={one.name}  ({one.ref})")
    reporter.event(
        "serving", address=address, model=model.ref, adapters={one.name: one.ref for one in model.loaded_adapters}
    )
    if ready is not None:
        ready(server, address)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises Busy when the port is taken, UserError for an address that can't be used."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (socket.gaierror, OverflowError) as fault:
        raise UserError(f"{host}:{port} is no address to listen on ({fault}).", where="serve") from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as fault:
        listener.close()
        if fault.errno == errno.EADDRINUSE:
            raise Busy(
                f"port {port} on {host} is in use.",
                where="serve",
                cure=f"Stop what runs there, or take --port {port + 1}.",
            ) from None
        raise UserError(f"can't listen on {host}:{port} ({fault.strerror}).", where="serve") from None
    except OverflowError:
        listener.close()
        raise UserError(f"{port} is no port.", where="serve", cure="Ports go from 0 to 65535.") from None
    return listener


def is_loopback(host: str) -> bool:
    """True for localhost and addresses that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
