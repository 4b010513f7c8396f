"""What each field of a request does, in a sentence. Put into the OpenAPI document by openapi; a field without a note or
a description of its own fails a test. Bounds and defaults are the models' and are not said again here."""

from __future__ import annotations

FIELD_NOTES: dict[str, str] = {
    "prompt": "Text, a list of texts, token ids, or a list of such lists.",
    "messages": "The conversation. `content` is text or a list of text parts; the model's chat template joins them.",
    "max_tokens": "Most tokens to draw. In completions 0 only scores the prompt; in chat the default is the room left.",
    "max_completion_tokens": "The newer name of max_tokens; if both are given they must agree.",
    "n": "Choices for each prompt; choice number is prompt number x n + sample number. At most 128 in all.",
    "stream": "Server-sent events. One that fails sends an error event and breaks off, without `[DONE]`.",
    "stream_options": "Needs stream.",
    "include_usage": "A last event with the token counts and no choices.",
    "continuous_usage_stats": "Token counts so far in every event.",
    "temperature": "0 takes the likeliest token; of equals the one with the lowest id.",
    "top_p": "Only the likeliest tokens that together reach this probability.",
    "min_p": "Only tokens at least so many times as likely as the likeliest.",
    "seed": "The same seed gives the same answer. Absent: a new one each time.",
    "stop": "Up to four texts that end the answer, and are not part of it.",
    "stop_token_ids": "Tokens that end the answer.",
    "presence_penalty": "Taken from the score of every token already in the answer.",
    "frequency_penalty": "The same, for each time that it is there.",
    "repetition_penalty": "Divides positive scores, multiplies negative ones, of tokens in prompt or answer.",
    "logit_bias": "Token id to what is added to its score. It never revives a token that forgetting has removed.",
    "min_tokens": "Nothing ends the answer before so many tokens. Not with a JSON response_format.",
    "ignore_eos": "The model's end of text does not end the answer. Not with a JSON response_format.",
    "logprobs": "In completions, how many likeliest tokens to list at each position; in chat, whether to give "
    "log-probabilities. They are of the scores after forgetting, before temperature; -9999.0: a removed token.",
    "top_logprobs": "How many likeliest tokens to list at each position; needs logprobs.",
    "prompt_logprobs": "Log-probabilities of the prompt's tokens, under what is forgotten, with so many alternatives.",
    "return_token_ids": "Also the ids of the prompt's tokens and of those drawn; if streamed, the prompt's come first.",
    "echo": "Put the prompt before the answer; with logprobs its tokens are scored too, under what is forgotten.",
    "response_format": "`json_object`, or `json_schema` with a JSON Schema (draft 2020-12), which the answer keeps to "
    "token by token, before anything is filtered or drawn. What cannot be enforced is refused. The model is not shown "
    "the schema: ask for JSON in the prompt too. An answer cut off by max_tokens is not whole JSON.",
    "json_schema": "The schema and its name; if, and only if, type is json_schema.",
    "schema": "At most 32,768 characters and 2,000 values; $ref only within it.",
    "strict": "true or false, the schema is always enforced.",
    "tokens": "Token ids.",
}
