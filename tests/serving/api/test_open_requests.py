"""What the layer around Serve's proxy says of requests under way."""

import asyncio

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from serving.api.open_requests import OLDEST_HEADER, OpenRequests


class Proxy:
    """`/ready` is answered at once, everything else when it may."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = Request(scope).url.path
        if path == "/fails":
            raise ArithmeticError("it broke")
        if path != "/ready":
            await self.may_end.wait()
        answer: Response = PlainTextResponse("no", 503 if path == "/ready" else 200)
        await answer(scope, receive, send)


@pytest.mark.asyncio
async def test_it_says_how_old_the_oldest_request_is_until_it_has_ended() -> None:
    proxy = Proxy()
    transport = httpx.ASGITransport(OpenRequests(proxy))
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:

        async def oldest() -> str:
            answer = await client.get("/ready")
            assert answer.status_code == 503
            return answer.headers[OLDEST_HEADER]

        assert await oldest() == "none", "not the one that asks"
        first = asyncio.ensure_future(client.post("/v1/completions"))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(client.post("/v1/completions"))
        await asyncio.sleep(0)
        assert float(await oldest()) >= 0.05, "of the first, not of the second"
        proxy.may_end.set()
        answers = await asyncio.gather(first, second)
        assert [OLDEST_HEADER in answer.headers for answer in answers] == [False, False]
        assert await oldest() == "none"
        with pytest.raises(ArithmeticError):
            await client.get("/fails")
        assert await oldest() == "none", "one that broke is no longer under way"
