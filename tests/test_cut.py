# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The cut: same places as the rule read literally, and what it is good for."""

import functools
import io
import itertools
import os
import random
import tarfile
import unittest
from unittest import mock

import tarsnap
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from tarsnap import CHUNK_MAX, CHUNK_MIN, KIB, MIB

KEY = bytes(range(16))
SEED = int(os.environ.get('SEED', '20260101'))


def window_value(key):
    """A function: window of 16 bytes -> first 16 bits of its AES-128."""
    update = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update
    return lambda window: int.from_bytes(update(window)[:2], 'big')


def cut_naive(data, key):
    """The chunks of `data` by the rule, window by window."""
    value = window_value(key)
    chunks, start = [], 0
    while start < len(data):
        best, at, end = 16, None, start + CHUNK_MIN
        while end <= min(len(data), start + CHUNK_MAX):
            found = value(data[end - 16:end])
            if found == 0:
                break
            if found <= best and found < 16:
                best, at = found, end
            end += 1
        else:
            if len(data) - start < CHUNK_MAX:
                end = len(data)
            else:
                end = at or start + CHUNK_MAX
        chunks.append(data[start:end])
        start = end
    return chunks


def cut(data, key=KEY, sizes=(tarsnap.MIB,)):
    """The chunks by Cutter, fed in pieces of the `sizes` in turn."""
    cutter = tarsnap.Cutter(tarsnap.Scanner(key))
    chunks, at, turn = [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        chunks += cutter.feed(data[at:at + size])
        at += size
        turn += 1
    return list(map(bytes, chunks + cutter.finish()))


def text(rng, size):
    words = [bytes(rng.choice(b'abcdefghijklmnopqrstuvwxyz')
                   for _ in range(rng.randrange(2, 9))) for _ in range(500)]
    out = []
    while size > 0:
        line = b' '.join(rng.choice(words) for _ in range(10)) + b'\n'
        out.append(line)
        size -= len(line)
    return b''.join(out)


def tar(rng, size):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        number = 0
        while file.tell() < size:
            data = rng.randbytes(rng.randrange(20000))
            info = tarfile.TarInfo('directory/file%d' % number)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            number += 1
    return file.getvalue()


def disk_image(rng, size):
    """Blocks of 4 KiB: most empty, many with a header, some full."""
    out = []
    for number in range(size // 4096):
        kind = rng.randrange(4)
        if kind < 2:
            out.append(bytes(4096))
        elif kind == 2:
            out.append((b'BLK%08d' % number).ljust(4096, b'\0'))
        else:
            out.append(rng.randbytes(4096))
    return b''.join(out)


def key_where(test, block):
    """A key whose AES of `block` begins with 16 bits that pass `test`."""
    rng = random.Random(SEED)
    while True:
        key = rng.randbytes(16)
        if test(window_value(key)(block)):
            return key


@functools.lru_cache()
def key_strong():
    """A key with which a window of zeros ends a chunk."""
    return key_where(lambda value: value == 0, bytes(16))


class Reference(unittest.TestCase):
    """Cutter against the rule, on data of many kinds."""

    def check(self, data, key=KEY, *sizes):
        expected = cut_naive(data, key)
        self.assertEqual(b''.join(expected), data)
        lengths = [len(chunk) for chunk in expected]
        for pieces in sizes or ((MIB,), (64 * KIB,), (4096,), (1000, 3),
                                (256 * KIB + 1, 15)):
            chunks = cut(data, key, pieces)
            self.assertEqual([len(chunk) for chunk in chunks], lengths,
                             'pieces of %s' % (pieces,))
            self.assertEqual(b''.join(chunks), data)
        return lengths

    def test_random(self):
        rng = random.Random(SEED)
        lengths = self.check(rng.randbytes(900000))
        self.assertGreater(len(lengths), 5)

    def test_text(self):
        self.check(text(random.Random(SEED), 600000))

    def test_tar(self):
        self.check(tar(random.Random(SEED), 600000))

    def test_disk_image(self):
        self.check(disk_image(random.Random(SEED), 900000))

    def test_keys_matter(self):
        data = random.Random(SEED).randbytes(800000)
        lengths = self.check(data, b'another key 1234')
        self.assertNotEqual(lengths, [len(c) for c in cut(data)])

    def test_small_pieces(self):
        """Cuts found with windows that lie across many pieces."""
        key = key_where(lambda value: 0 < value < 16, b'#' * 16)
        data = bytearray(random.Random(SEED).randbytes(2 * CHUNK_MIN))
        data[CHUNK_MIN + 3:CHUNK_MIN + 19] = b'#' * 16
        self.check(bytes(data), key, (1,), (7,), (15,), (16,), (17,))
        data = random.Random(SEED).randbytes(300000)
        self.check(data, KEY, (113,), (1, 5000, 16, 15, 17))

    def test_windows_across_what_is_scanned_at_once(self):
        """A cut with so many bytes of its window in the next piece."""
        strong = b'#' * 16
        key = key_where(lambda value: value == 0, strong)
        data, ends = bytearray(random.Random(SEED).randbytes(300000)), []
        for inside in range(17):
            ends.append((inside + 1) * 17000 // 1000 * 1000 + inside)
            data[ends[-1] - 16:ends[-1]] = strong
        with mock.patch.object(tarsnap, 'FEED', 1000):
            lengths = self.check(bytes(data), key, (1000,))
        self.assertLessEqual(set(ends), set(itertools.accumulate(lengths)))

    def test_lengths_around_the_bounds(self):
        rng = random.Random(SEED)
        data = rng.randbytes(CHUNK_MAX + 20)
        for size in (0, 1, 15, 16, 17, CHUNK_MIN - 1, CHUNK_MIN,
                     CHUNK_MIN + 1):
            self.check(data[:size])
        key = key_where(lambda value: value >= 16, bytes(16))
        for size in (CHUNK_MAX - 1, CHUNK_MAX, CHUNK_MAX + 1, CHUNK_MAX + 15):
            lengths = self.check(bytes(size), key, (MIB,))
            self.assertEqual(lengths, [min(size, CHUNK_MAX)]
                             + [size - CHUNK_MAX] * (size > CHUNK_MAX))

    def test_no_candidate(self):
        """Constant data without 12 zero bits: the maximum."""
        key = key_where(lambda value: value >= 16, bytes(16))
        self.assertEqual(self.check(bytes(3 * CHUNK_MAX), key, (MIB,),
                                    (5000,)), [CHUNK_MAX] * 3)

    def test_ties(self):
        """Every window equal and weak: the last one, at the maximum."""
        key = key_where(lambda value: 0 < value < 16, bytes(16))
        self.assertEqual(self.check(bytes(2 * CHUNK_MAX), key, (MIB,),
                                    (50000,)), [CHUNK_MAX] * 2)

    def test_last_of_the_smallest(self):
        """A weak window twice in a quiet stream: cut after the second."""
        weak = b'0123456789abcdef'
        key = key_where(lambda value: 0 < value < 16, weak)
        rng = random.Random(SEED)
        value = window_value(key)
        while True:
            filler = bytes([rng.randrange(256)])
            data = bytearray(filler * (CHUNK_MAX + 5))
            for at in (40000, 90000):
                data[at:at + 16] = weak
            if all(value(data[at:at + 16]) >= 16 for at in (
                    *range(39980, 40000), *range(40001, 40020), 0)):
                break
        self.assertEqual(self.check(bytes(data), key, (MIB,), (70000,)),
                         [90016, CHUNK_MAX + 5 - 90016])

    def test_strong_everywhere(self):
        """Every window ends a chunk: the minimum, each time."""
        self.assertEqual(self.check(bytes(5 * CHUNK_MIN + 9), key_strong(),
                                    (MIB,), (1000,)), [CHUNK_MIN] * 5 + [9])

    def test_finish_begins_anew(self):
        data = random.Random(SEED).randbytes(400000)
        cutter = tarsnap.Cutter(tarsnap.Scanner(KEY))
        first = cutter.feed(data) + cutter.finish()
        self.assertEqual(cutter.feed(data) + cutter.finish(), first)
        self.assertEqual(cutter.finish(), [])


class InWorkers(unittest.TestCase):
    """The same cuts where a crew finds the windows, ahead of the cuts and in
    any order, while it seals blocks.
    """

    def setUp(self):
        self.key = tarsnap.key_make('', 'box')
        self.cut_key = tarsnap.cut_key(self.key)
        self.names = tarsnap.Names(self.key)
        self.sealed = 0
        self.begin()

    def begin(self):
        self.crew = tarsnap.Crew(self.key)
        self.crew.put = self.put
        self.addCleanup(self.crew.close)

    def put(self, _, length):
        self.sealed += length

    def cut(self, streams, sizes):
        """The chunks of several streams that are fed in turns."""
        scanner, total = tarsnap.Scanner(self.cut_key), 0
        cutters = [tarsnap.Cutter(scanner, self.crew) for _ in streams]
        out, ats, turn = [[] for _ in streams], [0] * len(streams), 0
        while any(at < len(data) for at, data in zip(ats, streams)):
            for number, data in enumerate(streams):
                at, size = ats[number], sizes[turn % len(sizes)]
                turn, ats[number] = turn + 1, at + size
                for chunk in cutters[number].feed(data[at:at + size]):
                    out[number].append(bytes(chunk))
                    self.crew.add(tarsnap.CHUNK, self.names.chunk(chunk),
                                  (chunk,), len(chunk))
                    total += len(chunk)
        for number, cutter in enumerate(cutters):
            out[number] += map(bytes, cutter.finish())
        self.crew.finish()
        self.assertEqual(self.sealed, total)
        return out

    def check(self, *streams, sizes):
        for data, chunks in zip(streams, self.cut(streams, sizes)):
            self.assertEqual(b''.join(chunks), data)
            self.assertEqual([len(chunk) for chunk in chunks],
                             [len(c) for c in cut(data, self.cut_key)])

    def test_kinds_of_data(self):
        rng = random.Random(SEED)
        self.check(rng.randbytes(5 * MIB), text(rng, MIB),
                   disk_image(rng, 3 * MIB), sizes=(MIB, 700000, 4096))

    def test_by_the_rule_itself(self):
        data = random.Random(SEED).randbytes(900000)
        (chunks,) = self.cut((data,), (100000,))
        self.assertEqual(chunks, cut_naive(data, self.cut_key))

    def test_more_hits_than_there_is_room_for(self):
        """The piece is scanned where it came from."""
        self.cut_key = key_strong()
        with mock.patch.object(tarsnap, 'cut_key', lambda _: self.cut_key):
            self.begin()
            self.check(bytes(MIB), random.Random(SEED).randbytes(MIB),
                       sizes=(tarsnap.PIECE,))

    def test_a_stream_is_dropped(self):
        cutter = tarsnap.Cutter(tarsnap.Scanner(self.cut_key), self.crew)
        rng = random.Random(SEED)
        for _ in range(3):
            cutter.feed(rng.randbytes(3 * MIB))
            cutter.drop()
        data = rng.randbytes(3 * MIB)
        self.assertEqual(
            [bytes(c) for c in cutter.feed(data) + cutter.finish()],
            cut(data, self.cut_key))


class Behaviour(unittest.TestCase):
    """What the rule is for."""

    def test_distribution(self):
        data = random.Random(SEED).randbytes(32 * MIB)
        lengths = sorted(map(len, cut(data)[:-1]))
        mean = sum(lengths) / len(lengths)
        print('\nseed %d: %d chunks of %d..%d bytes, mean %d, quartiles '
              '%d %d %d, %.1f %% by the fallback'
              % (SEED, len(lengths), lengths[0], lengths[-1], mean,
                 *(lengths[len(lengths) * n // 4] for n in (1, 2, 3)),
                 100 * self.by_fallback(data)))
        self.assertGreaterEqual(lengths[0], CHUNK_MIN)
        self.assertLessEqual(lengths[-1], CHUNK_MAX)
        # 16 KiB + 64 KiB * (1 - e^-3.75), less what the fallback cuts off.
        self.assertTrue(70 * KIB < mean < 88 * KIB, mean)

    def by_fallback(self, data):
        value = window_value(KEY)
        chunks = cut(data)[:-1]
        weak = sum(value(chunk[-16:]) != 0 for chunk in chunks)
        self.assertLess(weak / len(chunks), 0.08)
        return weak / len(chunks)

    def resent(self, old, new):
        """The part of `new`'s bytes in chunks that `old` has not."""
        known = set(cut(old))
        return sum(len(chunk) for chunk in cut(new)
                   if chunk not in known) / len(new)

    def test_insertion_resynchronises(self):
        rng = random.Random(SEED)
        data = rng.randbytes(8 * MIB)
        for changed in (b'x' + data, data[1:], data[:MIB] + b'x' + data[MIB:],
                        data[4 * MIB:] + data[:4 * MIB]):
            known = set(cut(data))
            new = [c for c in cut(changed) if c not in known]
            self.assertLessEqual(len(new), 5)
            self.assertGreater(len(new), 0)

    def test_records_of_one_size(self):
        for size in (48, 64, 100, 512):
            data = b''.join((b'%012d;name of %d;' % (n, n)).ljust(size, b'.')
                            for n in range(16 * MIB // size))
            for changed in (b'x' + data,
                            data[:5 * MIB] + b'x' + data[5 * MIB:]):
                with self.subTest(size=size):
                    part = self.resent(data, changed)
                    self.assertTrue(0 < part < 0.05, part)

    def test_zeros_are_one_chunk(self):
        self.assertEqual(len(set(cut(bytes(8 * MIB)))), 1)


if __name__ == '__main__':
    unittest.main()
