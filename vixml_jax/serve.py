"""Serves a trained run over HTTP: `vixml serve --workdir=runs/demo/vixml --port=8000`.

The start page at / takes a title and pictures and shows the labels. POST /predict takes JSON, with pictures
as base64, or multipart/form-data; requests that come together are computed together. /healthz says that it
lives, /metrics what it does (Prometheus). The flags below set the limits.

It listens on this machine alone unless --host says otherwise, and then without encryption: put it behind a
proxy. With the environment variable VIXML_TOKEN, or --token_file, clients must send "Authorization: Bearer
TOKEN". The index, and labels added by `vixml index`, are those of the start: start again after changes. Needs
the extra `serve`: pip install 'vixml-jax[serve]'.

Examples:
  vixml serve --workdir=runs/demo/vixml
  curl -s localhost:8000/predict -H 'content-type: application/json' -d '{"title": "kettle", "k": 3}'
  curl -s localhost:8000/predict -F title=kettle -F image=@photo.jpg
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
from pathlib import Path

from absl import flags

from vixml_jax.errors import UserError
from vixml_jax.serving.limits import Limits
from vixml_jax.xmc_model import XmcModel

TOKEN = "VIXML_TOKEN"
PACKAGES = ("prometheus_client", "python_multipart", "starlette", "uvicorn")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Connections beyond these are refused at once.
CONNECTIONS = 2048


def define_flags() -> None:
    """Registers the command's flags."""
    limits = Limits()
    flags.DEFINE_string("workdir", None, "Directory of the run")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all of this machine")
    flags.DEFINE_integer(
        "port", 8000, "Port to listen on; 0 for a free one", lower_bound=0, upper_bound=65535
    )
    flags.DEFINE_string("token_file", None, f"File with the token of clients; else that in {TOKEN}, if any")
    flags.DEFINE_integer("max_body", limits.body_bytes, "Bytes of a request", lower_bound=1)
    flags.DEFINE_integer("max_pixels", limits.image_pixels, "Pixels of a picture", lower_bound=1)
    flags.DEFINE_integer("max_k", limits.k, "Labels that a request may ask for", lower_bound=1)
    flags.DEFINE_integer("max_batch", limits.batch, "Queries computed together", lower_bound=1)
    flags.DEFINE_integer("max_queue", limits.queue, "Queries that may wait", lower_bound=1)
    wait = 1e3 * limits.wait_seconds
    flags.DEFINE_float("max_wait_ms", wait, "Milliseconds an idle service waits for company", lower_bound=0)


def main() -> int:
    """Runs the command, until it is interrupted."""
    given = flags.FLAGS
    if not given.workdir:
        raise UserError("serve needs --workdir", fix="give the directory that `vixml train` filled")
    check_packages()
    limits = dataclasses.replace(
        Limits(),
        body_bytes=given.max_body,
        image_pixels=given.max_pixels,
        k=given.max_k,
        batch=given.max_batch,
        queue=given.max_queue,
        wait_seconds=given.max_wait_ms / 1e3,
    )
    token = read_token(given.token_file)
    with listen(given.host, given.port) as listening:
        serve(XmcModel.load(given.workdir), limits, token, listening, given.host)
    return 0


def serve(
    model: XmcModel, limits: Limits, token: str | None, listening: socket.socket, host: str = LOOPBACK[0]
) -> None:
    """Serves a run on a bound socket until the process is told to end."""
    import uvicorn

    from vixml_jax.serving.app import Service

    service = Service(model, limits, token)
    print("loading the index and compiling ...", flush=True)
    service.warm_up()
    port = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {model.name} at http://{shown}:{port} (Ctrl+C ends)", flush=True)
    if host not in LOOPBACK and token is None:
        print(f"anyone who reaches {host} can use it: set {TOKEN} or --token_file", flush=True)
    uvicorn.Server(
        uvicorn.Config(
            service.app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=10,
            ws="none",
            lifespan="on",
        )
    ).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Binds a socket.

    Raises:
      UserError: if the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except (OSError, UnicodeError) as error:  # no name of a host may be as long as that
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(
            f"cannot listen on {host}:{port} ({reason.lower()})",
            fix="give another --port or --host",
        ) from None


def read_token(file: str | None) -> str | None:
    """Returns the token of a file, else that of the environment, None for none."""
    token = os.environ.get(TOKEN)
    if file:
        if not Path(file).is_file():
            raise UserError("no such file", file=file, fix="give a file that holds the token")
        token = Path(file).read_text(encoding="utf-8", errors="replace")
    if token is None:
        return None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(
            "the token is empty or not plain text", file=file or TOKEN, fix="give letters, digits and signs"
        )
    return token


def check_packages() -> None:
    """Raises a UserError where the extra is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed", fix="pip install 'vixml-jax[serve]'")
