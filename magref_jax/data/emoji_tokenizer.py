"""A tokenizer of a few hundred words, in the files of a Hugging Face tokenizer.

Each word of the world is one token. Any other word is spelled with word beginnings and `##` letters, so every ASCII
prompt has an encoding, and what it cannot say is still text that the offsets map back to the prompt.
"""

import json
import os
import pathlib
import string
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1 and 2; the first two as umT5's
MAX_WORD_LENGTH = 1000  # characters; the longest match is searched in quadratic time


def build_tokenizer(words: Iterable[str], out_folder: str | os.PathLike[str], text_len: int) -> int:
    """Writes the tokenizer that `transformers.AutoTokenizer` loads from `out_folder`; returns its vocabulary size.

    Args:
        words: Words or phrases, in any order; a phrase counts as its words.
        out_folder: Made where there is none.
        text_len: Tokens a prompt may have, the closing `</s>` included; longer prompts are cut where asked to truncate.

    Raises:
        ValueError: No words, or a `text_len` without room for a word and `</s>`.
    """
    if text_len < 2:
        raise ValueError(f"text_len={text_len} must be 2 or more: one token and the closing {EOS}.")
    # clean_text: control characters have no token.
    clean = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=True)
    normalizer = normalizers.Sequence([normalizers.NFC(), clean])
    splitter = pre_tokenizers.BertPreTokenizer()  # at white space, and around each punctuation mark
    vocabulary = {piece for word in words for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(word))}
    if not vocabulary:
        raise ValueError("words is empty: a tokenizer needs at least one word.")
    letters = set(string.ascii_lowercase + string.digits + string.punctuation).union(*vocabulary)
    pieces = sorted(vocabulary | letters | {f"##{letter}" for letter in letters})

    tokenizer = Tokenizer(
        models.WordPiece(
            {piece: index for index, piece in enumerate([PAD, EOS, UNKNOWN, *pieces])},
            unk_token=UNKNOWN,
            max_input_chars_per_word=MAX_WORD_LENGTH,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    tokenizer.add_special_tokens([PAD, EOS, UNKNOWN])

    folder = pathlib.Path(out_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "padding_side": "right",
        "model_max_length": text_len,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()
