"""OpenAI's API as data: fields of requests and what they ask of the runtime, and the forms of answers."""
