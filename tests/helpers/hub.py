"""A Hub on loopback: the part of the HTTP API that uploading and reloading a model uses, with
everything in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png")


class LocalHub:
    """`with LocalHub() as hub:` serves `hub.url`; `hub.repos` maps repository → path → content."""

    def __init__(self, user: str = "user", token: str = "hf_secret") -> None:
        self.user, self.token = user, token
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}  # repository → messages
        self.large: dict[str, bytes] = {}  # sha256 → content
        self.calls: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LocalHub:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sha(self, repo: str) -> str:
        """Return the commit that a repository stands at."""
        return hashlib.sha1(json.dumps([repo, self.commits[repo]]).encode()).hexdigest()

    # Every answer is (status, JSON or bytes, headers).

    def create(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        given = json.loads(body)
        name = f"{given.get('organization') or self.user}/{given['name']}"
        known = name in self.repos
        self.repos.setdefault(name, {})
        self.commits.setdefault(name, ["initial commit"])
        return 409 if known else 200, {"url": f"{self.url}/{name}", "name": name}, {}

    def preupload(self, repo: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}, {}

    def batch(self, repo: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        objects = [
            {
                **wanted,
                "actions": {
                    name: {"href": f"{self.url}/large/{name}/{wanted['oid']}"}
                    for name in ("upload", "verify")
                },
            }
            for wanted in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}, {}

    def commit(self, repo: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        message, files = "", self.repos[repo]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                return 400, {"error": f"unknown operation {entry['key']}"}, {}
        self.commits[repo].append(message)
        return (
            200,
            {
                "commitUrl": f"{self.url}/{repo}/commit/{self.sha(repo)}",
                "commitOid": self.sha(repo),
            },
            {},
        )

    def info(self, repo: str) -> tuple[int, Any, dict[str, str]]:
        siblings = [{"rfilename": path} for path in self.repos[repo]]
        return (
            200,
            {"id": repo, "sha": self.sha(repo), "siblings": siblings, "tags": [], "private": False},
            {},
        )

    def tree(self, repo: str) -> tuple[int, Any, dict[str, str]]:
        files = self.repos[repo].items()
        return (
            200,
            [
                {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
                for path, data in files
            ],
            {},
        )

    def resolve(self, repo: str, path: str) -> tuple[int, Any, dict[str, str]]:
        content = self.repos[repo].get(path)
        if content is None:
            return (
                404,
                {"error": f"no {path}"},
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.sha(repo)},
            )
        return 200, content, {"X-Repo-Commit": self.sha(repo), "ETag": f'"{_oid(content)}"'}

    def answer(
        self, method: str, path: str, body: bytes, token: str | None
    ) -> tuple[int, Any, dict[str, str]]:
        """Find who answers a request; writing needs the token."""
        self.calls.append((method, path))
        if (
            method in ("POST", "PUT")
            and not path.startswith("/large/")
            and token != f"Bearer {self.token}"
        ):
            return 401, {"error": "wrong token"}, {}
        if method == "PUT" and (match := re.fullmatch("/large/upload/(.+)", path)):
            self.large[match[1]] = body
            return 200 if hashlib.sha256(body).hexdigest() == match[1] else 400, {}, {}
        if match := re.fullmatch("/large/verify/(.+)", path):
            return 200 if len(self.large[match[1]]) == json.loads(body)["size"] else 400, {}, {}
        routes: list[tuple[str, str, Any]] = [
            ("POST", "/api/repos/create", lambda: self.create(body)),
            ("POST", "/api/validate-yaml", lambda: (200, {"errors": [], "warnings": []}, {})),
            ("POST", "/api/models/(.+)/preupload/[^/]+", lambda repo: self.preupload(repo, body)),
            ("POST", "/(.+).git/info/lfs/objects/batch", lambda repo: self.batch(repo, body)),
            ("POST", "/api/models/(.+)/commit/[^/]+", lambda repo: self.commit(repo, body)),
            ("GET", "/api/models/(.+)/revision/[^/]+", self.info),
            ("GET", "/api/models/(.+)/tree/.+", self.tree),
            ("GET", "/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.resolve),
            ("HEAD", "/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.resolve),
            ("GET", "/api/models/([^/]+/[^/]+)", self.info),
        ]
        for wanted, pattern, reply in routes:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                if match.groups() and match[1] not in self.repos:
                    return (
                        404,
                        {"error": f"no repository {match[1]}"},
                        {"X-Error-Code": "RepoNotFound"},
                    )
                return reply(*match.groups())
        return 501, {"error": f"this Hub does not know {method} {path}"}, {}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        status, answer, headers = self.hub.answer(
            self.command, path, body, self.headers.get("Authorization")
        )
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""
