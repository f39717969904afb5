"""Words to tokens: spans written by hand, and the offsets of a real tokenizer with a small vocabulary."""

import html
import random
import re

import ftfy
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from magref_jax.conditioning import subjects
from magref_jax.conditioning.subjects import Subject, align_subject, clean_prompt, find_words, subject_tokens
from magref_jax.config import NEGATIVE_PROMPT


def word_offsets(text):
    """One token per word or sign, as a tokenizer without subwords would cut."""
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


def chosen(prompt, subject):
    tokens = align_subject(prompt, subject, word_offsets(prompt))
    return [prompt[a:b] for (a, b), on in zip(word_offsets(prompt), tokens, strict=True) if on]


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a\tdog \n runs ", "a dog runs"),
        ("ﬁre", "fire"),
        ("“quoted” it’s", '"quoted" it\'s'),
        ("ＡＢＣ", "ABC"),
        ("a\u00a0b\u3000c", "a b c"),
        ("cats &amp;amp;amp; dogs", "cats & dogs"),
        ("<b> &amp;amp; c", "<b> & c"),  # ftfy leaves entities alone beside a tag
        ("sÃ³", "só"),
    ],
)
def test_clean_prompt(raw, cleaned):
    assert clean_prompt(raw) == cleaned


def test_cleaning_replaces_all_28_commas_of_the_negative_prompt():
    cleaned = clean_prompt(NEGATIVE_PROMPT)
    assert NEGATIVE_PROMPT.count("，") == cleaned.count(",") == 28
    assert "，" not in cleaned
    assert len(cleaned) == len(NEGATIVE_PROMPT)


@pytest.mark.parametrize(
    ("prompt", "words", "expected"),
    [
        ("A cat, a dog.", "dog", ["dog"]),
        ("A CAT runs", "cat", ["CAT"]),
        ("the concatenated cats and a cat", "cat", ["cat"]),
        ("a bobcat, a big cat", "big cat", ["big", "cat"]),
        ("a red-haired girl waves", "red-haired girl", ["red", "-", "haired", "girl"]),
        ("a  woman in   a coat", "woman  in a", ["woman", "in", "a"]),
        ("the girl's dog", "girl", ["girl"]),
        ("Der große Hund", "GROSSE hund", None),
        ("Der große Hund", "GROßE hund", ["große", "Hund"]),
        ("a (very) odd c++ toy", "c++", ["c", "+", "+"]),
        ("🦊 jumps over a 🐶", "🐶", ["🐶"]),
        ("dog2 and dog", "dog", ["dog"]),
    ],
)
def test_words_to_tokens(prompt, words, expected):
    prompt = clean_prompt(prompt)
    if expected is None:
        with pytest.raises(ValueError, match="is not in the prompt"):
            chosen(prompt, words)
    else:
        assert chosen(prompt, words) == expected


@pytest.mark.parametrize(
    ("prompt", "words", "span"),
    [
        ("一只猫和一只狗", "狗", (6, 7)),
        ("一只AI猫在跑", "AI", (2, 4)),
        ("一只AI猫在跑", "猫", (4, 5)),
        ("고양이가 뛴다", "고양이", (0, 3)),
    ],
)
def test_scripts_without_spaces(prompt, words, span):
    assert find_words(prompt, words) == span


def test_words_inside_other_words_do_not_count():
    assert find_words("a bobcat and a cat", "cat") == (15, 18)
    assert find_words("a catfish and a cat", "cat") == (16, 19)


