"""A text to what near duplicates have in common with it: MinHash, to the bit as datatrove computes it.

text  ->  words without case, digits, punctuation and accents  ->  runs of 5 words  ->  112 minima  ->  14 bands of 8

A minimum is shared with a probability that is the texts' similarity s: of all runs of words in the one or the other,
the share in both (Jaccard). A band is shared with s^8, one of 14 or more with 1 - (1 - s^8)^14: that is 5 % of texts
with s = 0.5, 56 % at 0.7, 77 % at 0.75, 92 % at 0.8 and 99.96 % at 0.9. The steepest rise is near (1/14)^(1/8) = 0.72.
These are the numbers of FineWeb (Penedo et al. 2024: "at least 75% similar") and datatrove's defaults.

Simplifying a text and the runs are datatrove's. Its step as a whole takes words from spaCy, calls xxhash as no version
from 4 on allows, and holds 112 hashes of every run of a text at once; a test has it make the same minima.
"""

import hashlib
import unicodedata

import numpy as np
import regex
from datatrove.utils.text import TextNormConfig, ngrams, simplify_text
from jaxtyping import UInt64
from xxhash import xxh64_intdigest

N_GRAMS, NUM_BANDS, BAND_HASHES, SEED = 5, 14, 8, 1
NGRAMS_PER_BATCH = 1024
"""N-grams whose hashes are held in memory: 112 of each."""
UNSPACED_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"[{UNSPACED_SCRIPTS}]|[^\s{UNSPACED_SCRIPTS}]+")
"""What stands between white space; of scripts that have none between words, a character."""
ACCENTS = regex.compile(r"\p{Mn}+")
KEEPING_ACCENTS = TextNormConfig(norm_unicode_diacritics=False)
"""They are taken off below, faster than character by character."""
BITS = np.uint64(61)
PRIME = np.uint64(2**61 - 1)
_generator = np.random.RandomState(SEED)
FACTORS, SUMMANDS = (_generator.randint(low, PRIME, NUM_BANDS * BAND_HASHES, np.uint64) for low in (1, 0))
"""Of each of the hashes, which are h -> (FACTOR h + SUMMAND) mod PRIME."""


def bands_of(text: str) -> UInt64[np.ndarray, " bands"]:
    """A digest of each band, by which two are equal or not; zeros for a text of fewer words than a run has."""
    hashed = ngram_hashes(text)
    if not len(hashed):
        return np.zeros(NUM_BANDS, np.uint64)
    bands = min_hashes(hashed).astype("<u8").reshape(NUM_BANDS, BAND_HASHES)
    digests = b"".join(hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in bands)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def normalized_words(text: str) -> list[str]:
    """Return the words that are compared."""
    text = simplify_text(text, KEEPING_ACCENTS)
    if text.isascii():
        return text.split()
    return WORD.findall(ACCENTS.sub("", unicodedata.normalize("NFD", text)))


def ngram_hashes(text: str) -> UInt64[np.ndarray, " runs"]:
    """Return a hash of each n-gram of words."""
    hashes = (xxh64_intdigest(" ".join(run).encode()) for run in ngrams(normalized_words(text), N_GRAMS))
    return np.fromiter(hashes, np.uint64)


def min_hashes(hashed: UInt64[np.ndarray, " runs"]) -> UInt64[np.ndarray, " hashes"]:
    """Return the minimum of each hash function over all n-grams."""
    lowest = np.full(len(FACTORS), PRIME)
    for start in range(0, len(hashed), NGRAMS_PER_BATCH):
        values = hashed[start : start + NGRAMS_PER_BATCH, None] * FACTORS + SUMMANDS
        values = (values & PRIME) + (values >> BITS)  # as much modulo 2^61 - 1, without a division
        values = np.minimum(values, values - PRIME)  # below the prime the difference wraps to a large number
        np.minimum(lowest, values.min(0), out=lowest)
    return lowest
