"""Our ids equal those of HF tokenizers and tiktoken, and our pieces those of their regexes."""

from __future__ import annotations

import gzip
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.tokenizer import Tokenizer, bpe, reference
from fledge.tokenizer.files import Vocabulary

hf = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")
tiktoken_load = pytest.importorskip("tiktoken.load")

PATTERNS = sorted(reference.PATTERNS)
TEXT = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cn", "Cs"])),
    st.text(alphabet=" \t\r\n'sStTreVEllab0123!?\u017f\u0301\u3000\x85", max_size=60),
    st.text(alphabet="\U0001f468\u200d\U0001f469\u200d\U0001f467\ufe0f\u4e2d\u6587\u0939\u093f \n"),
)


@pytest.fixture(scope="module")
def trio(texts, tmp_path_factory):
    """pattern -> (ours, HF tokenizers, tiktoken) with the same merges."""
    result = {}
    for pattern in PATTERNS:
        ours = Tokenizer.train(texts * 3, vocab_size=640, pattern=pattern)
        folder = tmp_path_factory.mktemp(pattern)
        ours.save(folder)
        theirs = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
        ranks = tiktoken_load.load_tiktoken_bpe(str(folder / "vocab.tiktoken"))
        encoding = tiktoken.Encoding(
            pattern,
            pat_str=reference.PATTERNS[pattern],
            mergeable_ranks=ranks,
            special_tokens=ours.special_tokens,
        )
        result[pattern] = (ours, theirs, encoding)
    return result


@given(text=TEXT, pattern=st.sampled_from(PATTERNS))
def test_ids_on_fuzzed_text(trio, text, pattern):
    ours, theirs, encoding = trio[pattern]
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert encoding.encode_ordinary(text) == ids
    assert theirs.decode(ids, skip_special_tokens=False) == encoding.decode(ids) == text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_special_tokens(trio, pattern):
    ours, theirs, encoding = trio[pattern]
    text = "<|bos|><|user_start|>Hi <|pad|> there<|user_end|> <|nothing|>"
    ids = ours.encode(text, allow_special=True)
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert encoding.encode(text, allowed_special="all") == ids
    assert theirs.encode("x").ids == [ours.bos_id, *ours.encode("x")]
    theirs.encode_special_tokens = True
    try:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
    finally:
        theirs.encode_special_tokens = False
    assert theirs.get_vocab_size() == ours.vocab_size
    for name, i in ours.special_tokens.items():
        assert theirs.token_to_id(name) == i


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_of_every_character(pattern):
    pytest.importorskip("fledge._bpe")
    split = hf.pre_tokenizers.Split(hf.Regex(reference.PATTERNS[pattern]), "isolated")
    codes = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    for start in range(0, len(codes), 4096):
        text = "".join(f"a{c}b {c}{c}1'{c}  {c}\n" for c in map(chr, codes[start : start + 4096]))
        theirs = [piece for piece, _ in split.pre_tokenize_str(text)]
        assert bpe.engine().split(text, pattern) == theirs


def load_texts(data_root):
    for path in sorted((data_root / "tokenizer_texts").glob("*.gz")):
        text = gzip.decompress(path.read_bytes()).decode()
        if path.name.endswith(".jsonl.gz"):
            text = "\n".join(
                str(v) for line in text.splitlines() for v in json.loads(line).values()
            )
        yield path.name, text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_on_real_texts(data_root, tmp_path, pattern):
    samples = {name: text[:150_000] for name, text in load_texts(data_root)}
    ours = Tokenizer.train(samples.values(), vocab_size=4096, pattern=pattern)
    ours.save(tmp_path)
    theirs = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoding = tiktoken.Encoding(
        pattern,
        pat_str=reference.PATTERNS[pattern],
        mergeable_ranks=tiktoken_load.load_tiktoken_bpe(str(tmp_path / "vocab.tiktoken")),
        special_tokens={},
    )
    for name, text in samples.items():
        ids = ours.encode(text)
        assert ours.decode(ids) == text, name
        assert encoding.encode_ordinary(text) == ids, name
        assert theirs.encode(text, add_special_tokens=False).ids == ids, name


def test_training_equals_hf_where_no_count_is_tied():
    # Every pair has a count of its own, so no rule for ties can matter.
    words = [f"{a}{b}" for a in "abcde" for b in "fghij"]
    text = " ".join(word for i, word in enumerate(words) for _ in range(3**0 + i * 7 + i * i))
    ours = Tokenizer.train([text], vocab_size=300)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300 - 12,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(reference.PATTERNS["qwen2"]), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    theirs.train_from_iterator([text], trainer)
    learnt = json.loads(theirs.to_str())["model"]["merges"]
    vocabulary = Vocabulary(tuple(ours.merges), "qwen2", (), 384)
    tokens = [t.decode("latin-1").replace(" ", "\u0120") for t in vocabulary.token_bytes()]
    mine = [[tokens[left], tokens[right]] for left, right in ours.merges]
    assert mine[:20] == learnt[:20]
