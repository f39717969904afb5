"""The tokenizer as `transformers.AutoTokenizer` loads it from its folder."""

import json
import string

import pytest
from transformers import AutoTokenizer

from magref_jax.data.emoji_tokenizer import build_tokenizer

WORDS = ["fox", "red", "hot dog", "T-Rex", "piñata", "over", "the"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder):
    size = build_tokenizer(WORDS, folder, text_len=12)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert len(loaded) == size
    return loaded


def tokens(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_special_tokens(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the Red FOX", ["the", "red", "fox"]),
        ("hot dog, T-Rex!", ["hot", "dog", ",", "t", "-", "rex", "!"]),
        ("pin\u0303ata", ["piñata"]),  # composed first
        ("foxes", ["fox", "##e", "##s"]),
        ("cab 42", ["c", "##a", "##b", "4", "##2"]),
        ("猫", ["<unk>"]),
        ("", []),
    ],
)
def test_words_are_tokens_and_other_words_are_spelled(tokenizer, text, expected):
    assert tokens(tokenizer, text) == [*expected, "</s>"]


def test_every_ascii_prompt_has_an_encoding(tokenizer):
    assert "<unk>" not in tokens(tokenizer, "".join(map(chr, range(128))))
    assert "<unk>" not in tokens(tokenizer, string.printable * 3 + "x" * 999)


def test_offsets_map_back_to_the_prompt(tokenizer):
    text = "  The RED  zebra, over\tthe hot-dog\x07"
    encoding = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoding["offset_mapping"]]
    assert pieces == ["The", "RED", *"zebra", ",", "over", "the", "hot", "-", "dog", ""]
    assert encoding.char_to_token(text.index("RED")) == 1


def test_padding_and_truncation(tokenizer):
    batch = tokenizer(["red fox", "red " * 50], padding="max_length", truncation=True, return_tensors="np")
    short, long = batch["input_ids"]
    red, fox = tokenizer.convert_tokens_to_ids(["red", "fox"])
    assert short.tolist() == [red, fox, 1] + [0] * 9
    assert batch["attention_mask"][0].tolist() == [1] * 3 + [0] * 9
    assert long.tolist() == [red] * 11 + [1]


def test_equal_words_in_any_order_give_equal_files(folder, tokenizer, tmp_path):
    words = tokenizer.convert_ids_to_tokens(range(3, len(tokenizer)))
    assert words == sorted(words)
    build_tokenizer({*WORDS[::-1], "FOX"}, tmp_path, text_len=12)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 12


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="text_len=1 "):
        build_tokenizer(["red"], tmp_path, text_len=1)
    with pytest.raises(ValueError, match="words is empty"):
        build_tokenizer([" "], tmp_path, text_len=8)
