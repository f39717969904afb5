"""Subject disentanglement, the text side: which text tokens name which reference.

Value injection adds the value embedding of a subject's words to the video tokens of that subject's region, so that
each reference answers to its own words (MAGREF, arXiv:2505.23742, section 3.2); `region_mask.patch_regions` makes the
regions. No code for it is public, and the paper does not say how words become tokens: here, by character spans.

T: text tokens · S: subjects. A span is (start, stop) in characters of the cleaned prompt, stop excluded.
"""

import dataclasses
import functools
import html
import re
from collections.abc import Callable, Iterator, Sequence

import ftfy
import numpy as np
from jaxtyping import Float32

Span = tuple[int, int]

# Scripts that put no space between words, or glue particles to them (Korean): any position may be a word boundary.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_LETTER = f"[^\\W{_UNSPACED}]"  # a character that must not touch the next letter of a word


@dataclasses.dataclass(frozen=True)
class Subject:
    """The words that name one reference in the prompt: their n-th occurrence, or an explicit span."""

    words: str
    occurrence: int = 0
    span: Span | None = None


# Printable ASCII but &, which begins an HTML entity: nothing to repair. It is most prompts, and repair takes most of the time
# that reading a long file of them takes.
_PLAIN = re.compile(r"[ !-%'-~]*")


@functools.lru_cache(maxsize=2**14)
def clean_prompt(text: str) -> str:
    """The text Wan's tokenizer is given: broken Unicode and HTML entities repaired, runs of white space made one space.

    It changes token ids: full-width commas become ASCII ones, curly quotes straight.
    """
    if not _PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


_is_letter = re.compile(_LETTER).match


def occurrences(prompt: str, words: str) -> Iterator[Span]:
    """Where whole words stand in a cleaned prompt, upper and lower case alike."""
    words = clean_prompt(words)
    # One pattern with the letters around the words would say the same, but takes milliseconds to compile for each.
    plain = prompt.isascii() and words.isascii()  # where lower() is all there is to upper and lower case
    text, name = (prompt.lower(), words.lower()) if plain else (prompt, words)
    pattern = None if plain else re.compile(re.escape(words), re.IGNORECASE)
    start = 0
    while words:
        if pattern is None:
            start = text.find(name, start)
            stop = start + len(name)
        else:
            start, stop = match.span() if (match := pattern.search(text, start)) else (-1, -1)
        if start < 0:
            return
        before, after = text[max(start - 1, 0) : start], text[stop : stop + 1]
        if (_is_letter(before) and _is_letter(words[0])) or (_is_letter(after) and _is_letter(words[-1])):
            start += 1
        else:
            yield start, stop
            start = stop


def find_words(prompt: str, words: str, occurrence: int = 0) -> Span:
    """The span of whole words in a cleaned prompt, upper and lower case alike.

    Raises:
        ValueError: there are no words, or the prompt does not have this occurrence of them; lists the prompt's words.
    """
    words = clean_prompt(words)
    if not words:
        raise ValueError("A subject needs at least one word of the prompt.")
    if occurrence < 0:
        raise ValueError(f"occurrence={occurrence} of {words!r} must be 0 (the first) or more.")
    spans = list(occurrences(prompt, words))
    if occurrence < len(spans):
        return spans[occurrence]
    found = f"occurs {len(spans)} times, occurrence {occurrence} was asked for" if spans else "is not in the prompt"
    vocabulary = ", ".join(dict.fromkeys(re.findall(r"\w+", prompt))) or "none"
    raise ValueError(f"Subject {words!r} {found}. Words of the prompt: {vocabulary}.")


def align_subject(prompt: str, subject: Subject | str, offsets: Sequence[Span]) -> Float32[np.ndarray, " T"]:
    """1 for every token that shares a character with the subject's words.

    The prompt must be as it was tokenized, after `clean_prompt`. `offsets` are the spans of its tokens, as a fast
    tokenizer returns them: (0, 0) for padding and special tokens.

    Raises:
        ValueError: the words are not in the prompt, the span is not inside it, or its tokens were cut off.
    """
    subject = Subject(subject) if isinstance(subject, str) else subject
    if subject.span is None:
        start, stop = find_words(prompt, subject.words, subject.occurrence)
    else:
        start, stop = subject.span
        if not 0 <= start < stop <= len(prompt):
            raise ValueError(
                f"span={subject.span} of {subject.words!r} is not inside the {len(prompt)}-character prompt."
            )
    spans = np.asarray(offsets, np.int64).reshape(-1, 2)
    # A token may carry the space before its word, so that starts and stops need not agree: any overlap counts.
    tokens = np.minimum(spans[:, 1], stop) > np.maximum(spans[:, 0], start)
    if not tokens.any():
        raise ValueError(
            f"Subject {subject.words!r} at characters {start}..{stop} has no token: the {len(spans)} tokens end at "
            f"character {spans[:, 1].max(initial=0)}. Shorten the prompt or name the subject earlier."
        )
    return tokens.astype(np.float32)


def subject_tokens(
    prompt: str,
    subjects: Sequence[Subject | str | None],
    offsets: Sequence[Span] | Callable[[str], Sequence[Span]],
    num_subjects: int,
    text_len: int,
) -> Float32[np.ndarray, "S T"]:
    """`align_subject` for each subject; zeros for None, in spare slots and at the padding up to `text_len`.

    The prompt is cleaned here; `offsets` belong to the cleaned prompt, or are a function that returns them for it.

    Raises:
        ValueError: too many subjects or tokens, or a subject that `align_subject` refuses.
    """
    if len(subjects) > num_subjects:
        raise ValueError(f"{len(subjects)} subjects given for num_subjects={num_subjects}.")
    prompt = clean_prompt(prompt)
    offsets = offsets(prompt) if callable(offsets) else offsets
    if len(offsets) > text_len:
        raise ValueError(f"offsets of {len(offsets)} tokens given for text_len={text_len}; truncate when tokenizing.")
    tokens = np.zeros((num_subjects, text_len), np.float32)
    for row, subject in zip(tokens, subjects, strict=False):
        if subject is not None:
            row[: len(offsets)] = align_subject(prompt, subject, offsets)
    return tokens
