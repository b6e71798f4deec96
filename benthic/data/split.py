"""Which documents are held out for validation."""

from hashlib import sha256

from benthic.base.errors import InputError
from benthic.data.documents import Document


def is_held_out(document: Document, share: float, seed: int) -> bool:
    """True for about `share` of all documents. It depends on the id alone, not on order or shards."""
    if not 0 <= share <= 1:
        raise InputError(f"held-out share is {share} -> use a number from 0 to 1")
    digest = sha256(f"{seed}:{document.id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
