"""Serving: a launcher that verifies an artifact and then becomes vLLM.

What a served model answers is OpenAI's API, with two of vLLM's additions that evaluation relies on:

Log-probabilities of a given text. `/v1/completions` with `echo: true, max_tokens: 0, logprobs: 0` answers one value for
each token of the prompt (null first), with `tokens` and `text_offset`; the prompt is text, where names of special
tokens count as tokens, or a list of token numbers. `/v1/chat/completions` with `prompt_logprobs: 0,
add_generation_prompt: false, max_tokens: 1` does the same for a conversation that ends with the given answer: the
answer's tokens start at index n of `prompt_logprobs`, where n is `usage.prompt_tokens` of the same conversation asked
without the answer. No streaming; at most `maxLogprobs` (20) alternatives a token; the prefix cache is not read, and
the logits of each step's prompt tokens are held at once (tokens x vocabulary x 4 bytes).

Which token ended an answer. `stop_reason` beside `finish_reason: stop` is the number of the end of turn from
`generation_config.json`, and null for the tokenizer's own end, the document separator.
"""
