"""An object store over HTTP that speaks as much of Google Cloud Storage's JSON API as its clients ask for.

Objects are written whole, read (in ranges), listed and removed; there is no append, no rename and no copy.
gcsfs and TensorStore find it through the environment that `FakeStore.environment` gives.
"""

import hashlib
import json
import re
import threading
import urllib.parse
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_TIME = "2026-01-01T00:00:00.000Z"


class FakeStore:
    """Serves until the process ends. `failing`: how many of the next calls are answered with 503."""

    def __init__(self):
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}  # (bucket, name) -> bytes, generation
        self.calls: list[tuple[str, str]] = []
        self.failing = 0
        self._uploads: dict[str, tuple[str, bytes, dict]] = {}
        self._generation = 0
        self._lock = threading.Lock()
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    @property
    def environment(self):
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "TENSORSTORE_GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def names(self, bucket):
        return sorted(name for owner, name in self.objects if owner == bucket)

    def answer(self, method, path, query, headers, data):
        """(status, body, headers) of a call."""
        with self._lock:
            self.calls.append((method, path))
            if self.failing:
                self.failing -= 1
                return 503, _error("try again later"), {}
            if match := re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", path):
                return self._upload(match[1], method, query, headers, data)
            if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
                return self._list(match[1], query)
            if match := re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)", path):
                media = query.get("alt") == "media" or path.startswith("/download")
                return self._object((match[1], urllib.parse.unquote(match[2])), method, media, headers)
            if re.fullmatch(r"/storage/v1/b/([^/]+)", path):
                return 200, {"kind": "storage#bucket", "locationType": "region"}, {}
            return 501, _error(f"this store has no {method} {path}"), {}

    def _upload(self, bucket, method, query, headers, data):
        if "upload_id" in query:
            name, before, conditions = self._uploads[query["upload_id"]]
            data = before + data
            self._uploads[query["upload_id"]] = name, data, conditions
            if re.match(r"bytes \d.*/\*$", headers.get("Content-Range", "")):  # more is to come
                return 308, b"", {"Range": f"bytes=0-{len(data) - 1}"}
            return self._put(bucket, name, data, conditions)
        if query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(data)["name"]
            number = str(len(self._uploads))
            self._uploads[number] = name, b"", query
            place = f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            return 200, {}, {"Location": place}
        if query["uploadType"] == "multipart":
            boundary = re.search(r'boundary="?([^";]+)"?', headers["Content-Type"])[1].encode()
            parts = data.split(b"--" + boundary)[1:3]
            about, payload = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
            return self._put(bucket, json.loads(about)["name"], re.sub(rb"\r?\n\Z", b"", payload), query)
        return self._put(bucket, query["name"], data, query)

    def _put(self, bucket, name, data, conditions):
        generation = self.objects.get((bucket, name), (b"", 0))[1]
        if int(conditions.get("ifGenerationMatch", generation)) != generation:
            return 412, _error("another generation"), {}
        self._generation += 1
        self.objects[bucket, name] = data, self._generation
        return 200, self._about((bucket, name)), {}

    def _about(self, key):
        data, generation = self.objects[key]
        return {
            "kind": "storage#object", "bucket": key[0], "name": key[1], "size": str(len(data)),
            "generation": str(generation), "metageneration": "1", "updated": _TIME, "timeCreated": _TIME,
            "md5Hash": b64encode(hashlib.md5(data).digest()).decode(),
        }  # fmt: skip

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in self.names(bucket):
            rest = name.removeprefix(prefix)
            outside = name < query.get("startOffset", "") or ("endOffset" in query and name >= query["endOffset"])
            if not name.startswith(prefix) or outside:
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._about((bucket, name)))
        return 200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}, {}

    def _object(self, key, method, media, headers):
        if key not in self.objects:
            return 404, _error("not found"), {}
        if method == "DELETE":
            del self.objects[key]
            return 204, b"", {}
        if method != "GET" or not media:
            return (200, self._about(key), {}) if method == "GET" else (501, _error(f"no {method}"), {})
        data, generation = self.objects[key]
        more = {"x-goog-generation": str(generation), "ETag": str(generation)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", ""))
        if not asked:
            return 200, data, more
        start = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
        end = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
        if start >= len(data):
            return 416, b"", {"Content-Range": f"bytes */{len(data)}"}
        return 206, data[start : end + 1], more | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}


def _error(message):
    return {"error": {"message": message}}


def _handler(store):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def respond(self):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            status, body, headers = store.answer(self.command, url.path, query, self.headers, self._data())
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _data(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = respond

    return Handler
