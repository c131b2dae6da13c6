"""The library is called as the standards say: published vectors, and HKDF written out with the standard library."""

from __future__ import annotations

import hmac
import json

import numpy as np
import pytest

from lorica.secure_sum.primitives import agree, keystream, open_sealed, private_key, public_key, seal

# RFC 7748, section 6.1.
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
BOB_PUBLIC = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
AGREED = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")

# RFC 8439, appendix A.1: vectors 1 and 2 (key 0, blocks 0 and 1), and 3 (key 1, block 1).
KEY_0_BLOCK_0 = (
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)
KEY_0_BLOCK_1 = (
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)
KEY_1_BLOCK_1 = (
    "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
    "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"
)


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt, one block."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def test_public_keys_are_those_of_rfc_7748() -> None:
    assert public_key(ALICE) == ALICE_PUBLIC
    assert public_key(BOB) == BOB_PUBLIC


def test_both_sides_agree_on_hkdf_of_the_secret_of_rfc_7748() -> None:
    expected = hkdf(AGREED, json.dumps(["mask", "run", 1, 2]).encode())
    assert agree(ALICE, BOB_PUBLIC, "mask", "run", 1, 2) == expected
    assert agree(BOB, ALICE_PUBLIC, "mask", "run", 1, 2) == expected
    assert agree(BOB, ALICE_PUBLIC, "share", "run", 1, 2) != expected


@pytest.mark.parametrize("point", [0, 1, 2**255 - 19, 2**255 - 20])
def test_keys_of_small_order_are_refused(point: int) -> None:
    with pytest.raises(ValueError, match="shared key"):
        agree(ALICE, point.to_bytes(32, "little"), "mask")


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_the_keystream_is_that_of_rfc_8439(dtype: str) -> None:
    word = np.dtype(dtype)
    count = 128 // word.itemsize
    assert keystream(bytes(32), count, word).tobytes().hex() == KEY_0_BLOCK_0 + KEY_0_BLOCK_1
    assert keystream(bytes(31) + b"\x01", count, word).tobytes().hex()[128:] == KEY_1_BLOCK_1


def test_words_are_little_endian() -> None:
    assert int(keystream(bytes(32), 1, np.dtype("<u4"))[0]) == 0xADE0B876


def test_what_is_sealed_opens_with_the_same_key_and_context_only() -> None:
    key, content = private_key(), b"shares"
    sealed = seal(key, content, "run", 1, 2)
    assert open_sealed(key, sealed, "run", 1, 2) == content
    assert open_sealed(private_key(), sealed, "run", 1, 2) is None
    for context in [("run", 2, 1), ("other", 1, 2), ("run", 1, 3), ("run", 1)]:
        assert open_sealed(key, sealed, *context) is None
    for index in range(len(sealed)):
        altered = sealed[:index] + bytes([sealed[index] ^ 1]) + sealed[index + 1 :]
        assert open_sealed(key, altered, "run", 1, 2) is None
    for length in range(len(sealed)):
        assert open_sealed(key, sealed[:length], "run", 1, 2) is None


def test_sealing_twice_never_repeats_a_nonce() -> None:
    key = private_key()
    assert len({seal(key, b"shares", "run")[:12] for _ in range(1000)}) == 1000
