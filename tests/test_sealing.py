# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Sealed blocks: what opens them, what does not, and what they show."""

import contextlib
import os
import random
import struct
import tracemalloc
import unittest
import zlib
from unittest import mock

import samples
import tarsnap
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import aead
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from tarsnap import CHUNK, INDEX, RECORD, CorruptError, UserError

R, W, D, N = samples.ROLES
KEY = samples.full_key()
SECRETS = ('data_priv', 'refs_priv', 'mix_data', 'mix_refs', 'k_data',
           'k_refs', 'k_cut')
NAME = bytes(range(32))
OTHER = bytes(range(1, 33))

# Plain parts of one block of each class, some of which deflate does not
# shrink.
BLOCKS = {
    CHUNK: [b'chunk ' * 30],
    INDEX: [random.Random(1).randbytes(90), b'rows ' * 25],
    RECORD: [b'refs ' * 20, b'names', random.Random(2).randbytes(60)],
}


def split(block):
    """(header, [(part header, rest of the part)]) of a sealed block."""
    parts, at = [], 35
    while at < len(block):
        length, = struct.unpack_from('>I', block, at + 1)
        parts.append((block[at:at + 5], block[at + 5:at + 5 + length]))
        at += 5 + length
    return block[:35], parts


def join(header, parts):
    return header + b''.join(a + b for a, b in parts)


def refs_view(cls, block):
    """The prefix of a block that a server gives to a pruning key."""
    header, parts = split(block)
    return join(header, [part for part in parts if part[0][0] == 2])


class SealingTest(unittest.TestCase):
    def setUp(self):
        self.sealer = tarsnap.Sealer(KEY)
        self.opener = tarsnap.Opener(KEY)

    def check_corrupt(self, cls, name, block, opener=None, **kwargs):
        with self.assertRaises(CorruptError) as caught:
            (opener or self.opener).open(cls, name, block, **kwargs)
        self.assertNotIn('\n', str(caught.exception))


class Opening(SealingTest):
    def test_round_trip(self):
        for cls, parts in BLOCKS.items():
            for level in (0, 1, 9):
                for pad in (True, False):
                    sealer = tarsnap.Sealer(KEY, level, pad)
                    block = sealer.seal(cls, NAME, parts)
                    self.assertEqual(self.opener.open(cls, NAME, block),
                                     parts)

    def test_sizes(self):
        rng = random.Random(3)
        for size in (0, 1, 2, 15, 16, 255, 4096, 65537, 256 * 1024):
            for data in (bytes(size), rng.randbytes(size)):
                block = self.sealer.seal(CHUNK, NAME, [data])
                self.assertLessEqual(len(block), 288 * 1024)
                self.assertEqual(self.opener.open(CHUNK, NAME, block), [data])

    def test_layout(self):
        """As tarsnap-format(5) and the server have it."""
        for cls, recipients in ((CHUNK, [1]), (INDEX, [2, 1]),
                                (RECORD, [2, 2, 1])):
            block = self.sealer.seal(cls, NAME, BLOCKS[cls])
            header, parts = split(block)
            self.assertEqual(header[:3],
                             b'\1' + cls + bytes([len(recipients)]))
            self.assertEqual([part[0][0] for part in parts], recipients)

    def test_shared_secret_is_hkdf(self):
        ours = tarsnap.shared_secret(b's' * 32, b'p' * 32, b'e' * 32,
                                     b'm' * 32, 2)
        hkdf = HKDF(hashes.SHA256(), 32, b'e' * 32,
                    b'tarsnap-seal-1\1\2' + b'p' * 32)
        self.assertEqual(ours, hkdf.derive(b's' * 32 + b'm' * 32))

    def test_mix_secret_counts(self):
        """X25519 broken is not enough."""
        for field, cls in (('mix_data', CHUNK), ('mix_refs', RECORD)):
            other = KEY.subset({R})
            setattr(other, field, bytes(32))
            block = self.sealer.seal(cls, NAME, BLOCKS[cls])
            self.check_corrupt(cls, NAME, block, tarsnap.Opener(other))

    def test_secrets_remembered_are_bounded(self):
        blocks = [tarsnap.Sealer(KEY).seal(CHUNK, NAME, [b'x'])
                  for _ in range(tarsnap.SECRETS + 20)]
        for block in blocks + blocks[:1]:
            self.assertEqual(self.opener.open(CHUNK, NAME, block), [b'x'])
        self.assertLessEqual(len(self.opener.secrets), tarsnap.SECRETS)

    def test_write_key_opens_nothing(self):
        key = KEY.subset({W})
        for cls, parts in BLOCKS.items():
            block = tarsnap.Sealer(key).seal(cls, NAME, parts)
            self.assertEqual(self.opener.open(cls, NAME, block), parts)
            with self.assertRaises(UserError):
                tarsnap.Opener(key).open(cls, NAME, block)


