"""A process with litellm in it: `python -m tests.support.litellm_client URL < asked.json` prints what it got.

In a process of its own because of its import, the event loops that it leaves open, and its warnings.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import litellm


def main(url: str, asked: dict[str, Any]) -> dict[str, Any]:
    server: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
    whole = litellm.completion("openai/tiny", **asked, **server)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion("openai/tiny", **asked, **streamed, **server))
    later = asyncio.run(litellm.acompletion("openai/tiny", **asked, **server))
    said = whole.choices[0].message
    again = asked | {"messages": [*asked["messages"], said.model_dump(), *asked["messages"]]}
    text = asked | {"prompt": asked["messages"][0]["content"], "logprobs": 2}
    text.pop("messages")
    return {
        "whole": said.content,
        "usage": whole.usage.completion_tokens,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "streamed_usage": chunks[-1].usage.completion_tokens,
        "later": later.choices[0].message.content,
        "again": litellm.completion("openai/tiny", **again, **server).choices[0].finish_reason,
        "text": litellm.text_completion(model="text-completion-openai/tiny", **text, **server)
        .choices[0]
        .text,
        "bad": error_of(lambda: litellm.completion("openai/tiny", **asked, temperature=-1, **server)),
        "absent": error_of(lambda: litellm.completion("openai/other", **asked, **server)),
    }


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.load(sys.stdin))))
