"""`uld-serve serve`: settings, model and profiles into a listening server. Called by cli; everything that can be
wrong is refused here, before the address answers."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from uld_serve.assembly import Assembly, assemble
from uld_serve.config import EngineConfig
from uld_serve.engine.ranks import Ranks
from uld_serve.server import logs
from uld_serve.server.catalog import Catalog
from uld_serve.server.fine_tuning.premises import Premises
from uld_serve.server.key_sources import safe_keys
from uld_serve.server.listener import Listener, bound_socket
from uld_serve.server.reload import Reloader
from uld_serve.server.serving import Serving, catalog_from, telemetry_of
from uld_serve.server.settings import ServerSettings, check_profiles_exist, checked_settings, read_settings
from uld_serve.server.sharing import Sharing
from uld_serve.server.telemetry import Telemetry

ENGINE_SIZES = {
    "max_model_len": ("TOKENS", "longest prompt and answer together"),
    "max_num_seqs": ("N", "most requests that run at once"),
    "kv_cache_bytes": (
        "BYTES",
        "keys and values of all requests (CPU: 1 GiB; GPU: eight tenths of what samplers leave free)",
    ),
    "own_kv_bytes": (
        "BYTES",
        "each cache of assistants that keep their own (default: room for as many tokens as kv_cache_bytes)",
    ),
    "adapter_bytes": (
        "BYTES",
        "adapters kept in memory; others are read when asked for (CPU: 2 GiB; GPU: a tenth)",
    ),
    "sampler_bytes": (
        "BYTES",
        "room that samplers of recorded steps share, GPU only (default: for the most requests, two profiles each)",
    ),
}
OVERRIDES = (
    "model",
    "profiles",
    "host",
    "port",
    "dtype",
    "device",
    "tensor_parallel",
    *ENGINE_SIZES,
    "audit_log",
    "playground",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("serve", help="serve the OpenAI-compatible API", description=__doc__)
    parser.add_argument(
        "--model", metavar="ID_OR_PATH", help="Hugging Face id or directory (default: the embedded one)"
    )
    parser.add_argument(
        "--profiles",
        type=Path,
        action="append",
        metavar="DIR",
        help="a profile, or a directory of profiles; may be repeated (default: the built-in ones)",
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1; others need a key)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="share the model between N processes, one a device (default: 1, or as many as torchrun has started)",
    )
    for name, (unit, what) in ENGINE_SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar=unit, help=what)
    parser.add_argument(
        "--config", type=Path, metavar="server.toml", help="settings and keys; options above win"
    )
    parser.add_argument(
        "--audit-log", type=Path, metavar="FILE", help="append JSON lines on who asked for what"
    )
    parser.add_argument(
        "--playground", action=argparse.BooleanOptionalAction, help="the page at / (default: it is there)"
    )
    parser.add_argument(
        "--admin-port", type=int, metavar="PORT", help="the operators' listener, on 127.0.0.1"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; 0 after a clean stop, 1 if a process that shared the model was lost.

    Raises UldError when it cannot start."""
    early = EarlyHangup()
    with ExitStack() as bound:
        if args.config is not None:  # from before it is read: what changes from now on must not be missed
            bound.enter_context(early.noted())
        settings = settings_of(args)
        logs.configure(settings.log)
        sharing = Sharing.of(settings, os.environ)
        if sharing.follows:
            return sharing.follow()
        keys = safe_keys(settings)
        telemetry = telemetry_of(settings)
        console = Console(stderr=True, highlight=False)
        sock = bound.enter_context(bound_socket(settings.host, settings.port))
        admin_sock = None
        if settings.admin.port is not None:
            admin_sock = bound.enter_context(bound_socket(settings.admin.host, settings.admin.port))
        premises = None if settings.fine_tuning is None else Premises.open(settings.fine_tuning)
        if premises is not None:
            bound.callback(premises.close)
        ranks = bound.enter_context(sharing.led())
        with console.status("loading the model and its profiles"):
            assembly = _assemble(settings, [] if premises is None else premises.live, ranks)
            check_profiles_exist(settings.keys, assembly.registry)
        catalog = catalog_from(assembly, settings, keys)
        serving = Serving(
            assembly=assembly,
            settings=settings,
            catalog=catalog,
            telemetry=telemetry,
            admin_sock=admin_sock,
            premises=premises,
            reloader=_reloader(args, settings, telemetry),
        )
        addresses = {"ready": _url(settings.host, sock) + "/v1"}
        if admin_sock is not None:
            addresses["admin"] = _url(settings.admin.host, admin_sock)
        memory = memory_plan(assembly.engine.config)

        def on_ready() -> None:
            _print_banner(console, catalog, addresses, memory=memory, is_open=keys.is_open)
            early.send_again()

        _serve(serving.listener(on_ready=on_ready), sock)
        return 1 if sharing.is_lost else 0


