"""Text from data is spelled so that neither a terminal nor a page acts on it."""

from __future__ import annotations

import sys
import unicodedata

from grads_ds.config.errors import printable

TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_every_character_acted_on_is_an_escape_and_no_other_changes() -> None:
    acted = {"Cc", "Cs", "Zl", "Zp"}
    for number in range(sys.maxunicode + 1):
        one = chr(number)
        if (unicodedata.category(one) in acted or one in TURNS) and one not in "\n\t":
            assert printable(one) == one.encode("unicode_escape", "surrogatepass").decode()
        else:
            assert printable(one) == one
