"""A Hugging Face hub on loopback that serves one data set, by default a C4-shaped `allenai/c4`, to the real `datasets` client.

Point a new process at it (the client reads the variable when it is imported):

    with HubServer(folder) as hub:
        subprocess.run([...], env={**os.environ, **hub.env(cache_folder)})
"""

import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Optional, Union
from urllib.parse import unquote, urlsplit

REPO = 'allenai/c4'
SHA = '1588ec454efa1a09f29cd18ddd04fe05fc8653a2'
README = '''---
configs:
- config_name: CONFIG
  data_files:
  - split: train
    path: CONFIG/*train*
  - split: validation
    path: CONFIG/*validation*
---
'''


class HubServer:
    """Serves every file of `folder` as `CONFIG/NAME`, beside a README that maps the config to them.

    Attributes:
        fail: Takes a request's path; a status code that it returns is sent in place of the answer, 'cut' ends the connection
            in the middle of the answer, 'gated' says that the repository is, None lets it pass.
        requests: Method and path of every request so far.
        url: What HF_ENDPOINT shall be.
    """

    def __init__(self, folder: Path, fail: Optional[Callable[[str], Union[int, str, None]]] = None, repo: str = REPO,
                 config: str = 'en') -> None:
        self.files = {f'{config}/{path.name}': path.read_bytes() for path in sorted(folder.iterdir())}
        self.files['README.md'] = README.replace('CONFIG', config).encode()
        self.repo = repo
        self.fail = fail or (lambda path: None)
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.thread = Thread(target=self.server.serve_forever, daemon=True)
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self) -> 'HubServer':
        self.thread.start()
        return self

    def __exit__(self, *args) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def env(self, cache: Path) -> dict[str, str]:
        """The variables that send a process to this hub, with its own cache and no proxy or token."""
        return {'HF_ENDPOINT': self.url, 'HF_HOME': str(cache), 'HF_HUB_OFFLINE': '0', 'HF_DATASETS_OFFLINE': '0',
                'HF_HUB_DISABLE_TELEMETRY': '1', 'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1'}  # fmt: skip

    def entry(self, name: str) -> dict:
        data = self.files[name]
        return {'type': 'file', 'path': name, 'size': len(data), 'oid': hashlib.sha1(data).hexdigest()}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get('Content-Length') or 0))
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f'{request.command} {path}')
        status = self.fail(path)
        request.cut = status == 'cut'  # pyright: ignore[reportAttributeAccessIssue]
        if status == 'gated':
            send(request, 403, b'{"error": "gated"}', {'X-Error-Code': 'GatedRepo', 'X-Error-Message': 'Access is restricted'})
        elif isinstance(status, int):
            send(request, status, b'{"error": "made to fail"}')
        elif re.fullmatch(rf'/api/datasets/{self.repo}(/revision/[^/]+)?', path):
            siblings = [{'rfilename': name} for name in self.files]
            send_json(request, {'id': self.repo, 'sha': SHA, 'private': False, 'gated': False, 'disabled': False, 'tags': [],
                                'siblings': siblings, 'cardData': {}, 'lastModified': '2024-01-09T19:14:03.000Z'})  # fmt: skip
        elif tree := re.fullmatch(rf'/api/datasets/{self.repo}/tree/[^/]+(?:/(.+))?', path):
            self.send_tree(request, tree[1] or '')
        elif re.fullmatch(rf'/api/datasets/{self.repo}/paths-info/[^/]+', path):
            self.send_paths(request, body)
        elif (file := re.fullmatch(rf'/datasets/{self.repo}/resolve/[^/]+/(.+)', path)) and file[1] in self.files:
            self.send_file(request, file[1])
        else:
            send(request, 404, b'{"error": "not here"}', {'X-Error-Code': 'EntryNotFound'})

    def send_tree(self, request: BaseHTTPRequestHandler, folder: str) -> None:
        entries = [self.entry(name) for name in self.files if name.startswith(f'{folder}/' if folder else '')]
        if 'recursive=true' not in request.path.lower():
            depth = len(folder.split('/')) if folder else 0
            folders = {'/'.join(e['path'].split('/')[:depth + 1]) for e in entries if e['path'].count('/') > depth}
            entries = [e for e in entries if e['path'].count('/') == depth]
            entries += [{'type': 'directory', 'path': name, 'size': 0, 'oid': '0' * 40} for name in sorted(folders)]
        if entries:
            send_json(request, entries)
        else:
            send(request, 404, b'{"error": "not here"}', {'X-Error-Code': 'EntryNotFound'})

    def send_paths(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        text = body.decode()
        asked = json.loads(text)['paths'] if text.startswith('{') else re.findall(r'paths=([^&]+)', text)
        names = [unquote(name) for name in asked]
        known = [self.entry(name) for name in names if name in self.files]
        known += [{'type': 'directory', 'path': name, 'size': 0, 'oid': '0' * 40} for name in names
                  if any(file.startswith(name + '/') for file in self.files)]  # fmt: skip
        send_json(request, known)

    def send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        data = self.files[name]
        headers = {'ETag': f'"{hashlib.sha1(data).hexdigest()}"', 'X-Repo-Commit': SHA, 'Accept-Ranges': 'bytes'}
        span = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('Range') or '')
        if not span:
            send(request, 200, data, headers)
            return
        start = int(span[1])
        part = data[start:int(span[2]) + 1 if span[2] else None]
        if not part:
            send(request, 416, b'', {'Content-Range': f'bytes */{len(data)}'})
            return
        send(request, 206, part, {**headers, 'Content-Range': f'bytes {start}-{start + len(part) - 1}/{len(data)}'})


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: Optional[dict[str, str]] = None) -> None:
    if getattr(request, 'cut', False):
        request.close_connection = True
        if request.command == 'HEAD' or not body:
            return
    request.send_response(status)
    for name, value in {**(headers or {}), 'Content-Length': str(len(body))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != 'HEAD':
        request.wfile.write(body[:len(body) // 2] if request.close_connection else body)


def send_json(request: BaseHTTPRequestHandler, value: object) -> None:
    send(request, 200, json.dumps(value).encode(), {'Content-Type': 'application/json', 'X-Repo-Commit': SHA})
