"""An ordinary application: nothing in it knows of telemetry."""

import openai


def main() -> None:
    client = openai.OpenAI()
    with client.responses.create(model="gpt-5.4-mini", input="Draw a crew of five.", stream=True) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                print(event.delta, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
