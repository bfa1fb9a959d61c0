"""What the page says of the audit of the images: warnings first, in words for physicians."""

from __future__ import annotations

import re
from typing import Any

from featcache.cache.side_by_side import caches_of
from featcache.errors import escaped
from featcache.formatting import count
from featcache.reporting.facts import Facts
from featcache.reporting.names import as_word, short

_WARNINGS = ("Leaks", "Until they", "A shortcut", "Each class has one source", "Sources can be")


def describe_audit(facts: Facts) -> dict[str, Any]:
    """Return what the audit found, warnings first; of several caches that of each."""
    notes, num_leaks = list[tuple[bool, str]](), 0
    for cache, verdict in zip(caches_of(facts.cache), facts.audits, strict=True):
        name = short(cache.path.name)
        if verdict is None:
            text = f"{name} was never audited. Images that stand in training and in test, wrong "
            text += "labels, or classes that the file name tells, would make the figures too good, "
            text += f"and nobody has looked (featcache audit {as_word(cache.path.name)} does)."
            notes.append((True, text))
            continue
        num_leaks += int(verdict["num_leaks"])
        found = [(each["is_warning"], each["text"]) for each in verdict["findings"]]
        found = found or _sentences(verdict["verdict"])  # of an earlier version
        start = "" if len(facts.audits) == 1 else f"{name}: "
        notes += [(is_bad, start + escaped(" ".join(text.split()))) for is_bad, text in found]
    if not facts.is_own_cache:
        notes.append((True, "The cache has changed since the training."))
    notes.sort(key=lambda note: not note[0])
    title = "What the audit of the images says"
    is_bad = notes[0][0]
    if num_leaks:
        title = f"The audit found leaks: {count(num_leaks, 'set')} of copies"
    elif None in facts.audits:
        title = "The images were never audited"
    elif is_bad:
        title = "Warning: the audit of the images casts doubt on the figures"
    return {"title": title, "notes": notes, "is_bad": is_bad}


def _sentences(verdict: str) -> list[tuple[bool, str]]:
    """Return the sentences of a verdict without its options, and whether each is a warning."""
    for option in (": --csv joins them", " (--csv, then select --table)"):
        verdict = verdict.replace(option, "")
    return [
        (sentence.startswith(_WARNINGS), sentence)
        for sentence in re.split(r"(?<=\.) (?=[A-Z0-9])", verdict)
    ]
