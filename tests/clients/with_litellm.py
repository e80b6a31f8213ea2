"""litellm against a served model. It has an environment of its own: python with_litellm.py URL KEY"""

import asyncio
import sys

import litellm

url, key = sys.argv[1:]
litellm.telemetry = False
ask = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the model"}]
for kind in ("openai", "hosted_vllm"):
    given = {"model": f"{kind}/tiny", "api_base": f"{url}/v1", "api_key": key, "temperature": 0, "num_retries": 0}
    answer = litellm.completion(**given, messages=ask, max_tokens=9)
    text = answer.choices[0].message.content
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (9, "length")

    chunks = list(
        litellm.completion(**given, messages=ask, max_tokens=9, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == 9
    assert litellm.stream_chunk_builder(chunks, messages=ask).choices[0].message.content == text

    async def at_once():
        found = await asyncio.gather(*(litellm.acompletion(**given, messages=ask, max_tokens=9) for _ in range(4)))  # noqa: B023
        assert [each.choices[0].message.content for each in found] == [text] * 4  # noqa: B023
        stream = await litellm.acompletion(**given, messages=ask, max_tokens=9, stream=True)  # noqa: B023
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text  # noqa: B023

    asyncio.run(at_once())
    scored = litellm.completion(**given, messages=ask, max_tokens=9, logprobs=True, top_logprobs=2)
    assert len(scored.choices[0].logprobs.content) == 9
    assert len(litellm.completion(**given | {"temperature": 1}, messages=ask, max_tokens=3, n=2).choices) == 2
    for wrong, error in (
        ({"api_key": "wrong key"}, litellm.AuthenticationError),
        ({"model": f"{kind}/gpt-9"}, litellm.NotFoundError),
        ({"temperature": 5}, litellm.BadRequestError),
        ({"messages": [{"role": "user", "content": "the " * 1000}]}, litellm.ContextWindowExceededError),
    ):
        try:
            litellm.completion(**{"messages": ask, **given, **wrong})
        except error as said:
            assert str(said)
        else:
            raise AssertionError(wrong)

text = litellm.text_completion(
    model="text-completion-openai/tiny", prompt="the model", max_tokens=5, api_base=f"{url}/v1", api_key=key
)
assert text.usage.completion_tokens == 5
print("all holds")
