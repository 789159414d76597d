"""Regular expressions of a config that may come from anyone: which are safe to run, and what they match.

Python's engine has no time limit: a repeated group, or more than three open repeats, can take longer than anyone waits.
"""

from __future__ import annotations

import re

_LONGEST = 1000  # characters of a pattern, and of a name it is tried on


def refuse_pattern(pattern: str) -> str:
    """Why a regular expression is not run; empty if it is."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    if len(pattern) > _LONGEST or re.search(r"\)[*+{]", bare) or len(re.findall(r"[*+{]", bare)) > 3:
        return "could take exponential time, so wq does not run it"
    return ""


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches from the start of `name`; one that is refused matches nothing."""
    return not refuse_pattern(pattern) and len(name) <= _LONGEST and re.match(pattern, name) is not None
