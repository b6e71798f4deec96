"""The keys that open a server, and who each of them belongs to.

Only digests are kept: they have one length, so comparing them says nothing of the keys, and a name or a short digest is
all that logs and turns ever see.
"""

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path

from benthic.base.errors import InputError
from benthic.server.config import ServeConfig

NAME = re.compile(r"[A-Za-z0-9_.-]{1,32}", re.ASCII)


class Keys:
    """A set of keys, each written `key` or `name:key`. Empty: nobody needs one. InputError for what cannot be used."""

    def __init__(self, keys: Iterable[str] = ()):
        self._owners: list[tuple[bytes, str]] = []  # (digest, owner)
        for text in keys:
            name, _, key = text.rpartition(":")
            if not (key.isascii() and key.isprintable()) or " " in key or not key:
                raise InputError("an API key holds characters that a header cannot carry -> use letters, digits and -_")
            if name and not NAME.fullmatch(name):
                raise InputError(
                    f"{name[:40]!r} cannot be the name of an API key -> use up to 32 letters, digits and -_., "
                    "and no colon in a key"
                )
            digest = hashlib.sha256(key.encode()).digest()
            if any(digest == known for known, _ in self._owners):
                raise InputError(f"API key number {len(self._owners) + 1} is given twice -> leave one of them out")
            self._owners.append((digest, name or f"key-{digest.hex()[:8]}"))

    def __bool__(self) -> bool:
        return bool(self._owners)

    def owner(self, key: bytes) -> str:
        """Whose key it is, by its name or the beginning of its hash; "" for none of them. Every key is compared, in
        constant time, wherever the right one stands."""
        digest, found = hashlib.sha256(key).digest(), ""
        for known, owner in self._owners:
            if hmac.compare_digest(digest, known):
                found = owner
        return found


def read_keys(config: ServeConfig) -> Keys:
    """The keys from the flags, the file or BENTHIC_API_KEY, in this order: the first that has any.

    Raises InputError for a key that no header can carry, and where others could reach a server without a key.
    """
    given = [key for key in (os.environ.get("BENTHIC_API_KEY", ""),) if key]
    keys = Keys(config.api_key or _lines(config.api_key_file) or given)
    if not keys and not is_loopback(config.host):
        raise InputError(
            f"host {config.host} is reachable from other machines and no API key is set "
            "-> set BENTHIC_API_KEY or --api-key-file, or use --host 127.0.0.1"
        )
    if not keys and "*" in config.allowed_origins:
        raise InputError(
            "allowed_origins is * and no API key is set: any page that you open could use the model "
            "-> name the origins, or set a key"
        )
    return keys


def _lines(path: str) -> list[str]:
    """One key a line; blank lines and those that begin with # are passed over."""
    if not path:
        return []
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read api_key_file {path} ({type(error).__name__}) -> check the path") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise InputError(f"api_key_file {path} holds no key -> write one a line, as key or name:key")
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