class Tampering(SealingTest):
    def test_any_flipped_bit(self):
        for cls, parts in BLOCKS.items():
            block = self.sealer.seal(cls, NAME, parts)
            for at in range(len(block)):
                for bit in (1, 16, 128):
                    damaged = bytearray(block)
                    damaged[at] ^= bit
                    self.check_corrupt(cls, NAME, bytes(damaged))

    def test_any_truncation_or_addition(self):
        for cls, parts in BLOCKS.items():
            block = self.sealer.seal(cls, NAME, parts)
            for end in range(len(block)):
                self.check_corrupt(cls, NAME, block[:end])
            self.check_corrupt(cls, NAME, block + b'\0')
            self.check_corrupt(cls, NAME, block + block[35:])
            self.check_corrupt(cls, NAME, block[1:])

    def test_mutations(self):
        for cls, parts in BLOCKS.items():
            block = self.sealer.seal(cls, NAME, parts)
            for damaged in samples.mutations(block, 700, cls):
                if damaged != block:
                    self.check_corrupt(cls, NAME, damaged)

    def test_weak_ephemeral_keys(self):
        """Points of small order make an exchange of zeros."""
        block = self.sealer.seal(CHUNK, NAME, BLOCKS[CHUNK])
        for epk in (bytes(32), b'\1' + bytes(31),
                    (2 ** 255 - 19).to_bytes(32, 'little'),
                    (2 ** 255 - 20).to_bytes(32, 'little')):
            self.check_corrupt(CHUNK, NAME, block[:3] + epk + block[35:])

    def test_parts_of_two_blocks(self):
        for cls, parts in BLOCKS.items():
            one = split(self.sealer.seal(cls, NAME, parts))
            two = split(self.sealer.seal(cls, OTHER, parts))
            for number in range(len(parts)):
                mixed = list(one[1])
                mixed[number] = two[1][number]
                self.check_corrupt(cls, NAME, join(one[0], mixed))
                if len(parts) > 1:
                    self.check_corrupt(cls, OTHER, join(one[0], mixed))

    def test_parts_of_one_block(self):
        header, parts = split(self.sealer.seal(RECORD, NAME, [b'same'] * 3))
        swapped = [parts[1], parts[0], parts[2]]
        self.check_corrupt(RECORD, NAME, join(header, swapped))
        twice = [parts[0], parts[0], parts[2]]
        self.check_corrupt(RECORD, NAME, join(header, twice))

    def test_other_class(self):
        header, parts = split(self.sealer.seal(RECORD, NAME, [b'same'] * 3))
        epk = header[3:]
        self.check_corrupt(INDEX, NAME, join(b'\1i\2' + epk,
                                             [parts[0], parts[2]]))
        self.check_corrupt(CHUNK, NAME, join(b'\1c\1' + epk, parts[2:]))
        header, parts = split(self.sealer.seal(INDEX, NAME, [b'same'] * 2))
        self.check_corrupt(CHUNK, NAME, join(b'\1c\1' + header[3:], parts[1:]))
        self.check_corrupt(RECORD, NAME, join(header, parts))

    def test_other_name_or_machine(self):
        other = KEY.subset({R})
        other.machine += 1
        for cls, parts in BLOCKS.items():
            block = self.sealer.seal(cls, NAME, parts)
            self.check_corrupt(cls, OTHER, block)
            self.check_corrupt(cls, NAME, block, tarsnap.Opener(other))

    def test_longer_than_any(self):
        """Well sealed, but with more zeros than the ceiling has room for."""
        plain = tarsnap.PLAIN_HEAD.pack(0, 4, 4) + b'data'
        for cls, ceiling in ((CHUNK, 288 * 1024), (INDEX, 1024 * 1024)):
            for zeros, good in ((1000, True), (ceiling, False)):
                with mock.patch.object(tarsnap, 'frame_plain',
                                       lambda *args: plain + bytes(zeros)):
                    parts = [b'data'] * len(BLOCKS[cls])
                    block = self.sealer.seal(cls, NAME, parts)
                if good:
                    self.assertEqual(self.opener.open(cls, NAME, block),
                                     parts)
                else:
                    self.check_corrupt(cls, NAME, block)


