"""Passwords that this process was given: noted, and left out of texts for people and the store."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"
SHORTEST = 3
"""Characters of the shortest password that is looked for in texts."""
USER_INFO = re.compile(r"(?s)(?<=://)(?!/)([^@]*(?:@[^@]*)*)@")
"""What stands before the last `@` of an address: a raw password may itself hold an `@`."""
PARAMETER = re.compile(r"(?i)([?&][^=&#]*(?:passw|secret|token|api_?key)[^=&#]*=)([^&#]+)")
"""A parameter of an address whose value nobody may see."""

_noted: set[str] = set()


def note(*secrets: str) -> None:
    """Note passwords, each as it is, percent-encoded and decoded; an empty text is none."""
    for secret in filter(None, secrets):
        _noted.update({secret, quote(secret, safe=""), unquote(secret)})


def note_address(address: str) -> None:
    """Note the password of an address such as `https://NAME:PASSWORD@HOST`.

    A user name without a password is a token, as of `https://TOKEN@HOST` and `https://TOKEN:@HOST`.
    """
    if match := USER_INFO.search(address):
        name, _, password = match[1].partition(":")
        note(password or name)
    note(*(value for _, value in PARAMETER.findall(address)))


def hide(text: str) -> str:
    """Return a text without the passwords that were noted."""
    for secret in sorted(_noted, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, HIDDEN)
    return text


def hide_in(plain: Any) -> Any:
    """Return plain data whose texts lack the passwords that were noted.

    JSON escapes quotes and letters beyond ASCII, so texts are hidden before they are JSON.
    """
    if isinstance(plain, dict):
        return {hide(str(key)): hide_in(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [hide_in(value) for value in plain]
    return hide(plain) if isinstance(plain, str) else plain


def shown_address(address: str) -> str:
    """Return an address as people may see it: without its password or token."""
    address = PARAMETER.sub(rf"\1{HIDDEN}", address)
    match = USER_INFO.search(address)
    if match is None:
        return address
    name, _, password = match[1].partition(":")
    seen = f"{name}:{HIDDEN}" if password else HIDDEN
    return address[: match.start(1)] + seen + address[match.end(1) :]
