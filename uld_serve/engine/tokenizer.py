"""Text to token ids and back: the base's tokenizer behind one lock. Used by the server, the detokenizer and
LLM. Knows no request and no tensor."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from uld_serve.errors import InvalidRequest
from uld_serve.model.loading import control_ids

REPLACEMENT = "�"


class Tokenizer:
    """Thread-safe: the HTTP thread encodes while the step loop decodes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, vocab_size: int, eos_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # the Rust tokenizer raises "Already borrowed" when two threads enter
        self.vocab_size = vocab_size
        self.eos_ids = tuple(eos_ids)
        self.control_ids = control_ids(tokenizer, eos_ids)
        self._byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
        decoder = str(tokenizer.backend_tokenizer.decoder)
        self._is_byte_level = "ByteLevel" in decoder
        self.is_bytes_joined = decoder.startswith("ByteLevel(")
        """Whether a text is the tokens' bytes one after the other, and nothing else is done to it."""
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)
        self.text_bytes = lru_cache(maxsize=65536)(self._text_bytes)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with whatever the tokenizer itself puts in front (BOS for some models)."""
        with self._lock:
            return list(self._tokenizer.encode(text))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation and the opening of the assistant's turn. Raises InvalidRequest when the
        model has no chat template or its template refuses the messages."""
        if not self.has_chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True
                )
                return list(self._tokenizer.encode(text, add_special_tokens=False))
        except TemplateError as error:
            raise InvalidRequest(
                "the model's chat template refuses these messages", param="messages"
            ) from error

    def encode_more(self, text: str) -> list[int]:
        """Token ids of a text that follows others: nothing is put in front."""
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an assistant's turn: what follows encode_chat, with the token that ends it."""
        ids = self.encode_more(text)
        with self._lock:
            end = self._tokenizer.eos_token_id
        return ids if end is None else [*ids, int(end)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        with self._lock:
            return str(
                self._tokenizer.decode(
                    list(token_ids),
                    skip_special_tokens=skip_special_tokens,
                    clean_up_tokenization_spaces=False,
                )
            )

    def token_text(self, token_id: int) -> str:
        """The token alone; bytes that are no UTF-8 by themselves show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _token_bytes(self, token_id: int) -> bytes:
        with self._lock:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self._is_byte_level and all(char in self._byte_of for char in token):
            return bytes(self._byte_of[char] for char in token)
        return self.decode([token_id], skip_special_tokens=False).encode()

    def _text_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; nothing if it is a control token."""
        return self.token_bytes(token_id) if self.decode([token_id]) else b""
