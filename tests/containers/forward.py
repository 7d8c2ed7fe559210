"""Passes connections on, as `kubectl port-forward` does: `forward.py LISTEN CONNECT`, each a port of the loopback device or the
path of a Unix socket. One runs here and one in the pod; a folder with the socket between them is all that they share."""

import asyncio
import os
import sys

PIECE_BYTES_MAX = 1 << 16


def serve(where, handler):
    if where.isdigit():
        return asyncio.start_server(handler, "127.0.0.1", int(where))
    return asyncio.start_unix_server(handler, where)


def connect(where):
    return asyncio.open_connection("127.0.0.1", int(where)) if where.isdigit() else asyncio.open_unix_connection(where)


async def pump(reader, writer):
    try:
        while piece := await reader.read(PIECE_BYTES_MAX):
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


async def main(listen, target):
    async def on_connection(reader, writer):
        try:
            far_reader, far_writer = await connect(target)
        except OSError:
            # Nobody listens there yet; the client sees a connection that ends.
            writer.close()
            return
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        far_writer.close()
        writer.close()

    # Whoever runs the tests may connect to what a container's root has made.
    os.umask(0)
    server = await serve(listen, on_connection)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
