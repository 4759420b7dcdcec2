"""Text to token ids and back: byte-level BPE, its files, and the chat format.

`Tokenizer` (bpe.py) stands on the Rust module `fledge._bpe`, or on `reference.py` where that is not
built; `files.py` reads and writes the folder that Hugging Face tokenizers load; `chat.py` turns
conversations into ids and loss masks. Every stage, the engine and the evaluations use it. It never
imports torch.
"""

from fledge.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer

__all__ = ["SPECIAL_TOKENS", "Tokenizer"]
