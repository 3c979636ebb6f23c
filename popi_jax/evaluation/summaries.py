"""Describes the summaries as texts: their length, how far they differ, and what they copy from the user's signals.

A word is a run of letters, digits and underscores, with their accents and vowel signs, in the text's NFKC form. Words
are compared without regard to case, unless a function says otherwise. Shape letters: docs/architecture.md.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from popi_jax.data.schema import Signal

LONG_RUN = 8  # Words. A shorter run may be a common phrase.
_SENTENCE_ENDS = frozenset(".!?:。।\n\r")  # A colon, too: what follows one often begins with a capital.
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def describe(
    texts_UxK: Sequence[Sequence[str]],
    h_RxK: np.ndarray,
    signals_U: Sequence[Sequence[Signal]],
    instruction: str,
) -> dict[str, dict[str, float | None]]:
    """Returns all statistics of this module, under their names in results.json.

    Args:
        texts_UxK: the K summaries of each user.
        h_RxK: h of each test triple under its user's K summaries, in nats.
        signals_U: all signals of each user, including those that did not fit the inference model's prompt.
        instruction: what the inference model was told to write, with the fixed start of its summary.
    """
    return {
        "summary_length": length(texts_UxK),
        "summaries_distinct": distinct(texts_UxK),
        "leakage": leakage(texts_UxK, signals_U, instruction),
        "stability": stability(texts_UxK, h_RxK),
    }


def length(texts_UxK: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Returns the mean and the 5%, 50% and 95% quantiles of the words per summary, over all summaries."""
    counts = [len(words(text)) for texts in texts_UxK for text in texts]
    low, median, high = np.quantile(counts, (0.05, 0.5, 0.95)).tolist()
    return {"mean": float(np.mean(counts)), "q05": low, "q50": median, "q95": high}


