"""Runs in a pod: asks each question of a served model, and writes one JSON line an answer."""

import json
import sys

from openai import OpenAI

url, model, *questions = sys.argv[1:]
client = OpenAI(base_url=url, api_key="none")
assert [entry.id for entry in client.models.list()] == [model]
for question in questions:
    messages = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)  # type: ignore[arg-type]
    choice = answer.choices[0]
    print(json.dumps({"content": choice.message.content, "finish_reason": choice.finish_reason, "model": answer.model}))
