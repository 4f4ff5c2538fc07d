"""The tokens of a word or an answer as it follows other text."""


def continuation(tokenizer, text: str) -> list[int]:
    """Return the tokens of ``text`` behind other text.

    A tokenizer that puts a space before whatever it is given (SentencePiece's of Llama 2 and Phi-3) makes two of the
    space that ``text`` begins with. Behind a word it puts none, so the tokens of ``text`` are what a word is longer by.
    """
    alone = tokenizer.encode(text, add_special_tokens=False)
    if not text.startswith(" "):
        return alone
    word, both = (tokenizer.encode(known, add_special_tokens=False) for known in ("x", f"x{text}"))
    return both[len(word) :] if both[: len(word)] == word else alone