class Pruning(SealingTest):
    """The delete role learns references and names, and nothing else."""

    def setUp(self):
        super().setUp()
        self.prune = KEY.subset({D})
        self.blind = tarsnap.Opener(self.prune)

    def test_opens_refs_parts_only(self):
        for cls, count in ((INDEX, 1), (RECORD, 2)):
            block = self.sealer.seal(cls, NAME, BLOCKS[cls])
            view = refs_view(cls, block)
            self.assertLess(len(view), len(block))
            for shown in (view, block):
                self.assertEqual(
                    self.blind.open(cls, NAME, shown, refs_only=True),
                    BLOCKS[cls][:count])
            with self.assertRaises(UserError):
                self.blind.open(cls, NAME, block)
            self.check_corrupt(cls, NAME, view)
        block = self.sealer.seal(CHUNK, NAME, BLOCKS[CHUNK])
        self.assertEqual(self.blind.open(CHUNK, NAME, block, True), [])
        with self.assertRaises(UserError):
            self.blind.open(CHUNK, NAME, block)

    def test_view_damaged_anywhere(self):
        for cls in (INDEX, RECORD):
            view = refs_view(cls, self.sealer.seal(cls, NAME, BLOCKS[cls]))
            for at in range(len(view)):
                damaged = bytearray(view)
                damaged[at] ^= 4
                self.check_corrupt(cls, NAME, bytes(damaged), self.blind,
                                   refs_only=True)
                self.check_corrupt(cls, NAME, view[:at], self.blind,
                                   refs_only=True)

    def test_holds_nothing_to_read_or_confirm_with(self):
        content = tarsnap.key_encode(self.prune)
        for field in ('data_priv', 'mix_data', 'k_data', 'k_cut'):
            self.assertEqual(getattr(self.prune, field), b'')
            self.assertNotIn(getattr(KEY, field), content)
        for role in (R, W, N):
            self.assertNotIn(KEY.sign_privs[role], content)
        self.assertEqual(b''.join(sorted(tarsnap.Names(self.prune).macs)),
                         b'anps')

    def test_no_secret_it_holds_makes_a_name_of_content(self):
        """Guess a file: with what the key has, no name comes out equal."""
        names, rows = tarsnap.Names(KEY), b'the rows of /etc/passwd'
        wanted = {names.chunk(rows), names.rows(rows), names.content(rows)}
        held = [getattr(self.prune, field) for field in SECRETS
                if getattr(self.prune, field)]
        held += self.prune.sign_privs.values()
        self.assertEqual(len(held), 4)
        for secret in held:
            guess = KEY.subset({R})
            guess.k_data = secret
            names = tarsnap.Names(guess)
            self.assertFalse(wanted & {names.chunk(rows), names.rows(rows),
                                       names.content(rows)})

    def test_rows_cannot_be_opened_with_what_it_holds(self):
        block = self.sealer.seal(INDEX, NAME, BLOCKS[INDEX])
        guess = KEY.subset({D})
        guess.data_priv, guess.mix_data = guess.refs_priv, guess.mix_refs
        self.check_corrupt(INDEX, NAME, block, tarsnap.Opener(guess))


def padme_naive(length):
    """The next length whose last bits, as the paper has it, are zero."""
    exponent = 0
    while 2 ** (exponent + 1) <= length:
        exponent += 1
    kept = 0
    while 2 ** kept <= exponent:
        kept += 1
    step = 2 ** max(0, exponent - kept)
    while length % step:
        length += 1
    return length


