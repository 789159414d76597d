"""Regular expressions of a config that may come from anyone: which are safe to run, and what they match.

Python's engine has no time limit and tries every way in which a pattern could match, so that a pattern of ten
characters can run for ever. So the ways are counted beforehand, and a pattern with too many is not run.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import comb

_LONGEST = 1000  # characters of a pattern
_LONGEST_NAME = 200  # characters of a name that patterns are tried on; the longest known has 90
_MOST_WAYS = 2_000_000  # tried in some milliseconds
_LITERAL = re.compile(r"\^((?:[\w/-]|\\[^\w\s])+)\$")  # how wq writes a name as a pattern


def refuse_pattern(pattern: str) -> str:
    """Why a regular expression is not run; empty if it is."""
    if len(pattern) > _LONGEST:
        return "could take exponential time, so wq does not run it"
    return "" if exact(pattern) is not None else _refusal(pattern)


def exact(pattern: str) -> str | None:
    """The one name that a pattern matches, if it is a name between `^` and `$`."""
    found = _LITERAL.fullmatch(pattern) if len(pattern) <= _LONGEST else None
    return re.sub(r"\\(.)", r"\1", found[1]) if found else None


@lru_cache(maxsize=4096)
def _refusal(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        return f"is no regular expression ({error})"
    return "" if _ways(pattern) <= _MOST_WAYS else "could take exponential time, so wq does not run it"


def _ways(pattern: str) -> float:
    """At most how many ways there are to match a name; infinite for what is not counted.

    Each open repeat ends somewhere in the name, none before the one in front of it; an optional part is there or is
    not; of a group, one alternative is taken. Repeated groups, flags, references and looks around are not counted.
    """
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL).replace("(?:", "(")
    if re.search(r"\)[*+{]|\(\?|\\", bare):
        return float("inf")
    open_ended, optional = len(re.findall(r"[*+{]", bare)), bare.count("?")
    groups, bars = bare.count("(") + 1, bare.count("|")
    # However the bars are spread over the groups, the product of the alternatives is no greater than this.
    alternatives = ((bars + groups) / groups) ** min(groups, bars)
    if open_ended > 10 or optional > 40 or bars > 200:
        return float("inf")
    return comb(_LONGEST_NAME + open_ended, open_ended) * 2.0**optional * alternatives


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches from the start of `name`; one that is refused matches nothing."""
    literal = exact(pattern)
    if literal is not None:
        return literal == name
    return not refuse_pattern(pattern) and len(name) <= _LONGEST_NAME and re.match(pattern, name) is not None
