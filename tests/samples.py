# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Keys and other objects that several tests need one of."""

import hashlib
import random

import tarsnap

MACHINE = 0x0123456789abcdef
ROLES = (tarsnap.ROLE_READ, tarsnap.ROLE_WRITE, tarsnap.ROLE_DELETE,
         tarsnap.ROLE_NUKE)


def full_key(machine=MACHINE):
    """A new key of all roles, as if a server had registered it."""
    key = tarsnap.key_make('backup.example.org:9279', 'box')
    key.machine = machine
    key.store = bytes(range(16))
    key.pins = [hashlib.sha256(b'a server').digest()]
    key.path = 'sample.key'
    return key


def mutations(data, count, seed):
    """`count` copies of bytes `data`, each damaged in one to three places."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            at = rng.randrange(len(damaged)) if damaged else 0
            kind = rng.randrange(5)
            if kind == 0 and damaged:
                damaged[at] ^= 1 << rng.randrange(8)
            elif kind == 1 and damaged:
                damaged[at] = rng.choice((0, 1, 127, 128, 255))
            elif kind == 2:
                del damaged[at:at + rng.choice((1, 2, 4, 41))]
            elif kind == 3:
                damaged[at:at] = rng.randbytes(rng.choice((1, 2, 4, 41)))
            else:
                end = at + rng.choice((2, 4, 8))
                damaged[at:end] = b'\xff' * len(damaged[at:end])
        yield bytes(damaged)
