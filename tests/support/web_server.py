"""HTTP servers on the loopback for tests: one that serves bytes, over TLS when asked, and base classes for others."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import pathlib
import ssl
import threading
from collections.abc import Iterator
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@contextlib.contextmanager
def running(handler: type[http.server.BaseHTTPRequestHandler], tls_folder: pathlib.Path | None = None) -> Iterator[str]:
    """Serve on a free port of the loopback until the block ends; yield the URL. With a folder: over TLS.

    The folder then holds ca.crt, the certificate to trust.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    scheme = "http"
    if tls_folder is not None:
        write_certificate(tls_folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls_folder / "ca.crt", tls_folder / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"{scheme}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def write_certificate(folder: pathlib.Path) -> None:
    """Write a self-signed certificate for 127.0.0.1 as ca.crt, and its key as server.key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(certificate.public_bytes(pem))
    (folder / "server.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """A handler with keep-alive and without a log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        return

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Send a whole answer."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def count_sent(self, num_bytes: int) -> None:
        """Be told of the bytes of a file before they leave, so that a client that has them finds them counted."""

    def answer_file(self, content: bytes, etag: str, cut_after: int | None = None, **headers: str) -> None:
        """Send a file, or the range that is asked for. `cut_after` breaks the connection after so many bytes."""
        start, end = 0, len(content)
        wanted = self.headers.get("Range", "")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first)
            end = min(int(last) + 1, end) if last else end
            if start >= len(content):
                self.answer(416)
                return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{etag}"')
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        piece = content[start:end] if cut_after is None else content[start:end][:cut_after]
        self.count_sent(len(piece))
        self.wfile.write(piece)
        if cut_after is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