class EarlyHangup:
    """A SIGHUP that comes while the model loads, which would otherwise end the process."""

    def __init__(self) -> None:
        self._has_come = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """The main thread's, until a listener takes the signal over."""
        before = signal.signal(signal.SIGHUP, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, before)

    def send_again(self) -> None:
        """To whoever takes it now."""
        if self._has_come:
            signal.raise_signal(signal.SIGHUP)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._has_come = True


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """The file's settings with the command line's on top."""
    settings = read_settings(args.config) if args.config is not None else ServerSettings()
    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    if args.admin_port is not None:
        given["admin"] = settings.admin.model_dump(exclude_unset=True) | {"port": args.admin_port}
    return checked_settings(settings.model_dump(exclude_unset=True) | given, source="command line")


def _assemble(settings: ServerSettings, made: Sequence[Path], ranks: Ranks | None) -> Assembly:
    return assemble(
        settings.model,
        profiles=settings.profiles,
        more_profiles=made,
        dtype=settings.dtype,
        device=settings.device,
        settings=settings.engine,
        ranks=ranks,
    )


def _reloader(args: argparse.Namespace, settings: ServerSettings, telemetry: Telemetry) -> Reloader | None:
    """None without a file: then SIGHUP ends the server, as it does when its terminal is closed."""
    if args.config is None:
        return None
    return Reloader(settings, read=lambda: settings_of(args), ring=safe_keys, audit=telemetry.audit)


def _serve(listener: Listener, sock: socket.socket) -> None:
    # uvicorn raises the signal again once it has stopped; ours make that a clean exit.
    before = {number: signal.signal(number, _already_stopped) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        listener.run(sockets=[sock])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _already_stopped(_number: int, _frame: FrameType | None) -> None:
    return None


def _url(host: str, sock: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


def memory_plan(config: EngineConfig) -> str:
    """What was set aside at start, in words."""
    parts = {
        "keys and values": config.kv_cache_bytes,
        "adapters, at most": config.adapter_bytes,
        "samplers of recorded steps": config.sampler_bytes,
    }
    return ", ".join(f"{what} {num_bytes / 2**30:.2f} GiB" for what, num_bytes in parts.items() if num_bytes)


def _print_banner(
    console: Console, catalog: Catalog, addresses: Mapping[str, str], *, memory: str, is_open: bool
) -> None:
    table = Table(box=None, show_header=False)
    table.add_row("model", catalog.model)
    for version in catalog.registry:
        unchecked = "" if version.probes.replay else "  (has no replay probes: not checked on this base)"
        table.add_row("profile", version.ref + unchecked)
    if not catalog.registry.names():
        table.add_row("profile", "none was found: every request is answered by the base alone")
    table.add_row(
        "keys", "none: everything is allowed from this machine" if is_open else str(len(catalog.keys))
    )
    table.add_row("memory", memory)
    for name, url in addresses.items():
        table.add_row(name, url)
    console.print(table)
