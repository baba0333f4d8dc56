"""Counted bytes are the text's for every SentencePiece model, or the model is refused with the reason."""

import io
from functools import cache
from itertools import product

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as T
from tests import tiny
from tools.common.shards import check_spaces
from tools.data.make_shards import Tally, encode

pytestmark = pytest.mark.slow
KNOWN = "abcdefghijklmnopqrstuvwxyz ABCXYZ.,;:()\n\täöüß0123456789"
TEXTS = st.text(st.sampled_from(KNOWN + "   "), max_size=60)
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=40)
KINDS, BOTH = ("bpe", "unigram"), (True, False)
MODELS = [(kind, True, fallback, symbols, False) for kind, fallback, symbols in product(KINDS, BOTH, BOTH)]
MODELS += [(kind, prefix, True, False, suffix) for kind, prefix, suffix in product(KINDS, BOTH, BOTH)]


@cache
def model(kind, prefix, fallback, symbols, suffix):
    """A tokenizer, or why it is refused."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((tiny.text()[:8_000] + KNOWN * 20).split("\n\n")),
        model_writer=file,
        model_type=kind,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=fallback,
        character_coverage=1.0,
        add_dummy_prefix=prefix,
        treat_whitespace_as_suffix=suffix,
        user_defined_symbols=["<tab>", "  ", "def "] if symbols else [],
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_id=0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    try:
        check_spaces(tokenizer, "it")
    except T.RunError as e:
        return str(e)
    return tokenizer


def counted(tokenizer, texts):
    """The bytes of texts, each led by BOS, as a run counts them."""
    ids = [i for text in texts for i in tokenizer.encode(text, add_bos=True)]
    tokens = torch.tensor(ids)
    return int(T.byte_tables(tokenizer).count(tokens[:-1], tokens[1:]).sum())


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_counted_bytes_are_the_texts_or_the_model_is_refused(options):
    found = model(*options)
    if isinstance(found, str):
        _, prefix, _, _, suffix = options
        assert suffix and "space" in found
        return
    texts = st.lists(st.one_of(TEXTS, ANY) if options[2] else TEXTS, min_size=1, max_size=3)

    @settings(max_examples=12, deadline=None, database=None, derandomize=True)
    @given(texts)
    def check(texts):
        assert counted(found, texts) == sum(len(text.encode()) for text in texts)

    check()


def test_models_without_a_piece_of_one_space_are_refused_with_the_reason():
    """Its spaces would be three byte tokens: 3 bytes counted for one."""

    class Lacking:
        def __getattr__(self, name):
            return getattr(model("bpe", True, True, False, False), name)

        def piece_to_id(self, piece):
            return self.unk_id() if piece == "\u2581" else 5

    with pytest.raises(T.RunError, match=r"^it: has no piece of one space \(U\+2581\)"):
        check_spaces(Lacking(), "it")


def tally_of(texts, **options):
    path = io.BytesIO(tiny.tokenizer_of(**options)).getvalue()
    tally = Tally(sentencepiece.SentencePieceProcessor(model_proto=path))
    for batch in encode(texts, tally.tokenizer):
        tally.add(*batch)
    return tally


def test_what_normalisation_and_unknown_tokens_drop_is_said():
    whole = tally_of(["a  b \n", "Zwölf"])
    assert whole.source_bytes == whole.counted_bytes == 12 and "drop" not in whole.report()
    normalized = tally_of(["a\u00a0\u00a0b \u2460"], normalization_rule_name="nmt_nfkc")
    assert (normalized.source_bytes, normalized.counted_bytes) == (10, 6)
    assert "normalisation and rules of spaces dropped 4 bytes" in normalized.report()
    unknown = tally_of(["a\u4e2db"], byte_fallback=False)
    assert (unknown.source_bytes, unknown.counted_bytes, unknown.unknown) == (5, 2, 1)
    assert "1 unknown tokens stand for 3 bytes that do not count" in unknown.report()
