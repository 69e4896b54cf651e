"""Text in, text out: the bundle's tokenizer.json, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedspine_edge.arrays import Array
from fedspine_edge.bundle.bundle import Bundle
from fedspine_edge.errors import DataError, DeployError, MissingDependency
from fedspine_edge.files import TOKENIZER

Text = str | tuple[str, str]
Words = list[str] | tuple[str, ...]


class TextCodec:
    """The tokenizer of a bundle.

    Args:
        bundle: A checked bundle.
        limit: Longest sequence in tokens that the session takes; longer classifications are cut to it, longer lists
            of words refused.
    """

    def __init__(self, bundle: Bundle, limit: int) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependency.of("tokenizers", extra="export", purpose="Reading text") from error
        if TOKENIZER not in bundle.manifest.files:
            raise DeployError(
                f"{bundle.folder} has no {TOKENIZER}.",
                remedy="Put the tokenizer's tokenizer.json into the model folder and compile it anew, "
                "or tokenise yourself and call run().",
            )
        self._manifest, self._limit = bundle.manifest, limit
        self._tokenizer = Tokenizer.from_file(str(bundle.folder / TOKENIZER))
        # What a training script left in tokenizer.json (a fixed length of 128, say) is not wanted here.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if bundle.manifest.task == "classification":
            self._tokenizer.enable_truncation(limit)

    def encode(self, texts: Sequence[Text]) -> list[Any]:
        """One encoding per text or pair. Raises `DataError` for anything else and for texts without tokens."""
        for text in texts:
            pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
            if not (isinstance(text, str) or pair):
                raise DataError(f"{type(text).__name__} is not a text.", remedy="Give str or (str, str).")
        encodings: list[Any] = self._tokenizer.encode_batch(list(texts))
        if min(len(encoding.ids) for encoding in encodings) == 0:
            raise DataError("A text has no tokens.", remedy="Leave empty texts out.")
        return encodings

    def encode_words(self, texts: Sequence[Words]) -> list[Any]:
        """One encoding per list of words. Raises `DataError` for anything else and for what is beyond the limit."""
        for number, words in enumerate(texts, start=1):
            if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
                raise DataError(
                    f"Text {number} is not a list of words.",
                    remedy='Give the words, ["Ada", "lives", "in", "Paris"], or a list of such lists.',
                )
            if not words:
                raise DataError(f"Text {number} has no words.", remedy="Leave empty texts out.")
        encodings: list[Any] = self._tokenizer.encode_batch(list(texts), is_pretokenized=True)
        for number, encoding in enumerate(encodings, start=1):
            if (tokens := len(encoding.ids)) > self._limit:
                content = [word for word in encoding.word_ids if word is not None]
                fitting = content[max(0, self._limit - (tokens - len(content)))]  # the first word that would be cut
                raise DataError(
                    f"Text {number} has {tokens} tokens; the model and its engine allow {self._limit}.",
                    remedy=f"Split it: its first {fitting} words fit.",
                )
        return encodings

    def padded(self, encodings: Sequence[Any]) -> dict[str, Array]:
        """The model's token inputs, right-padded to the longest."""
        longest = max(len(encoding.ids) for encoding in encodings)
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        padding = {"input_ids": self._manifest.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
        arrays = {}
        for tensor in self._manifest.inputs:
            if tensor.kind != "tokens":
                continue
            array = np.full((len(encodings), longest), padding[tensor.name], dtype=np.int64)
            for row, encoding in zip(array, encodings):
                row[: len(encoding.ids)] = getattr(encoding, columns[tensor.name])
            arrays[tensor.name] = array
        return arrays

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


class TextStream:
    """Text out of tokens as they come, whole characters only, and an end at the first stop string.

    A token can be part of a character, and the text of a token depends on the one before it (a leading space), so
    the newest tokens are decoded with those before them and the difference is the news. What could be the
    beginning of a stop string is held back until it is clear.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        self._codec, self._stop = codec, tuple(stop)
        self._tokens: list[int] = []
        self._start = self._end = 0
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The new text that `token` brings, empty while it is incomplete or held back."""
        self._tokens.append(token)
        known = self._codec.decode(self._tokens[self._start : self._end])
        text = self._codec.decode(self._tokens[self._start :])
        if text.endswith("\ufffd") or len(text) <= len(known):
            return ""
        self._start, self._end = self._end, len(self._tokens)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """What is still held back, an incomplete character included; empty after a stop string."""
        if self.stopped:
            return ""
        known = self._codec.decode(self._tokens[self._start : self._end])
        rest = self._codec.decode(self._tokens[self._start :])[len(known) :]
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
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
