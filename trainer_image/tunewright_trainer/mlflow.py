"""Logs a run to an MLflow server through its REST API: four calls, so that the image needs none of MLflow's packages.

All of it happens on a thread of its own. A server that is slow, down or refuses leaves a line in the log and nothing
else: metrics.jsonl has every number.
"""

from __future__ import annotations

import base64
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

Outcome = Literal["FINISHED", "FAILED"]
REQUEST_SECONDS = 5.0
SEND_SECONDS = 2.0
CLOSE_SECONDS = 10.0
"""Longest time that the end of a run waits for the server."""
MAX_WAIT_SECONDS = 60.0
MAX_PENDING = 100_000
"""Numbers kept for a server that does not answer; the oldest go first."""
MAX_METRICS = 1000
MAX_PARAMS = 100
MAX_PARAM_CHARACTERS = 500
_MAX_ANSWER_BYTES = 1 << 20
_API = "/api/2.0/mlflow/"


class MLflowError(Exception):
    """The server did not do what it was asked; `final`: it would refuse again."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        # 429 and server errors pass, and so does no answer at all.
        self.final = status is not None and 400 <= status < 500 and status != HTTPStatus.TOO_MANY_REQUESTS


@dataclass(frozen=True)
class Number:
    """One value of a metric."""

    key: str
    value: float
    step: int
    milliseconds: int

    def document(self) -> dict[str, Any]:
        """Return the metric as the API takes it."""
        return {"key": self.key, "value": self.value, "step": self.step, "timestamp": self.milliseconds}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the credentials elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class MLflowClient:
    """The calls of the REST API that a run needs."""

    def __init__(self, uri: str, environment: Mapping[str, str]) -> None:
        """Take the server's URL, and credentials from the variables that MLflow's own client reads."""
        self._base = uri.rstrip("/") + _API
        self._headers = {"Content-Type": "application/json"}
        user, token = environment.get("MLFLOW_TRACKING_USERNAME"), environment.get("MLFLOW_TRACKING_TOKEN")
        if user:
            pair = f"{user}:{environment.get('MLFLOW_TRACKING_PASSWORD', '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        elif token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def experiment(self, name: str) -> str:
        """Return the id of an experiment, made where it is missing."""
        query = "experiments/get-by-name?" + urllib.parse.urlencode({"experiment_name": name})
        try:
            return str(self._call(query)["experiment"]["experiment_id"])
        except MLflowError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
        try:
            return str(self._call("experiments/create", {"name": name})["experiment_id"])
        except MLflowError as error:
            if error.status != HTTPStatus.BAD_REQUEST:
                raise
            # Another run has made it meanwhile.
            return str(self._call(query)["experiment"]["experiment_id"])

    def create_run(self, experiment_id: str, name: str, tags: Mapping[str, str], milliseconds: int) -> str:
        """Begin a run and return its id."""
        listed = [{"key": key, "value": value} for key, value in tags.items()]
        body = {"experiment_id": experiment_id, "run_name": name, "start_time": milliseconds, "tags": listed}
        return str(self._call("runs/create", body)["run"]["info"]["run_id"])

    def log_parameters(self, run_id: str, parameters: Mapping[str, str]) -> None:
        """Log what the run was asked to do."""
        listed = [{"key": k, "value": v[:MAX_PARAM_CHARACTERS]} for k, v in parameters.items()]
        for start in range(0, len(listed), MAX_PARAMS):
            self._call("runs/log-batch", {"run_id": run_id, "params": listed[start : start + MAX_PARAMS]})

    def log_numbers(self, run_id: str, numbers: list[Number]) -> None:
        """Log at most `MAX_METRICS` numbers."""
        self._call("runs/log-batch", {"run_id": run_id, "metrics": [number.document() for number in numbers]})

    def end_run(self, run_id: str, outcome: Outcome, milliseconds: int) -> None:
        """Say how the run ended."""
        self._call("runs/update", {"run_id": run_id, "status": outcome, "end_time": milliseconds})

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        # http and https only: the spec's pattern lets nothing else pass.
        request = urllib.request.Request(self._base + path, data, self._headers)  # noqa: S310
        try:
            with self._opener.open(request, timeout=REQUEST_SECONDS) as answer:
                return json.loads(answer.read(_MAX_ANSWER_BYTES) or b"{}")
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(500).decode(errors="replace")
            raise MLflowError(f"answers {error.code}: {text}", error.code) from None
        except (OSError, ValueError, KeyError) as error:
            raise MLflowError(f"{type(error).__name__}: {error}") from None


class MLflowLog:
    """A run's numbers on their way to the server."""

    def __init__(
        self,
        client: MLflowClient,
        *,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        parameters: Mapping[str, str],
        say: Callable[[str], None],
    ) -> None:
        """Start the thread; nothing here waits for the server."""
        self._client = client
        self._experiment = experiment
        self._name = name
        self._tags = tags
        self._parameters = parameters
        self._say = say
        self._pending: deque[Number] = deque(maxlen=MAX_PENDING)
        self._outcome: Outcome | None = None
        self._wake = threading.Event()
        self._voice = threading.Lock()
        self._silent = False
        self._run_id: str | None = None
        self._started = _milliseconds()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take numbers; returns at once."""
        moment = _milliseconds()
        self._pending.extend(Number(key, value, step, moment) for key, value in numbers.items())

    def close(self, outcome: Outcome) -> None:
        """Send what is left and how the run ended, for at most `CLOSE_SECONDS`."""
        self._outcome = outcome
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if self._pending:
            self._tell(f"did not take the last {len(self._pending)} numbers: metrics.jsonl has them")
        with self._voice:
            # A thread that still waits for an answer outlives the log.
            self._silent = True

    def _tell(self, text: str) -> None:
        with self._voice:
            if not self._silent:
                self._say(f"MLflow {text}")

    def _work(self) -> None:
        wait = SEND_SECONDS
        while True:
            closing = self._outcome is not None
            try:
                self._send()
                if closing and self._run_id is not None and self._outcome is not None:
                    self._client.end_run(self._run_id, self._outcome, _milliseconds())
                wait = SEND_SECONDS
            except MLflowError as error:
                if wait == SEND_SECONDS or error.final:
                    self._tell(f"{error} ({'not tried again' if error.final else 'tried again'})")
                if error.final:
                    return
                wait = min(2 * wait, MAX_WAIT_SECONDS)
            if closing:
                return
            self._wake.wait(wait)

    def _send(self) -> None:
        if self._run_id is None:
            experiment_id = self._client.experiment(self._experiment)
            run_id = self._client.create_run(experiment_id, self._name, self._tags, self._started)
            self._client.log_parameters(run_id, self._parameters)
            self._run_id = run_id
            self._tell(f"has experiment {self._experiment}, run {run_id}")
        while self._pending:
            batch = [self._pending[index] for index in range(min(MAX_METRICS, len(self._pending)))]
            self._client.log_numbers(self._run_id, batch)
            for _ in batch:
                self._pending.popleft()


def _milliseconds() -> int:
    return int(time.time() * 1000)
