"""What a tokenizer's chat template puts around what a user says and what the model answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ChatForm"]

#: Stands for what a user says; no template holds it.
_MARK = "\x02said\x03"


@dataclass(frozen=True)
class ChatForm:
    """The text before what a user says, and how it ends.

    Attributes:
        tokenizer: whose template it is.
        before: text up to what the user says.
        end: first word of what follows; empty if nothing does.
    """

    tokenizer: Any
    before: str
    end: str

    @classmethod
    def of(cls, tokenizer: Any) -> ChatForm:
        """Read it off the template.

        Raises:
            ValueError: there is no template, or it does not show what the user says.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("chats must be 0 where the tokenizer has no chat template, got a positive share")
        rendered = cls(tokenizer, "", "").asked(_MARK)
        before, mark, after = rendered.partition(_MARK)
        if not mark:
            raise ValueError(
                "chats must be 0: the tokenizer's chat template must show what the user says, got "
                f"{rendered!r:.200}"
            )
        return cls(tokenizer, before, (after.split() or [""])[0])

    def asked(self, question: str) -> str:
        """Return the text up to where the model's answer begins."""
        return self._rendered([{"role": "user", "content": question}], add_generation_prompt=True)

    def answered(self, question: str, answer: str) -> str:
        """Return the text of a question and its whole answer."""
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._rendered(said)

    def question(self, text: str) -> str:
        """Return what the user says at the start of ``text``, the model's continuation of :attr:`before`."""
        return (text.partition(self.end)[0] if self.end else text).strip()

    def _rendered(self, said: list[dict[str, str]], **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(said, tokenize=False, **options))
        except Exception as error:  # templates are programs, and raise what they like
            raise ValueError(f"chats must be 0: the tokenizer's chat template fails: {error}") from error
