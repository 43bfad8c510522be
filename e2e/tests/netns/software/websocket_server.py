"""The server of the PyPI package websockets: echoes, and closes as told."""

import asyncio
import sys

from websockets.asyncio.server import serve


async def handler(ws):
    async for message in ws:
        if isinstance(message, str) and message.startswith("close "):
            await ws.close(int(message[6:]), "as told")
            return
        await ws.send(message)


async def main():
    async with serve(handler, "0.0.0.0", int(sys.argv[1]), max_size=None, compression="deflate"):
        await asyncio.get_running_loop().create_future()


asyncio.run(main())