class Padding(SealingTest):
    def test_padme(self):
        rng = random.Random(4)
        for length in list(range(2, 3000)) + [
                rng.randrange(3000, 300000) for _ in range(300)]:
            self.assertEqual(tarsnap.padme(length), padme_naive(length))
        self.assertEqual([tarsnap.padme(n) for n in (0, 1)], [0, 1])

    def test_overhead_bounds(self):
        for start, percent in ((2, 12), (4096, 6.3), (65536, 3.2)):
            worst = max(tarsnap.padme(n) / n
                        for n in range(start, 300000, 1 if start == 2 else 7))
            self.assertLess(worst, 1 + percent / 100)

    def test_every_part_has_a_padme_length(self):
        rng = random.Random(5)
        for _ in range(200):
            parts = [rng.randbytes(rng.randrange(3000)) for _ in range(3)]
            for _, part in split(self.sealer.seal(RECORD, NAME, parts))[1]:
                self.assertEqual(tarsnap.padme(len(part)), len(part))

    def test_no_pad_adds_nothing(self):
        sealer = tarsnap.Sealer(KEY, 0, False)
        for size in range(0, 600, 7):
            block = sealer.seal(CHUNK, NAME, [bytes(size)])
            self.assertEqual(len(block), 35 + 5 + 12 + 9 + size + 16)

    def test_unframe_refuses(self):
        def refuse(plain):
            with self.assertRaises(CorruptError):
                tarsnap.unframe_plain(plain, 1000, 'block')
        head = tarsnap.PLAIN_HEAD.pack
        packed = tarsnap.deflate(b'data' * 9, 9)
        self.assertEqual(tarsnap.unframe_plain(
            head(1, 36, len(packed)) + packed + bytes(5), 1000, ''),
            b'data' * 9)
        for zeros in (b'\1', b'\0\0\1', b'\1\0\0', b'\0\x80\0'):
            refuse(head(0, 4, 4) + b'data' + zeros)
            refuse(head(1, 36, len(packed)) + packed + zeros)
        refuse(head(0, 5, 4) + b'data')             # two lengths
        refuse(head(0, 3, 4) + b'data')
        refuse(head(0, 5, 5) + b'data')             # over its end
        refuse(head(2, 4, 4) + b'data')             # codec
        refuse(head(0, 1001, 1001) + bytes(1001))   # ceilings
        refuse(head(1, 1001, len(packed)) + packed)
        refuse(head(1, 35, len(packed)) + packed)   # inflates to more
        refuse(head(1, 37, len(packed)) + packed)   # to less
        refuse(head(1, 36, len(packed) - 1) + packed[:-1])
        refuse(head(1, 36, len(packed) + 1) + packed + b'\0')
        refuse(head(1, 36, len(packed)) + zlib.compress(b'data' * 9)[:9])
        refuse(b'')
        refuse(head(0, 0, 0)[:-1])
        self.assertEqual(tarsnap.unframe_plain(head(0, 0, 0), 1, ''), b'')

    def test_padding_is_checked_inside_a_seal(self):
        """Also what the write key itself has sealed."""
        plain = tarsnap.PLAIN_HEAD.pack(0, 4, 4) + b'data'
        for tail, good in ((bytes(7), True), (b'\0\0\0\0\0\0\1', False)):
            with mock.patch.object(tarsnap, 'frame_plain',
                                   lambda *args: plain + tail):
                block = self.sealer.seal(CHUNK, NAME, [b'data'])
            if good:
                self.assertEqual(self.opener.open(CHUNK, NAME, block),
                                 [b'data'])
            else:
                self.check_corrupt(CHUNK, NAME, block)

    def test_bombs_do_not_go_off(self):
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = b''.join(packer.compress(bytes(1 << 20))
                          for _ in range(200)) + packer.flush()
        self.assertLess(len(packed), 256 * 1024)
        for length in (0, 100, 256 * 1024):
            plain = tarsnap.PLAIN_HEAD.pack(1, length, len(packed)) + packed
            with mock.patch.object(tarsnap, 'frame_plain',
                                   lambda *args: plain):
                block = self.sealer.seal(CHUNK, NAME, [b''])
            tracemalloc.start()
            try:
                self.check_corrupt(CHUNK, NAME, block)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            self.assertLess(peak, 3 << 20)