def distinct(texts_UxK: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Returns the number of summaries, of different texts among them, and of different texts per user (a mean)."""
    return {
        "summaries": sum(map(len, texts_UxK)),
        "distinct": len({text for texts in texts_UxK for text in texts}),
        "per_user": float(np.mean([len(set(texts)) for texts in texts_UxK])),
    }


def leakage(
    texts_UxK: Sequence[Sequence[str]], signals_U: Sequence[Sequence[Signal]], instruction: str
) -> dict[str, float | None]:
    """Returns what the summaries repeat of their own user's signals.

    The text fields of a signal are prompt, chosen, rejected and text.

    Returns:
        run_mean, run_max: over summaries, the words of the longest run that also stands in a field, see `longest_runs`.
        long_run_share: the share of summaries in which it has at least LONG_RUN words.
        number_share: the share that have a number of the fields, see `numbers`.
        name_share: the share that have a capitalised word within a sentence (see `names`) which stands in a field with
            the same capitals and does not stand in the instruction in any case.
    """
    told = set(_folded(words(instruction)))
    runs: list[int] = []
    has_number: list[bool] = []
    has_name: list[bool] = []
    for texts, signals in zip(texts_UxK, signals_U, strict=True):
        # Signals often share a prompt.
        fields = dict.fromkeys(field for s in signals for field in (s.prompt, s.chosen, s.rejected, s.text) if field)
        words_of_fields = [words(field) for field in fields]
        runs += longest_runs([_folded(words(text)) for text in texts], [_folded(own) for own in words_of_fields])
        known_numbers = set().union(*map(numbers, fields))
        known_words = set().union(*words_of_fields)
        has_number += [not known_numbers.isdisjoint(numbers(text)) for text in texts]
        has_name += [any(name.casefold() not in told for name in names(text) & known_words) for text in texts]
    return {
        "run_mean": float(np.mean(runs)),
        "run_max": max(runs),
        "long_run_share": float(np.mean(np.array(runs) >= LONG_RUN)),
        "number_share": float(np.mean(has_number)),
        "name_share": float(np.mean(has_name)),
    }


def stability(texts_UxK: Sequence[Sequence[str]], h_RxK: np.ndarray) -> dict[str, float | None]:
    """Returns how alike the K summaries of a user are; None with one summary per user.

    Returns:
        jaccard: the mean over users of the mean over pairs of the user's summaries of their `jaccard` similarity.
        agreement: the share of test triples on which all K summaries decide alike. They prefer y+ if h > 0; a tie
            counts as a preference of y-, as it does in the accuracy.
    """
    if h_RxK.shape[1] < 2:
        return {"jaccard": None, "agreement": None}
    of_users = []
    for texts in texts_UxK:
        sets = [set(_folded(words(text))) for text in texts]
        of_users.append(np.mean([jaccard(a, b) for a, b in itertools.combinations(sets, 2)]))
    prefers_RxK = h_RxK > 0
    alike_R = (prefers_RxK == prefers_RxK[:, :1]).all(axis=1)
    return {"jaccard": float(np.mean(of_users)), "agreement": float(np.mean(alike_R))}


def jaccard(a: set[str], b: set[str]) -> float:
    """Returns the size of the intersection over that of the union; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


def longest_runs(summaries: Sequence[Sequence[str]], fields: Sequence[Sequence[str]]) -> list[int]:
    """Returns for each summary the most consecutive words that are also consecutive words of one field."""
    numbering = {word: i for i, word in enumerate(dict.fromkeys(itertools.chain.from_iterable(summaries)))}
    # -1, a word of no summary, also keeps runs from passing from one part to the next.
    parts = [[numbering.get(word, -1) for word in part] + [-1] for part in (*fields, *summaries)]
    part_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts]) - len(fields)  # Negative: a field.
    words_of_parts = np.array(list(itertools.chain.from_iterable(parts)), int)
    longest = np.zeros(len(summaries), int)
    # Where runs of n words begin, and the number of each run; equal runs have the same one.
    begins = np.flatnonzero(words_of_parts >= 0)
    runs = words_of_parts[begins]
    for n in itertools.count(1):
        in_summary = part_of[begins] >= 0
        seen = np.zeros((2, runs.max(initial=-1) + 1), bool)
        seen[in_summary.astype(int), runs] = True
        in_both = (seen[0] & seen[1])[runs]
        begins, runs, in_summary = begins[in_both], runs[in_both], in_summary[in_both]
        if not begins.size:
            break
        longest[part_of[begins[in_summary]]] = n
        # A run of n + 1 words is two runs of n words, the second of which begins one word later.
        first = np.flatnonzero(begins[1:] == begins[:-1] + 1)
        both = runs[first] * (runs.max() + 1) + runs[first + 1]
        begins, runs = begins[first], np.unique(both, return_inverse=True)[1]
    return longest.tolist()


def words(text: str) -> list[str]:
    """Returns the words of a text in order, as they are written."""
    text = unicodedata.normalize("NFKC", text)
    return _pattern(text).findall(text)


def numbers(text: str) -> set[str]:
    """Returns the numbers of a text: runs of digits, with the points and commas between them."""
    return set(_NUMBER.findall(unicodedata.normalize("NFKC", text)))


def names(text: str) -> set[str]:
    """Returns the words of two or more letters that begin with a capital and do not begin a sentence.

    A sentence begins at the start of the text and after a full stop, an exclamation or question mark, a colon or a line
    end. Where a language writes all nouns with a capital, most of these words are no names.
    """
    text = unicodedata.normalize("NFKC", text)
    found, end = set(), 0
    for match in _pattern(text).finditer(text):
        word = match[0]
        if end and word[0].isupper() and len(word) > 1 and _SENTENCE_ENDS.isdisjoint(text[end : match.start()]):
            found.add(word)
        end = match.end()
    return found


def _folded(written: Sequence[str]) -> list[str]:
    return " ".join(written).casefold().split()  # At once, which is much faster than word by word.


def _pattern(text: str) -> re.Pattern[str]:
    r"""The pattern of a word. Python's \w lacks the marks that belong to a letter, so those of the text are added."""
    marks = () if text.isascii() else sorted(c for c in set(text) if unicodedata.category(c).startswith("M"))
    return re.compile(rf"\w[\w{''.join(marks)}]*")
