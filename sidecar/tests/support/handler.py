"""A handler as functions have one: python3 handler.py PORT. Says what it was asked; paths make it slow, fail or end."""

import http.server
import os
import signal
import sys
import threading
import time

# How long it serves on after SIGTERM, as handlers behind a watchdog do.
SERVES_ON_S = 1.5
# How often it looks whether its front is there: a test ends fronts without a word.
LOOKS_EVERY_S = 0.5
# What was asked to be slow, as far as it has begun.
slow = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self):
        body = self.body()
        if self.path.startswith("/slow/"):
            slow.append(self.path)
            time.sleep(float(self.path.removeprefix("/slow/")))
        if self.path == "/exit/0" or self.path == "/exit/3":
            os._exit(int(self.path[-1]))
        said = f"{self.command} {self.path} {self.headers.get('X-Call-Id')} {self.headers.get('Host') is not None} {len(body)}"
        said = os.environ.get("FAASWAP_SIDECAR_URL", "") if self.path == "/url" else said
        if self.path == "/slow-begun":
            said = str(len(slow))
        if self.path.startswith("/header/"):
            said = self.headers.get(self.path.removeprefix("/header/"), "none")
        self.send_response(418 if self.path == "/teapot" else 200)
        self.send_header("X-From", "handler")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said.encode())

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            # Whoever asked did not wait; that is what some tests are about.
            self.close_connection = True


def end_with(front):
    while os.getppid() == front:
        time.sleep(LOOKS_EVERY_S)
    os._exit(0)


threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
signal.signal(signal.SIGTERM, lambda *_: threading.Timer(SERVES_ON_S, os._exit, [0]).start())
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
