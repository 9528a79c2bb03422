"""A text that grows token by token, in pieces that add up to exactly the finished text."""

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are no character yet."""


def clean_text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of tokens as `ExplanationGenerator` writes it: without special tokens, on one line."""
    return " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())


class TextStream:
    """Turns a growing list of tokens into pieces of text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._sent = ""

    def piece(self, tokens: list[int], *, last: bool) -> str:
        """What `tokens` add to the pieces before; characters whose bytes are not all there yet wait, unless `last`."""
        text = clean_text(self._tokenizer, tokens)
        ready = text if last else text.rstrip(_INCOMPLETE)
        if not ready.startswith(self._sent):
            return ""
        piece, self._sent = ready[len(self._sent) :], ready
        return piece
