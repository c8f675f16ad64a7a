# SPDX-License-Identifier: Apache-2.0
"""One greedy answer over the OpenAI-compatible HTTP interface, streamed and timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvarn.demo.prompts import Question
from kvarn.demo.server import Server


@dataclass
class Answer:
    """What came back. `decode_rate`: tokens per second after the first one; None for an answer of one token."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: float = 0.0
    decode_rate: float | None = None


def ask(server: Server, question: Question, progress: Callable[[int], None] = lambda tokens: None) -> Answer:
    """Streams the answer at temperature 0; calls `progress` with the tokens so far.

    Raises ServerDied if the server ended meanwhile, RuntimeError if it refused the request.
    """
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer, began, first = Answer(), time.monotonic(), None
    try:
        stream = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": question.text}],
            temperature=0,
            max_tokens=question.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )
        for chunk in stream:
            if chunk.usage is not None:
                answer.prompt_tokens = chunk.usage.prompt_tokens
                answer.cached_tokens = getattr(chunk.usage.prompt_tokens_details, "cached_tokens", None) or 0
            for choice in chunk.choices:
                answer.text += choice.delta.content or ""
                answer.tokens += getattr(choice, "token_ids", None) or []
            if answer.tokens and first is None:
                first = time.monotonic()
            progress(len(answer.tokens))
    except openai.OpenAIError as error:
        server.check()
        raise RuntimeError(f"the server refused {question.name!r}: {error}") from None
    ended = time.monotonic()
    if first is None:
        raise RuntimeError(f"the server gave no token for {question.name!r}")
    answer.first_token_s = first - began
    if len(answer.tokens) > 1:
        answer.decode_rate = (len(answer.tokens) - 1) / (ended - first)
    return answer
