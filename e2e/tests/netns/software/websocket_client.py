"""The client of the PyPI package websockets, over HTTP/1."""

import asyncio
import sys

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed


async def main(url):
    async with connect(url, max_size=None, proxy=None) as ws:
        for i in range(100):
            await ws.send(f"text {i}")
            assert await ws.recv() == f"text {i}"
        blob = bytes(range(256)) * 4096
        await ws.send(blob)
        assert await ws.recv() == blob

        async def pieces():
            for i in range(20):
                yield f"part {i};"
                await asyncio.sleep(0)

        await ws.send(pieces())
        assert await ws.recv() == "".join(f"part {i};" for i in range(20))
        for _ in range(5):
            await asyncio.wait_for(await ws.ping(), 10)
    assert ws.close_code == 1000, ws.close_code
    # Close codes cross both ways.
    for code in (1000, 1001, 1011, 4321):
        async with connect(url, proxy=None) as ws:
            await ws.send(f"close {code}")
            try:
                await ws.recv()
                raise SystemExit("not closed")
            except ConnectionClosed as e:
                assert e.rcvd.code == code and e.rcvd.reason == "as told", e
    # Many at once.
    all = await asyncio.gather(*(connect(url, proxy=None) for _ in range(100)))
    await asyncio.gather(*(w.send(str(i)) for i, w in enumerate(all)))
    assert [await w.recv() for w in all] == [str(i) for i in range(100)]
    await asyncio.gather(*(w.close() for w in all))
    print("text, 1 MiB binary, fragments, pings, four close codes, 100 at once")


asyncio.run(main(sys.argv[1]))
