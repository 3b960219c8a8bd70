"""Text from token ids, piece by piece, without splitting a character."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer


class TextStream:
    """Turns token ids into pieces of text that add up to the whole and never split a character.

    `before` are the ids of the text that the pieces continue: with some tokenizers they decide
    whether the first piece begins with a space.
    """

    # A character has at most four bytes, so at most three of its bytes can be waiting.
    LONGEST_WAIT = 3

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before[-self.LONGEST_WAIT - 1 :])
        self.start, self.clean = 0, len(self.ids)
        self.sent = len(self._decode(0))

    def push(self, token: int) -> str:
        """Add one token and return the text that is now certain, possibly none."""
        self.ids.append(token)
        text = self._decode(self.start)
        waiting = len(text) - len(text.rstrip("\ufffd"))
        certain = len(text) - min(waiting, self.LONGEST_WAIT)
        piece = text[self.sent : certain]
        self.sent = max(self.sent, certain)
        if not waiting:
            # The last clean piece stays in view: some decoders treat the first token differently.
            self.start, self.clean = self.clean, len(self.ids)
            self.sent = len(self._decode(self.start))
        return piece

    def finish(self) -> str:
        """Return the text that was held back; to be called once, at the end."""
        return self._decode(self.start)[self.sent :]

    def _decode(self, start: int) -> str:
        return self.tokenizer.decode(self.ids[start:], skip_special_tokens=True)


class StopTexts:
    """Cuts a stream of text at the first of some texts, of which no part is passed on."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self.held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Add a piece and return the text that is certain to come before a stop."""
        if self.found:
            return ""
        self.held += piece
        starts = [start for text in self.texts if (start := self.held.find(text)) >= 0]
        if starts:
            self.found = True
            certain, self.held = self.held[: min(starts)], ""
            return certain
        cut = len(self.held) - self._waiting()
        certain, self.held = self.held[:cut], self.held[cut:]
        return certain

    def finish(self) -> str:
        """Return the text that was held back; to be called once, at the end."""
        return self.held

    def _waiting(self) -> int:
        """The number of characters at the end that may be the beginning of a stop."""
        longest = max(map(len, self.texts), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(self.held)), 0, -1)
                if any(text.startswith(self.held[-n:]) for text in self.texts)
            ),
            0,
        )
