"""A registry on loopback that has the referrers API, which Debian's docker-registry lacks."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

import attrs

from tests.images import OCI_INDEX
from tests.threadserver import ThreadServer

PATH = re.compile(r"/v2/(?P<name>.+?)/(?P<kind>blobs/uploads|blobs|manifests|referrers)/(?P<reference>[^/]*)")
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@attrs.define(eq=False)
class ReferrersRegistry(ThreadServer):
    """Holds in memory what is pushed to it, in one repository; ``requests`` are those that came."""

    blobs: dict[str, bytes] = attrs.field(factory=dict)
    manifests: dict[str, tuple[bytes, str]] = attrs.field(factory=dict)
    requests: list[str] = attrs.field(factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """One request."""
        parts = urlsplit(request.path)
        path = PATH.fullmatch(parts.path)
        body = request.rfile.read(int(request.headers.get("Content-Length", "0")))
        self.requests.append(f"{request.command} {parts.path}")
        if path is None:
            send(request, 404, b"")
            return
        reference, query = path["reference"], parse_qs(parts.query)
        match request.command, path["kind"]:
            case "POST", "blobs/uploads":
                send(request, 202, b"", Location=f"{self.url}{parts.path}{uuid.uuid4()}?state=kept")
            case "PUT", "blobs/uploads" if (
                query.get("state") == ["kept"] and digest_of(body) in query["digest"]
            ):
                self.blobs[digest_of(body)] = body
                send(request, 201, b"")
            case "PUT", "manifests":
                self._put_manifest(request, reference, body)
            case "GET", "manifests" if reference in self.manifests:
                content, media_type = self.manifests[reference]
                send(request, 200, content, Content_Type=media_type)
            case "GET", "blobs" if reference in self.blobs:
                self._send_blob(request, self.blobs[reference])
            case "GET", "referrers":
                self._send_referrers(request, reference, query.get("artifactType", []))
            case _:
                send(request, 404, b"")

    def _put_manifest(self, request: BaseHTTPRequestHandler, reference: str, body: bytes) -> None:
        content = (body, request.headers["Content-Type"])
        self.manifests[reference] = self.manifests[digest_of(body)] = content
        subject = json.loads(body).get("subject")
        send(request, 201, b"", **({"OCI_Subject": subject["digest"]} if subject else {}))

    def _send_blob(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        span = RANGE.fullmatch(request.headers.get("Range", ""))
        if span is None:
            send(request, 200, content)
            return
        start, stop = int(span[1]), min(int(span[2]) + 1, len(content))
        send(request, 206, content[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(content)}")

    def _send_referrers(self, request: BaseHTTPRequestHandler, subject: str, types: list[str]) -> None:
        entries = []
        for digest, (content, media_type) in self.manifests.items():
            document = json.loads(content)
            fits = document.get("subject", {}).get("digest") == subject
            if fits and (not types or document["artifactType"] in types) and digest == digest_of(content):
                entries.append(
                    {
                        "mediaType": media_type,
                        "digest": digest,
                        "size": len(content),
                        "artifactType": document["artifactType"],
                        "annotations": document["annotations"],
                    }
                )
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        send(
            request,
            200,
            json.dumps(index).encode(),
            Content_Type=OCI_INDEX,
            OCI_Filters_Applied="artifactType",
        )


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, **headers: Any) -> None:
    """Answer; ``headers`` have _ for -."""
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
