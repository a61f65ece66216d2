"""GET /progress for the operator, /metrics for Prometheus, /healthz for probes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tunewright_api.run_report import Progress

REQUEST_SECONDS = 5


class ProgressServer:
    """A server in a thread of its own. Nothing it serves is secret, and it takes no input."""

    def __init__(self, port: int, progress: Callable[[], Progress]) -> None:
        """Listen on all addresses, IPv6 included where the machine has it; port 0 takes a free one."""
        registry = CollectorRegistry()
        registry.register(_Metrics(progress))

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_SECONDS

            def do_GET(self) -> None:
                if self.path == "/progress":
                    self._answer("application/json", progress().model_dump_json(by_alias=True, exclude_none=True))
                elif self.path == "/metrics":
                    self._answer("text/plain; version=0.0.4; charset=utf-8", generate_latest(registry).decode())
                elif self.path == "/healthz":
                    self._answer("text/plain", "ok\n")
                else:
                    self.send_error(404)

            def _answer(self, content_type: str, text: str) -> None:
                body = text.encode()
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Keep requests out of the run's log."""

        self._server = ThreadingHTTPServer(("", port), Handler, bind_and_activate=False)
        self._server.socket.close()
        if socket.has_dualstack_ipv6():
            self._server.socket = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self._server.socket = socket.create_server(("", port))
        self.port: int = self._server.socket.getsockname()[1]
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Metrics(Collector):
    """Makes gauges of the progress at the moment of a scrape."""

    def __init__(self, progress: Callable[[], Progress]) -> None:
        self._progress = progress

    def collect(self) -> Iterator[Metric]:
        state = self._progress()
        values = {
            "step": ("Optimizer steps done.", state.step),
            "total_steps": ("Optimizer steps of the whole run.", state.total_steps),
            "stage_percent": ("Share of the current stage or of the steps, 0 to 100.", state.percent),
            "epoch": ("Passes over the training rows.", state.epoch),
            "loss": ("Training loss of the last logged step.", state.loss),
            "eval_loss": ("Loss on the validation rows, last evaluation.", state.eval_loss),
            "learning_rate": ("Current learning rate.", state.learning_rate),
            "tokens_per_second": ("Training speed.", state.tokens_per_second),
            "eta_seconds": ("Estimated time to the last step.", state.eta_seconds),
        }
        for name, (text, value) in values.items():
            if value is not None:
                yield GaugeMetricFamily(f"tunewright_trainer_{name}", text, value=float(value))
        stage = GaugeMetricFamily("tunewright_trainer_stage", "1 for the stage the run is in.", labels=["stage"])
        stage.add_metric([state.stage], 1)
        yield stage