class Recorder:
    """Stands for AESGCM and writes down each (key, nonce) sealed with."""

    def __init__(self, pairs):
        self.pairs = pairs
        self.real = aead.AESGCM

    def __call__(self, key):
        real, pairs = self.real, self.pairs

        class Worker:
            def encrypt(self, nonce, data, aad):
                pairs.append((key, nonce))
                # Old versions of cryptography look their own class up.
                with mock.patch.object(aead, 'AESGCM', real):
                    return real(key).encrypt(nonce, data, aad)
        return Worker()


def seal_all(sealer, tag, seed, pairs):
    """Seal three blocks that no other `tag` has, with chosen randomness."""
    rng = random.Random(seed)
    with mock.patch.object(os, 'urandom', rng.randbytes), \
            mock.patch.object(aead, 'AESGCM', Recorder(pairs)):
        for number, (cls, parts) in enumerate(sorted(BLOCKS.items())):
            name = bytes([number]) + tag * 31
            sealer.seal(cls, name, [tag + part for part in parts])


class Clones(SealingTest):
    """A copied, restored or forked process never repeats (key, nonce)."""

    def check(self, one, two):
        self.assertEqual((len(one), len(two)), (6, 6))
        # The clones did draw the same nonces; their keys differ.
        self.assertEqual([nonce for _, nonce in one],
                         [nonce for _, nonce in two])
        self.assertEqual(len({key for key, _ in one + two}), 12)

    def test_copied_state(self):
        self.sealer.ephemeral()
        clone = tarsnap.Sealer(KEY)
        clone.fresh = self.sealer.fresh
        one, two = [], []
        seal_all(self.sealer, b'a', 6, one)
        seal_all(clone, b'b', 6, two)
        self.assertIs(clone.fresh, self.sealer.fresh)
        self.check(one, two)

    def test_every_part_has_a_key_of_its_own(self):
        pairs = []
        seal_all(self.sealer, b'a', 7, pairs)
        self.assertEqual(len({key for key, _ in pairs}), 6)

    def forked(self, patched):
        """The (key, nonce) pairs and the epk of a child, after os.fork."""
        self.sealer.ephemeral()
        pid = os.getpid()
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                pairs = []
                with mock.patch.object(os, 'getpid', lambda: pid) if patched \
                        else contextlib.nullcontext():
                    seal_all(self.sealer, b'b', 8, pairs)
                os.write(write, b''.join(
                    key + nonce for key, nonce in pairs)
                    + self.sealer.fresh[1])
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, 'rb') as file:
            data = file.read()
        os.waitpid(child, 0)
        self.assertEqual(len(data), 6 * 44 + 32)
        pairs = [(data[at:at + 32], data[at + 32:at + 44])
                 for at in range(0, 6 * 44, 44)]
        return pairs, data[-32:]

    def test_fork(self):
        pairs, epk = self.forked(patched=False)
        one = []
        seal_all(self.sealer, b'a', 8, one)
        self.check(one, pairs)
        self.assertNotEqual(epk, self.sealer.fresh[1])

    def test_fork_not_noticed(self):
        """Even a child that went on with the parent's ephemeral key."""
        pairs, epk = self.forked(patched=True)
        one = []
        seal_all(self.sealer, b'a', 8, one)
        self.check(one, pairs)
        self.assertEqual(epk, self.sealer.fresh[1])

    def test_equal_blocks_look_unlike(self):
        for cls, parts in BLOCKS.items():
            one = self.sealer.seal(cls, NAME, parts)
            same = self.sealer.seal(cls, NAME, parts)
            other = tarsnap.Sealer(KEY).seal(cls, NAME, parts)
            for two, start in ((same, 35), (other, 3)):
                self.assertEqual(len(one), len(two))
                self.assertFalse(any(one[at:at + 16] == two[at:at + 16]
                                     for at in range(start, len(one) - 15)))


if __name__ == '__main__':
    unittest.main()
