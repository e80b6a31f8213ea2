"""langchain-openai against a served model. It has an environment of its own: python with_langchain.py URL KEY"""

import asyncio
import sys

import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

url, key = sys.argv[1:]
given = {"base_url": f"{url}/v1", "api_key": key, "model": "tiny", "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(**given, max_tokens=9)
ask = [SystemMessage("be brief"), HumanMessage([{"type": "text", "text": "the model"}])]

answer = chat.invoke(ask)
assert answer.response_metadata["finish_reason"] in ("length", "stop")
assert answer.usage_metadata["output_tokens"] == 9, answer.usage_metadata
assert answer.usage_metadata["total_tokens"] == answer.usage_metadata["input_tokens"] + 9

whole = None
for chunk in ChatOpenAI(**given, max_tokens=9, stream_usage=True).stream(ask):
    whole = chunk if whole is None else whole + chunk
assert whole.content == answer.content
assert whole.usage_metadata["output_tokens"] == 9, whole.usage_metadata


async def at_once():
    found = await asyncio.gather(*(chat.ainvoke(ask) for _ in range(4)))
    assert [each.content for each in found] == [answer.content] * 4
    assert "".join([chunk.content async for chunk in chat.astream(ask)]) == answer.content


asyncio.run(at_once())
assert [each.content for each in chat.batch([ask, ask])] == [answer.content] * 2

scored = chat.bind(logprobs=True, top_logprobs=2).invoke(ask)
assert len(scored.response_metadata["logprobs"]["content"]) == 9
stopped = chat.bind(stop=[answer.content[2:4]]).invoke(ask)
assert stopped.content == answer.content[: answer.content.index(answer.content[2:4])]
assert OpenAI(**given, max_tokens=5).invoke("the model")
assert "".join(OpenAI(**given, max_tokens=5).stream("the model"))

for wrong, error in (
    ({"api_key": "wrong key"}, openai.AuthenticationError),
    ({"model": "gpt-9"}, openai.NotFoundError),
    ({"temperature": 5}, openai.BadRequestError),
):
    try:
        ChatOpenAI(**given | wrong).invoke(ask)
    except error as said:
        assert said.body["message"]
    else:
        raise AssertionError(wrong)
try:
    chat.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke(ask)
except openai.BadRequestError as said:
    assert said.body["param"] == "tools"
try:
    chat.invoke("the " * 1000)
except openai.BadRequestError as said:
    assert said.code == "context_length_exceeded", said.code
print("all holds")
