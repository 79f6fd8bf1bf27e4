"""As much of a W&B server as wandb needs to log in, make a run, resume it and stream its history."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any


@dataclass
class ServedRun:
    fields: dict[str, Any] = field(default_factory=dict)  # of the mutations, as last sent
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    preempting: bool = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was logged, without what wandb adds."""
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in self.history]


class WandbServer:
    """Context manager. Requests wait while `answers` is not set; history is refused where `refuses`; every body that
    came is in `received`."""

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.received = b""
        self.refuses = False
        self.answers = Event()
        self.answers.set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.answers.wait()
                server.received += body
                refused = server.refuses and self.path.endswith("/file_stream")
                answer = b"{}" if refused else json.dumps(server.answer(self.path, body)).encode()
                self.send_response(403 if refused else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_POST

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that was killed
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> WandbServer:
        Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.answers.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            run = self.runs[path.split("/")[-2]]
            stream = json.loads(body)
            history = stream.get("files", {}).get("wandb-history.jsonl", {"offset": len(run.history), "content": []})
            assert history["offset"] == len(run.history)
            run.history += map(json.loads, history["content"])
            run.exit_code = stream.get("exitcode", run.exit_code)
            run.preempting = stream.get("preempting", run.preempting)
            return {}
        if path != "/graphql":  # telemetry, and files that nobody reads
            return {}
        query = json.loads(body)
        given = query.get("variables", {})
        return {"data": getattr(self, query["operationName"], lambda _: {})(given)}

    def Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "me", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(given["name"], ServedRun())
        run.fields |= {k: v for k, v in given.items() if v is not None}
        run.config = {k: v["value"] for k, v in json.loads(given["config"] or "{}").items()} or run.config
        return {"upsertBucket": {"inserted": not run.history, "bucket": self._bucket(given["name"])}}

    def RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["name"] not in self.runs:
            return {"model": None}
        return {"model": {"id": "p", "name": "p", "entity": _ME, "bucket": self._bucket(given["name"])}}

    def CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        return {
            **{"id": name, "name": name, "displayName": name, "description": "", "sweepName": None, "notes": ""},
            **{"config": json.dumps({k: {"value": v} for k, v in run.config.items()}), "tags": [], "logLineCount": 0},
            **{
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "eventsTail": "[]",
                "wandbConfig": '{"t": 1}',
            },
            **{"historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "summaryMetrics": "{}"},
            "project": {"id": "p", "name": run.fields["project"], "entity": _ME},
        }


_ME = {"id": "me", "name": "me"}
