"""Values that no JSON of ours holds: see ``featcache.untrusted``."""

from featcache.untrusted import MAX_TEXT

BAD_VALUES: dict[str, tuple[str, str]] = {
    "NaN": ("NaN", "NaN, which is not finite"),
    "infinity": ("Infinity", "Infinity, which is not finite"),
    "minus infinity": ("-Infinity", "-Infinity, which is not finite"),
    "a float too large": ("1e999", "1e999, which is not finite"),
    "minus a float too large": ("-1.5e400", "which is not finite"),
    "a number of 65 bits": (str(1 << 64), "beyond 64 bits"),
    "a number below 64 bits": (str(-(1 << 63) - 1), "beyond 64 bits"),
    "a number of 400 digits": ("1" + "0" * 400, "beyond 64 bits"),
    "a number of 5,000 digits": ("9" * 5000, "beyond 64 bits"),
    "lists too deep": ("[" * 70 + "]" * 70, "nested more than 64 deep"),
    "lists as deep as a parser goes": ("[" * 950 + "]" * 950, "nested more than 64 deep"),
    "lists without bottom": ("[" * 50_000 + "]" * 50_000, "nested more than 64 deep"),
    "objects too deep": ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
    "a key twice": ('{"k":1,"k":2}', "the key 'k' twice"),
    "a key twice, escaped": ('{"k":1,"\\u006b":2}', "the key 'k' twice"),
    "NUL": ('"a\\u0000b"', "a NUL"),
    "NUL in a key": ('{"a\\u0000b":1}', "a NUL"),
    "half a pair": ('"a\\ud800"', "half a character"),
    "the other half": ('"a\\udfff"', "half a character"),
    "half a pair in a key": ('{"\\ud83d":1}', "half a character"),
    "halves in the wrong order": ('"\\ude00\\ud83d"', "half a character"),
    "a text too long": ('"' + "x" * (MAX_TEXT + 1) + '"', "a text of 1,048,577 characters"),
}
"""What it is -> the JSON text, and what the refusal says."""