def test_occurrence_and_span():
    prompt = "a man greets a man"
    offsets = word_offsets(prompt)
    np.testing.assert_array_equal(align_subject(prompt, "man", offsets), [0, 1, 0, 0, 0])
    np.testing.assert_array_equal(align_subject(prompt, Subject("man", occurrence=1), offsets), [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(align_subject(prompt, Subject("both", span=(2, 12)), offsets), [0, 1, 1, 0, 0])
    with pytest.raises(ValueError, match="'man' occurs 2 times, occurrence 2 was asked for"):
        align_subject(prompt, Subject("man", occurrence=2), offsets)
    with pytest.raises(ValueError, match="occurrence=-1"):
        align_subject(prompt, Subject("man", occurrence=-1), offsets)
    for span in ((3, 3), (-1, 2), (4, 99)):
        with pytest.raises(ValueError, match="is not inside the 18-character prompt"):
            align_subject(prompt, Subject("man", span=span), offsets)


def test_missing_words_list_the_prompt():
    with pytest.raises(ValueError, match=r"'wolf' is not in the prompt. Words of the prompt: a, fox, sees, dog\."):
        align_subject("a fox sees a dog", "wolf", word_offsets("a fox sees a dog"))
    with pytest.raises(ValueError, match="at least one word"):
        align_subject("a fox", "  ", [])


def test_words_that_were_truncated_away():
    with pytest.raises(
        ValueError, match=r"'dog' at characters 13\.\.16 has no token: the 3 tokens end at character 10"
    ):
        align_subject("a fox sees a dog", "dog", word_offsets("a fox sees a dog")[:3])


def test_slots_and_padding():
    tokens = subject_tokens("A “fox”  sees a dog", ["dog", None, "fox"], word_offsets, num_subjects=4, text_len=10)
    np.testing.assert_array_equal(tokens[0], [0, 0, 0, 0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(tokens[2], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(tokens[[1, 3]], 0)
    assert tokens.dtype == np.float32
    with pytest.raises(ValueError, match="3 subjects given for num_subjects=2"):
        subject_tokens("a b c", ["a", "b", "c"], word_offsets, num_subjects=2, text_len=10)
    with pytest.raises(ValueError, match="offsets of 3 tokens given for text_len=2"):
        subject_tokens("a b c", ["a"], word_offsets, num_subjects=2, text_len=2)


@pytest.fixture(scope="module")
def tokenizer():
    """Unigram, metaspace, end token, right padding: umT5's make, cutting most words into pieces."""
    pieces = ["▁", "▁a", "▁do", "g", "▁fire", "fighter", "▁sh", "iba", "▁in", "u", "s", ",", ".", "é", "f", "▁caf"]
    letters = [letter for letter in "bcdehijklmnopqrtvwxyz" if letter not in pieces]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)] + [(piece, -float(len(pieces))) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary + [(letter, -40.0) for letter in letters], unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(24)
    tokenizer.enable_padding(length=24, pad_id=0, pad_token="<pad>")
    return tokenizer


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        ("dog", ["▁do", "g"]),
        ("firefighter", ["▁fire", "fighter"]),
        ("shiba inu", ["▁sh", "iba", "▁in", "u"]),
        ("café", ["▁caf", "é"]),
    ],
)
def test_subword_offsets(tokenizer, words, pieces):
    prompt = "a dog, a firefighter, a shiba inu, a cafe\u0301."  # the accent is a character of its own until cleaned
    tokens = subject_tokens(prompt, [words], lambda text: tokenizer.encode(text).offsets, 1, 32)[0]
    encoded = tokenizer.encode(clean_prompt(prompt)).tokens
    assert [encoded[index] for index in np.flatnonzero(tokens)] == pieces


PLAIN = [chr(code) for code in range(0x20, 0x7F) if chr(code) != "&"]


def test_plain_text_is_cleaned_as_all_text():
    assert [character for character in map(chr, range(0x250)) if subjects._PLAIN.fullmatch(character)] == PLAIN
    rng = random.Random(0)
    # Every character alone and between every kind of neighbour, and long texts, with "<", which ftfy heeds.
    texts = [a + b for a in PLAIN for b in " a<0"] + [b + a for a in PLAIN for b in " a<0"]
    texts += ["".join(rng.choices(PLAIN, k=rng.randint(0, 200))) for _ in range(500)]
    for text in texts:
        repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean_prompt.__wrapped__(text) == " ".join(repaired.split())


def test_words_are_found_as_by_a_pattern_with_their_neighbours():
    rng = random.Random(0)
    alphabets = ["ab_ -", "aA bB,.", "aé ÉE\u0301", "猫a 犬", "kK\u212a sſS", "İi ıI", "ß sS"]
    letter = subjects._LETTER
    found = 0
    for index in range(350):
        letters = alphabets[index % len(alphabets)]
        prompt = clean_prompt("".join(rng.choices(letters, k=rng.randint(1, 14))))
        words = clean_prompt("".join(rng.choices(letters, k=rng.randint(1, 3))))
        if not words:
            continue
        before = rf"(?<!{letter})" if re.match(letter, words[0]) else ""
        after = rf"(?!{letter})" if re.match(letter, words[-1]) else ""
        pattern = re.compile(before + re.escape(words) + after, re.IGNORECASE)
        expected = [match.span() for match in pattern.finditer(prompt)]
        assert list(subjects.occurrences(prompt, words)) == expected, (prompt, words)
        found += bool(expected)
    assert 50 < found < 300
