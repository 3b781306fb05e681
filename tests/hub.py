"""A stand-in of the Hugging Face hub on 127.0.0.1, as far as sending a model needs it: it keeps what it was sent."""
from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REFUSALS = {"expired": 401, "foreign": 403, "nobody": 404, "broken": 418}      # by the owner of a repository


class Hub(ThreadingHTTPServer):
    """repositories: name -> {"private", "branches": {name: {path: bytes}}, "commits"}; a context, in which it answers at `url`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.repositories, self.objects, self.requests = f"http://127.0.0.1:{self.server_port}", {}, {}, []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> dict:
        repository = {"private": private, "branches": {"main": {".gitattributes": b"*.safetensors filter=lfs\n", **files}}, "commits": []}
        return self.repositories.setdefault(name, repository)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words): pass

    def answer(self, content, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self): self.handle_request()
    def do_POST(self): self.handle_request()
    def do_PUT(self): self.handle_request()

    def handle_request(self) -> None:
        hub, body, path = self.server, self.body(), urlsplit(self.path).path
        hub.requests.append((self.command, self.path, dict(self.headers), body))
        words = [unquote(word) for word in path.strip("/").split("/")]
        if self.command == "PUT":           # as the hub's store: whoever has the address may write there
            hub.objects[words[-1]] = body
            return self.answer({})
        content = [json.loads(line) for line in body.splitlines()] if body else [{}]
        if words == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        if words == ["api", "repos", "create"]:
            name, known = f"{content[0]['organization']}/{content[0]['name']}", dict(hub.repositories)
            if content[0]["organization"] == "silent":
                self.close_connection = True
                return None
            if status := REFUSALS.get(content[0]["organization"]):
                return self.answer({"error": "so says the hub"}, status)
            hub.add(name, {}, content[0].get("visibility") == "private" or content[0].get("private", False))
            return self.answer({"url": f"{hub.url}/{name}"}, 409 if name in known else 200)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.answer({"transfer": "basic", "objects": [
                {**each, "actions": {"upload": {"href": f"{hub.url}/store/{each['oid']}"}}} for each in content[0]["objects"]]})
        name = "/".join(words[2:4])
        if name not in hub.repositories:
            return self.answer({"error": "Repository not found"}, 404)
        return self.answer(*self.in_repository(hub.repositories[name], name, words[4:], content))

    def in_repository(self, repository: dict, name: str, words: list[str], content: list[dict]) -> tuple[dict, int]:
        what, branch = words or ["revision", "main"]
        branches, commits = repository["branches"], repository["commits"]
        if what == "branch":
            new = branch not in branches
            branches.setdefault(branch, dict(branches["main"]))
            return {}, 200 if new else 409
        if what == "revision":
            branch = next((commit["branch"] for commit in commits if commit["oid"] == branch), branch)
            return {"id": name, "sha": self.head(branches[branch]), "private": repository["private"],
                    "siblings": [{"rfilename": path} for path in branches[branch]]}, 200
        files = branches[branch]
        if what == "preupload":
            ignored = files.get(".gitignore", b"").decode().split()
            return {"files": [{"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                               "shouldIgnore": each["path"] in ignored} for each in content[0]["files"]]}, 200
        assert what == "commit", what
        if content[0]["value"].get("parentCommit") != self.head(files):
            return {"error": "the branch has moved"}, 412
        for line in content[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                found = self.server.objects[value["oid"]]
                assert line["key"] == "lfsFile" and hashlib.sha256(found).hexdigest() == value["oid"] and len(found) == value["size"]
                files[value["path"]] = found
        commits.append({"oid": self.head(files), "branch": branch, **content[0]["value"]})
        return {"commitUrl": f"{self.server.url}/{name}/commit/{self.head(files)}", "commitOid": self.head(files)}, 200

    @staticmethod
    def head(files: dict[str, bytes]) -> str:
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
