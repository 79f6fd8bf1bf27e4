"""A headless Chromium that opens a page from the disk, spoken to over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Seen:
    complaints: list[str]  # of the console, and exceptions
    requests: list[str]  # addresses that the page asked for
    answer: Any  # of the script
    screenshot: bytes  # PNG


def look_at(page: Path, script: str) -> Seen:
    """Open the page, run a script in it that returns a value, and take a picture of all of it."""
    return asyncio.run(asyncio.wait_for(_look_at(page, script), 60))


async def _look_at(page: Path, script: str) -> Seen:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--window-size=1280,900", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
        try:
            assert process.stderr is not None
            told = next(line for line in process.stderr if "DevTools listening on" in line)
            port = told.rpartition(":")[2].partition("/")[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    address = next(t for t in await answer.json() if t["type"] == "page")["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    return await _visit(socket, page, script)
        finally:
            process.kill()
            process.wait()


async def _visit(socket: aiohttp.ClientWebSocketResponse, page: Path, script: str) -> Seen:
    complaints: list[str] = []
    requests: list[str] = []
    number = 0

    async def ask(method: str, until: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer, once it is there and the event `until` has come."""
        nonlocal number
        number += 1
        await socket.send_json({"id": number, "method": method, "params": params})
        result: dict[str, Any] | None = None
        while result is None or until:
            told = json.loads((await socket.receive()).data)
            if told.get("id") == number:
                result = told["result"]
            method, event = told.get("method"), told.get("params", {})
            if method == until:
                until = None
            if method == "Runtime.exceptionThrown":
                complaints.append(str(event["exceptionDetails"]["text"]))
            elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
                complaints.append(event["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
                complaints.append(str(event["args"]))
            elif method == "Network.requestWillBeSent":
                requests.append(event["request"]["url"])
        return result

    for domain in ("Page", "Runtime", "Log", "Network"):
        await ask(f"{domain}.enable")
    await ask("Page.navigate", until="Page.loadEventFired", url=page.as_uri())
    answer = await ask("Runtime.evaluate", expression=script, returnByValue=True)
    picture = await ask("Page.captureScreenshot", captureBeyondViewport=True)
    return Seen(complaints, requests, answer["result"].get("value"), base64.b64decode(picture["data"]))
