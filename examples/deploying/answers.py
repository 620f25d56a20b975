"""The work that the programs in this folder do: ask a question, read the first line of the answer."""

import openai

MODEL = "gpt-5.4-mini"


def first_line(question: str) -> str:
    """Return the first line of the answer. A longer answer is closed early."""
    text = ""
    with (
        openai.OpenAI() as client,
        client.responses.create(model=MODEL, input=question, stream=True) as stream,
    ):
        for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
                if "\n" in text:
                    break
    return text.partition("\n")[0]


async def async_first_line(question: str) -> str:
    """The same with the async client."""
    text = ""
    async with (
        openai.AsyncOpenAI() as client,
        await client.responses.create(model=MODEL, input=question, stream=True) as stream,
    ):
        async for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
                if "\n" in text:
                    break
    return text.partition("\n")[0]
