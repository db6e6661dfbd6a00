"""Encodes with the library fastokens, which is many times as fast as the library `tokenizers`, but knows only BPE.

Both libraries first encode hard texts and the first documents. After one difference `tokenizers` encodes all that the
process encodes from then on.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from src.common.errors import UserError

FIRST_CHARS = 50_000  # characters of the first documents that both libraries encode
MAX_SPECIAL = 20  # special tokens of a tokenizer that the hard texts spell
# A library may have the Unicode tables of another version: the blocks with most signs, and samples of the others
CODE_POINTS = [chr(c) for c in (*range(0x700), *range(0x700, 0x3400, 7), *range(0x3400, 0x110000, 509))
               if not 0xD800 <= c < 0xE000]
LONG = 'the river bank ' * 300  # fastokens 0.3.2 reused the words of an earlier text with the same first 4 KiB
HARD_TEXTS = [
    '', ' ', '\n', '\0', 'a\0b\0\0 \0', '  two  spaces   three\t\ttabs \n\n\n lines \r\n\r\n \r x\v\f\x1c\x85 ',
    "I'm you're he'LL we'Ve IT'S 'tis ''s don't'd o'clock 's'", 'CamelCase snake_case kebab-case x=1;y+=2 #!/bin && |',
    'def f(x):\n    return {"a": [1, 2.5e-3], **x}  # fu\n\n\tif a != b: pass\n', '<b>&amp;</b> http://a.b/c?d=e%20\\n',
    '0 00 123 1234567890 3.14159 1,000,000 ½ ² ٣٤٥ ५६ Ⅷ １２３ 𝟘𝟙', 'naïve A\u030a\u0323 o\u0308\u0304 ﬁ ﬀ ＡＢ ｱ Å',
    'cafe\u0301 \u1aeb\u0301 \u1df6\u0301 \U0001e4ec\u0301', '中文字符。日本語のテキスト、カ 한국어 \u1112\u1161\u11ab',
    'ไทยไม่มีช่องว่าง ಕ್ಷ ক্ষ', 'שָׁלוֹם עולם \u202bمرحبا\u202c بالعالم فارسی\u200cها', 'Жук ΑΣ ς İıſ ẞß Ǆǅ ŉ',
    '🙂🙃 👩\u200d👩\u200d👧 🇩🇪🇫🇷 ❤\ufe0f 👍🏽 𝔘𝔫𝔦 𐍈 𠀀 \U0010ffff \U000e0041', '\u2028\u2029 \ufffd \uffff \ue000',
    '\ufeffBOM \u200b\u00ad\u2060 \u00a0\u3000\u2003 x', '▁▁ ▁the ĠĠ Ġthe Ċ ĉ <0x0A><0x00> ##ing @@ </w>',
    'x' * 300, 'ab' * 200, ' ' * 300, '\n' * 100 + ' ' * 100 + 'x', '中' * 100, '!?' * 100, 'Donaudampfschifffahrt' * 9,
    LONG + ' ' * 700 + 'xy', LONG + ' ' * 701, LONG + ' ' * 700 + '\n',
    *(''.join(f'a{c} {c}\u0301' for c in CODE_POINTS[i:i + 256]) for i in range(0, len(CODE_POINTS), 256)),
]
EncodeSlowly = Callable[[list[str]], list[list[int]]]


class FastEncoder:
    """Encodes texts with fastokens, until that is found to give other ids than `tokenizers`.

    `serialized` is a tokenizer in the format of tokenizer.json, and `special` are its special tokens. `encode_slowly`
    encodes with `tokenizers`. If fastokens cannot be used, a line says so, and `encode` returns None.
    """

    def __init__(self, name: str, serialized: str, special: list[str], encode_slowly: EncodeSlowly) -> None:
        self._name, self._unchecked = name, FIRST_CHARS
        self._tokenizer: Any = None
        try:
            self._tokenizer = open_tokenizer(serialized)
        except ImportError as error:
            reason: Optional[str] = f'fastokens cannot be imported ({error})'
        except ValueError as error:
            reason = f'fastokens cannot read it ({error})'
        else:
            spelled = [f'the {token} river{token}{token}\n{token[:-1]} {token} ' for token in special[:MAX_SPECIAL]]
            try:
                reason = self._try([*HARD_TEXTS, *spelled], None, encode_slowly)[1]
            except UserError:
                reason = 'a hard text has characters outside its vocabulary'
        # Worker processes start in the same way as their parent, which says it
        if reason:
            self._give_up(reason, os.environ.get('RANK', '0') == '0' and multiprocessing.parent_process() is None)

    def encode(self, texts: list[str], encode_slowly: EncodeSlowly) -> Optional[list[NDArray[np.uint32]]]:
        """Returns the ids of each text, without special tokens; None if `tokenizers` must encode the texts."""
        if self._tokenizer is None:
            return None
        n_checked = 0
        while self._unchecked > 0 and n_checked < len(texts):
            self._unchecked -= len(texts[n_checked])
            n_checked += 1
        found, reason = self._try(texts, n_checked, encode_slowly)
        if reason:
            self._give_up(reason)
        return found

    def _try(self, texts: list[str], n_checked: Optional[int], encode_slowly: EncodeSlowly,
             ) -> tuple[Optional[list[NDArray[np.uint32]]], Optional[str]]:
        """Encodes texts, and compares the ids of the first `n_checked`. Returns the ids, or a reason to give up."""
        try:
            data, bounds = self._tokenizer.encode_batch_flat(texts, False, True)
        except ValueError as error:  # such as a limit of its regular expressions
            return None, f'fastokens cannot encode {texts[0][:50]!r} ({error})'
        ids, stops = np.frombuffer(data, np.uint32), np.frombuffer(bounds, np.uint64).tolist()
        found = [ids[start:stop] for start, stop in zip(stops[:-1], stops[1:])]
        for text, fast, slow in zip(texts, found, encode_slowly(texts[:n_checked]) if n_checked != 0 else ()):
            if fast.tolist() != slow:
                return None, f'fastokens gives other ids for {text[:50]!r}'
        return found, None

    def _give_up(self, reason: str, says_so: bool = True) -> None:
        self._tokenizer = None
        if says_so:
            print(f'note: tokenizer {self._name!r}: the slower library tokenizers encodes the texts, because {reason}',
                  file=sys.stderr, flush=True)


def open_tokenizer(serialized: str) -> Any:
    """Opens a tokenizer. Raises ImportError without fastokens, and ValueError if fastokens cannot read it."""
    from fastokens import Tokenizer

    return Tokenizer.from_json_str(serialized)
