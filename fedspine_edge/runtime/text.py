"""Tokenization and detokenization with the bundle's tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import BundleManifest
from fedspine_edge.errors import DataError, MissingDependency

Text = str | tuple[str, str]
Words = list[str] | tuple[str, ...]


class TextCodec:
    """The tokenizer of a bundle.

    Args:
        tokenizer_json: Content of tokenizer.json.
        manifest: Manifest of the bundle.
        max_tokens: Longest sequence that the session accepts. Texts for classification are truncated to it; longer
            lists of words are rejected.
    """

    def __init__(self, tokenizer_json: bytes, manifest: BundleManifest, max_tokens: int) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependency.of("tokenizers", extra="run", purpose="Reading text") from error
        self._manifest, self._max_tokens = manifest, max_tokens
        self._tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        # Discard padding and truncation that a training script left in tokenizer.json, such as a fixed length of 128.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if manifest.task == "classification":
            self._tokenizer.enable_truncation(max_tokens)

    def encode(self, texts: Sequence[Text]) -> list[Any]:
        """Return one encoding per text or pair. Raises `DataError` for other types and for texts without tokens."""
        for number, text in enumerate(texts, start=1):
            is_pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
            if not (isinstance(text, str) or is_pair):
                raise DataError(f"A text has the type {type(text).__name__}.", remedy="Give str or (str, str).")
            _check_unicode(number, (text,) if isinstance(text, str) else text)
        encodings: list[Any] = self._tokenizer.encode_batch(list(texts))
        if min(len(encoding.ids) for encoding in encodings) == 0:
            raise DataError("A text has no tokens.", remedy="Leave empty texts out.")
        return encodings

    def encode_words(self, texts: Sequence[Words]) -> list[Any]:
        """Return one encoding per list of words. Raises `DataError` for other types and for lists that are too long."""
        for number, words in enumerate(texts, start=1):
            if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
                raise DataError(
                    f"Text {number} is not a list of words.",
                    remedy='Give the words, ["Ada", "lives", "in", "Paris"], or a list of such lists.',
                )
            if not words:
                raise DataError(f"Text {number} has no words.", remedy="Leave empty texts out.")
            _check_unicode(number, words)
        encodings: list[Any] = self._tokenizer.encode_batch(list(texts), is_pretokenized=True)
        for number, encoding in enumerate(encodings, start=1):
            if (tokens := len(encoding.ids)) > self._max_tokens:
                content = [word for word in encoding.word_ids if word is not None]
                fitting = content[max(0, self._max_tokens - (tokens - len(content)))]  # the first word that is cut
                raise DataError(
                    f"Text {number} has {tokens} tokens; the model and its engine allow {self._max_tokens}.",
                    remedy=f"Split it: its first {fitting} words fit.",
                )
        return encodings

    def pad(self, encodings: Sequence[Any]) -> dict[str, Array]:
        """Return the model's token inputs, padded on the right to the longest encoding."""
        longest = max(len(encoding.ids) for encoding in encodings)
        attributes = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        padding = {"input_ids": self._manifest.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        arrays = {}
        for tensor in self._manifest.inputs:
            if tensor.kind != "tokens":
                continue
            array = np.full((len(encodings), longest), padding[tensor.name], dtype=np.int64)
            for row, encoding in zip(array, encodings):
                row[: len(encoding.ids)] = getattr(encoding, attributes[tensor.name])
            arrays[tensor.name] = array
        return arrays

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens without special tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def _check_unicode(number: int, parts: Sequence[str]) -> None:
    """Raise `DataError` if a text contains a surrogate, such as half of an emoji or a byte that is not UTF-8."""
    for part in parts:
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"Text {number} is not valid Unicode: character {error.start + 1} is a surrogate.",
                remedy='Decode it as UTF-8, or replace such characters: text.encode("utf-8", "replace").decode().',
            ) from None


class TextStream:
    """Converts tokens to text incrementally, in whole characters, up to the first stop string.

    A token can be part of a character, and its text depends on the previous token (a leading space, for example).
    Therefore the newest tokens are decoded together with those before them, and the difference is the new text. Text
    that could be the beginning of a stop string is held back until that is decided.

    Args:
        codec: The tokenizer.
        stop: Strings that end the text.

    Attributes:
        stopped: Whether a stop string was found.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        self._codec, self._stop = codec, tuple(stop)
        self._tokens: list[int] = []
        self._start = self._end = 0
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Return the new text after `token`; empty while a character is incomplete or text is held back."""
        self._tokens.append(token)
        previous = self._codec.decode(self._tokens[self._start : self._end])
        text = self._codec.decode(self._tokens[self._start :])
        if text.endswith("\ufffd") or len(text) <= len(previous):
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return self._release(text[len(previous) :])

    def finish(self) -> str:
        """Return the text that is still held back, including an incomplete character; empty after a stop string."""
        if self.stopped:
            return ""
        previous = self._codec.decode(self._tokens[self._start : self._end])
        rest = self._codec.decode(self._tokens[self._start :])[len(previous) :]
        self._start = self._end = len(self._tokens)
        released = self._release(rest)
        held, self._held = self._held, ""
        return released + held

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
