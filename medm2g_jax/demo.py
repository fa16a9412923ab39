"""`medm2g demo`: the web page of a model, any to any, on this machine alone.

    medm2g demo                       # the model in the box
    medm2g demo --model RUN --port 7861 --no-browser

It listens on 127.0.0.1 and nowhere else, takes the model from the command line alone, loads nothing from outside (fonts
are the system's, a policy in every answer forbids the rest), shares no link, counts nobody and logs nothing that is
typed or dropped. Files that are dropped or made lie in a folder that goes when the page's process ends. What happens
between a request and its result is in `demo_desk`, what is shown in `demo_view`, and how they meet in `demo_page`.
"""

import functools
import importlib.util
import logging
import os
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable
from typing import Any

from medm2g_jax.data.marks import NOTE
from medm2g_jax.demo_desk import Desk, able
from medm2g_jax.errors import UserError
from medm2g_jax.loading import in_the_box, load

HOST = "127.0.0.1"
MOST_UPLOAD = "300mb"  # a file
EXTRA = f"{sys.executable} -m pip install 'medm2g_jax[demo]'"  # of this environment, whichever the shell is in
# Nothing but what this very server gives; gradio's page needs inline scripts.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'; object-src 'none'"
)
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
# gradio asks these when it is imported or launched.
ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def run(model: str | None, port: int | None = None, browser: bool = True) -> None:
    """Serve the page until it is interrupted.

    Args:
      model: as `load` takes it; None for the model in the box.
      port: None for the first free one from 7860.
      browser: open it, where there is one.

    Raises:
      UserError: gradio is not installed, no such model, or the port is taken.
    """
    start = time.monotonic()
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"medm2g demo needs gradio, which is not installed here: {EXTRA}")
    path = model or _boxed()
    abilities = able(path)
    with tempfile.TemporaryDirectory(prefix="medm2g-demo-") as folder:
        desk = Desk(abilities, functools.partial(load, path), folder)  # loads while gradio is imported
        server = serve(desk, port)
        print(f"{server.local_url} ({time.monotonic() - start:.1f} s); Ctrl-C ends it", flush=True)
        print(NOTE, flush=True)
        if browser and _has_screen():
            webbrowser.open(server.local_url)
        try:
            server.block_thread()
        except KeyboardInterrupt:
            server.close(verbose=False)


def _boxed() -> str:
    if not (names := in_the_box()):
        raise UserError("no model in the box of this version: name one, medm2g demo --model RUN")
    return names[0]


def _has_screen() -> bool:
    shown = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(shown or os.environ.get("BROWSER"))


def serve(desk: Desk, port: int | None = None) -> Any:
    """Start serving the page of a desk in a thread; returns it, as gradio's Blocks.

    Raises:
      UserError: the port is taken.
    """
    os.environ.update(ENVIRONMENT, GRADIO_TEMP_DIR=desk.folder)
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from medm2g_jax.demo_page import looks, page

    blocks = page(desk)
    for name in ("uvicorn", "httpx", "gradio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Another site's page that has its name resolve to this machine is not answered.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    try:
        blocks.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            max_file_size=MOST_UPLOAD,
            state_session_capacity=32,
            app_kwargs=dict(middleware=[hosts, Middleware(_Headers)], openapi_url=None, docs_url=None, redoc_url=None),
            **looks(),
        )
    except OSError as error:
        if port is None:
            raise
        raise UserError(f"--port {port}: cannot be had ({error}); name another") from error
    return blocks


class _Headers:
    """HEADERS on every answer."""

    def __init__(self, app: Callable):
        self._app = app

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self._app(scope, receive, with_headers)
