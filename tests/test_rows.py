# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Rows, index blocks, records and commits: extremes, and damaged bytes."""

import os
import struct
import unittest

import samples
import tarsnap
from tarsnap import (CHUNK, COMPLETE, EVERYTHING, EXTENT_LIST, HOLE, INDEX,
                     KIND_ABORT, KIND_DELETE, KIND_NUKE, KIND_WRITE, NOTHING,
                     OPEN, PAGE, PAGE_LIST, CorruptError, Kid, Reader)

SEED = os.environ.get('SEED', '20260101')
KEY = samples.full_key()
MOST = (1 << 64) - 1
U32_MOST = (1 << 32) - 1
MUTATIONS = 2000


def fields(thing):
    """The slots of an object, to compare two."""
    return {name: getattr(thing, name) for name in thing.__slots__}


def entry(kind, **values):
    made = tarsnap.Entry()
    made.kind = kind
    made.path = b'a/path'
    for name, value in values.items():
        setattr(made, name, value)
    return made


def entries():
    """Rows of every kind, with the ends of every field's range."""
    full = tuple((b'user.%d' % n, n if n % 2 else b'v' * n)
                 for n in range(6))
    size = 256 * 1024
    return [
        entry(tarsnap.FILE),
        entry(tarsnap.FILE, path=b'/' * 65535, mode=0o7777, uid=U32_MOST,
              gid=U32_MOST, uname=b'u' * 255, gname=b'\xff' * 255,
              mtime=-1, atime=-(1 << 63) * 10 ** 9, link=(MOST, U32_MOST),
              xattrs=full, digest=b'd' * 16, size=3 * size + 10,
              extents=((0, 0, size, 1), (9, size - 1, 1, 10),
                       (HOLE, 0, size, 1), (1, 1, size // 2, 2))),
        entry(tarsnap.FILE, size=1 << 40, extents=(
            (3, 0, 1 << 18, 1 << 22),)),
        entry(tarsnap.FILE, size=MOST, lists=(0, 9, 5), level=255),
        entry(tarsnap.FILE, mtime=((1 << 63) - 1) * 10 ** 9 + 999999999,
              atime=0),
        entry(tarsnap.DIRECTORY, xattrs=((b'', b''), (b'x' * 255, 9))),
        entry(tarsnap.SYMLINK, target=b't' * 65535),
        entry(tarsnap.SYMLINK, target=b''),
        entry(tarsnap.FIFO, atime=999999999),
        entry(tarsnap.CHARDEV, device=(U32_MOST, 0)),
        entry(tarsnap.BLOCKDEV, device=(0, U32_MOST), link=(0, 0)),
    ]


def page(rows, count=10):
    kids = [Kid(CHUNK, bytes([n]) * 32, 1000) for n in range(count)]
    return tarsnap.IndexBlock(PAGE, 0, bytes(32), kids, rows, b'n' * 32)


def record():
    made = tarsnap.Record()
    made.machine = KEY.machine
    made.title = b'N' * 1023
    made.archive = tarsnap.Names(KEY).archive(made.title)
    made.series, made.lineage, made.tid = b's' * 16, b'l' * 16, b't' * 16
    made.base = (MOST, b'h' * 32)
    made.sorted, made.level = True, 255
    made.entries = made.pages = made.bytes = MOST
    made.kids = [Kid(INDEX, bytes([n]) * 32, n, n) for n in range(64)]
    made.created = MOST
    made.argv = [b'tarsnap', b'', b'\xff' * 5000]
    made.host = b'host'
    return made


def commit(kind=KIND_WRITE, many=3):
    made = tarsnap.Commit(KEY.machine, MOST, b'H' * 32, kind, b't' * 16)
    if kind in (KIND_WRITE, KIND_DELETE):
        made.linked = [(bytes([n % 256]) * 32, b'r' * 32, b'l' * 16,
                        1 + n % 3) for n in range(many)]
        made.unlinked = [(b'u' * 32, b'r' * 32)] * many
        made.puts = (MOST, b'p' * 32)
        made.deleted = (7, b'd' * 32)
        made.live = b'L' * 32
        made.note = tarsnap.note_seal(KEY, made.n, range(9))
    if kind == KIND_NUKE:
        made.deleted = (EVERYTHING, bytes(32))
    return made


class DamageTest(unittest.TestCase):
    def check_corrupt(self, call, *args):
        with self.assertRaises(CorruptError) as caught:
            call(*args)
        self.assertNotIn('\n', str(caught.exception))

    def check_survives(self, data, decode, least):
        """Damaged copies decode, or raise CorruptError and nothing else.

        At least `least` of them must be refused: else nothing was tried.
        """
        refused = 0
        for damaged in samples.mutations(data, MUTATIONS, SEED):
            try:
                decode(damaged)
            except CorruptError:
                refused += 1
            except Exception as e:
                self.fail('seed %s: %r from %s' % (SEED, e, damaged.hex()))
        self.assertGreater(refused, least)


class Rows(DamageTest):
    def decode(self, rows, count=10):
        return list(tarsnap.page_entries(page(rows, count)))

    def test_round_trip(self):
        made = entries()
        rows = b''.join(map(tarsnap.row_pack, made))
        decoded = self.decode(rows)
        self.assertEqual([fields(e) for e in decoded],
                         [fields(e) for e in made])
        self.assertEqual(b''.join(map(tarsnap.row_pack, decoded)), rows)

    def test_every_truncation(self):
        for made in entries():
            row = tarsnap.row_pack(made)
            for end in (*range(1, min(len(row), 400)),
                        *range(400, len(row), 997), len(row) - 1):
                self.check_corrupt(self.decode, row[:end])
                # With a length that fits what is left.
                if end > 4:
                    self.check_corrupt(self.decode,
                                       struct.pack('>I', end - 4) + row[4:end])
            self.check_corrupt(self.decode, row + b'\0')
            longer = struct.pack('>I', len(row) - 3) + row[4:] + b'\0'
            self.check_corrupt(self.decode, longer)

    def test_mutations(self):
        made = entries()
        made[1].path = b'shorter, so that the rest is hit'
        made[6].target = b'too'
        for one in made:
            self.check_survives(tarsnap.row_pack(one), self.decode, 300)

    def test_kids_out_of_range(self):
        bad = [entry(tarsnap.FILE, size=1, extents=((10, 0, 1, 1),)),
               entry(tarsnap.FILE, size=1, extents=((HOLE - 1, 0, 1, 1),)),
               entry(tarsnap.FILE, lists=(0, 10), level=1),
               entry(tarsnap.FILE, lists=(HOLE,), level=1),
               entry(tarsnap.DIRECTORY, xattrs=((b'n', 10),))]
        for one in bad:
            self.check_corrupt(self.decode, tarsnap.row_pack(one))
        good = entry(tarsnap.FILE, size=1, extents=((9, 0, 1, 1),))
        self.assertEqual(len(self.decode(tarsnap.row_pack(good))), 1)
        self.check_corrupt(self.decode, tarsnap.row_pack(good), 9)

    def test_malformed(self):
        size = 256 * 1024
        bad = [entry(tarsnap.FILE, path=b''),
               entry(tarsnap.FILE, path=b'a\0b'),
               entry(tarsnap.FILE, mode=0o10000),
               entry(ord('h')), entry(0),
               entry(tarsnap.FILE, size=1),
               entry(tarsnap.FILE, size=9, extents=((0, 0, 10, 1),)),
               entry(tarsnap.FILE, size=9, extents=((0, 0, 4, 2),)),
               entry(tarsnap.FILE, size=9, extents=((HOLE, 1, 9, 1),)),
               entry(tarsnap.FILE, size=18, extents=((HOLE, 0, 9, 2),)),
               entry(tarsnap.FILE, size=0, extents=((0, 0, 0, 1),)),
               entry(tarsnap.FILE, size=0, extents=((0, 0, 9, 0),)),
               entry(tarsnap.FILE, size=2, extents=((0, size - 1, 2, 1),)),
               entry(tarsnap.FILE, size=1, extents=((0, U32_MOST, 1, 1),))]
        for one in bad:
            self.check_corrupt(self.decode, tarsnap.row_pack(one))


class Index(DamageTest):
    def setUp(self):
        self.kids = [Kid(CHUNK, b'c' * 32, U32_MOST, U32_MOST),
                     Kid(INDEX, b'i' * 32, 0, 0)]

    def decode(self, refs):
        return tarsnap.index_unpack(refs, b'n' * 32)

    def test_round_trip(self):
        for kind, level in ((PAGE, 0), (PAGE_LIST, 1), (EXTENT_LIST, 255)):
            for kids in ([], self.kids, self.kids * 2000):
                refs = tarsnap.index_refs(kind, level, b'd' * 32, kids)
                block = self.decode(refs)
                self.assertEqual((block.kind, block.level, block.digest),
                                 (kind, level, b'd' * 32))
                self.assertEqual([fields(kid) for kid in block.kids],
                                 [fields(kid) for kid in kids])

    def test_malformed(self):
        refs = tarsnap.index_refs(PAGE, 0, bytes(32), self.kids)
        for end in range(len(refs)):
            self.check_corrupt(self.decode, refs[:end])
        self.check_corrupt(self.decode, refs + b'\0')
        self.check_corrupt(self.decode, refs + self.kids[0].pack())
        for kind, level in ((0, 0), (4, 1), (PAGE, 1), (PAGE_LIST, 0),
                            (EXTENT_LIST, 0), (255, 255)):
            self.check_corrupt(self.decode, tarsnap.index_refs(
                kind, level, bytes(32), self.kids))
        for cls in (b'a', b'\0', b'd'):
            self.check_corrupt(self.decode, tarsnap.index_refs(
                PAGE, 0, bytes(32), [Kid(cls, bytes(32), 1)]))

    def test_mutations(self):
        refs = tarsnap.index_refs(PAGE_LIST, 2, b'd' * 32, self.kids * 3)
        self.check_survives(refs, self.decode, 500)

    def test_a_count_from_outside_allocates_nothing(self):
        refs = bytearray(tarsnap.index_refs(PAGE, 0, bytes(32), []))
        refs[-4:] = b'\xff' * 4
        self.check_corrupt(self.decode, bytes(refs))

    def test_notes(self):
        notes = [(b'', 0, 0), (b'p' * 65535, MOST, MOST)]
        rows = tarsnap.list_notes_pack(notes)
        block = page(rows, 2)
        self.assertEqual(tarsnap.list_notes(block), notes)
        for count in (1, 3):
            self.check_corrupt(tarsnap.list_notes, page(rows, count))
        for end in range(0, len(rows), 501):
            self.check_corrupt(tarsnap.list_notes, page(rows[:end], 2))
        notes[1] = (b'name', 5, 5)
        self.check_survives(
            tarsnap.list_notes_pack(notes),
            lambda rows: tarsnap.list_notes(page(rows, 2)), 500)

    def test_extents(self):
        extents = ((9, 0, 1 << 18, U32_MOST), (HOLE, 0, MOST >> 32, 1))
        rows = b''.join(tarsnap.EXTENT.pack(*e) for e in extents)
        self.assertEqual(tarsnap.list_extents(page(rows)), extents)
        for end in range(1, len(rows)):
            if end != tarsnap.EXTENT.size:
                self.check_corrupt(tarsnap.list_extents, page(rows[:end]))
        self.check_corrupt(tarsnap.list_extents, page(rows, 9))
        self.check_survives(
            rows, lambda rows: tarsnap.list_extents(page(rows)), 500)


class Records(DamageTest):
    def decode(self, parts, key=KEY):
        return tarsnap.record_unpack(parts, b'n' * 32, key)

    def resigned(self, refs):
        return refs[:-64] + tarsnap.sign(KEY.sign_privs[2], refs[:-64])

    def test_round_trip(self):
        made = record()
        parts = tarsnap.record_pack(made, KEY)
        made.name = b'n' * 32
        decoded = self.decode(parts)
        for thing in (made, decoded):
            thing.kids = [fields(kid) for kid in thing.kids]
        self.assertEqual(fields(decoded), fields(made))

    def test_pruning_key_sees_all_but_meta(self):
        parts = tarsnap.record_pack(record(), KEY)
        decoded = self.decode(parts[:2], KEY.subset({3}))
        self.assertEqual(decoded.title, record().title)
        self.assertEqual((decoded.argv, decoded.host), ([], b''))

    def test_equal_records_have_unlike_parts(self):
        one, two = (tarsnap.record_pack(record(), KEY) for _ in range(2))
        for a, b in zip(one, two):
            self.assertNotEqual(a, b)

    def test_signature(self):
        parts = tarsnap.record_pack(record(), KEY)
        other = samples.full_key()      # same machine number, other keys
        other.k_refs = KEY.k_refs
        self.check_corrupt(self.decode, parts, other)
        for role in (1, 3, 4):
            refs = parts[0][:-64]
            refs += tarsnap.sign(KEY.sign_privs[role], refs)
            self.check_corrupt(self.decode, [refs] + parts[1:])
        for at in range(len(parts[0])):
            refs = bytearray(parts[0])
            refs[at] ^= 1
            self.check_corrupt(self.decode, [bytes(refs)] + parts[1:])

    def test_machine(self):
        made = record()
        made.machine += 1
        parts = tarsnap.record_pack(made, KEY)
        with self.assertRaisesRegex(CorruptError, 'another machine'):
            self.decode(parts)

    def test_mixed_parts(self):
        one, two = (tarsnap.record_pack(record(), KEY) for _ in range(2))
        for parts in ([one[0], two[1], one[2]], [one[0], one[1], two[2]],
                      [one[0], one[2], one[1]], [one[0], two[1]]):
            with self.assertRaisesRegex(CorruptError, 'mixed'):
                self.decode(parts)

    def test_wrong_archive_id(self):
        made = record()
        made.archive = tarsnap.Names(KEY).archive(b'other')
        with self.assertRaisesRegex(CorruptError, 'archive id'):
            self.decode(tarsnap.record_pack(made, KEY))

    def test_truncations(self):
        parts = tarsnap.record_pack(record(), KEY)
        for end in range(len(parts[0])):
            self.check_corrupt(self.decode, [parts[0][:end]] + parts[1:])
        for end in range(64, len(parts[0]), 3):
            self.check_corrupt(self.decode,
                               [self.resigned(parts[0][:end])] + parts[1:])
        for number in (1, 2):
            for end in range(len(parts[number])):
                mixed = list(parts)
                mixed[number] = parts[number][:end]
                self.check_corrupt(self.decode, mixed)

    def test_mutations(self):
        parts = tarsnap.record_pack(record(), KEY)
        self.check_survives(parts[0], lambda refs: self.decode(
            [refs] + parts[1:]), MUTATIONS * 9 // 10)
        # Signed by whoever stole the write key: the parser itself.
        self.check_survives(parts[0], lambda refs: self.decode(
            [self.resigned(refs)] + parts[1:]), 500)

    def test_mutations_of_names_and_meta(self):
        made = record()
        made.title, made.argv = b'name', [b'tarsnap', b'-c', b'']
        parts = tarsnap.record_pack(made, KEY)

        def names(part):
            tarsnap.record_names(tarsnap.Record(), part)

        def meta(part):
            tarsnap.record_meta(tarsnap.Record(), part)
        for part, decode in ((parts[1], names), (parts[2], meta)):
            decode(part)
            for end in range(len(part)):
                self.check_corrupt(decode, part[:end])
            self.check_corrupt(decode, part + b'\0')
            self.check_survives(part, decode, 300)


class Commits(DamageTest):
    def decode(self, data, key=KEY):
        return tarsnap.commit_unpack(data, key)

    def test_round_trip(self):
        for kind in (KIND_WRITE, KIND_DELETE, KIND_NUKE, KIND_ABORT):
            for many in (0, 3, 1000):
                made = commit(kind, many)
                decoded = self.decode(tarsnap.commit_pack(made, KEY))
                self.assertEqual(fields(decoded), fields(made))
        self.assertEqual(tarsnap.note_open(KEY, self.decode(
            tarsnap.commit_pack(commit(), KEY))), tuple(range(9)))

    def test_layout(self):
        """Lengths as the protocol has them."""
        data = tarsnap.commit_pack(commit(KIND_ABORT), KEY)
        self.assertEqual(len(data), 16 + 8 + 8 + 32 + 1 + 16 + 2 + 2 + 40
                         + 40 + 32 + 2 + 64)
        self.assertTrue(data.startswith(b'tarsnap-commit-1'
                                        + struct.pack('>Q', KEY.machine)))

    def test_signed_by_the_role_of_its_kind(self):
        roles = {KIND_WRITE: 2, KIND_DELETE: 3, KIND_NUKE: 4, KIND_ABORT: 2}
        for kind, role in roles.items():
            data = tarsnap.commit_pack(commit(kind), KEY)
            for other in samples.ROLES:
                body = data[:-64]
                body += tarsnap.sign(KEY.sign_privs[other],
                                     b'tarsnap-history-1\0' + body)
                if other == role:
                    self.decode(body)
                else:
                    self.check_corrupt(self.decode, body)
            # A signature of the right key made for another purpose.
            body = data[:-64]
            self.check_corrupt(self.decode, body + tarsnap.sign(
                KEY.sign_privs[role], body))

    def test_any_flipped_bit_or_truncation(self):
        data = tarsnap.commit_pack(commit(), KEY)
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 1 << at % 8
            self.check_corrupt(self.decode, bytes(damaged))
            self.check_corrupt(self.decode, data[:at])
        self.check_corrupt(self.decode, data + b'\0')

    def test_other_machine(self):
        made = commit()
        made.machine += 1
        with self.assertRaisesRegex(CorruptError, 'another machine'):
            self.decode(tarsnap.commit_pack(made, KEY))

    def test_unknown_kind(self):
        data = tarsnap.commit_pack(commit(), KEY)
        for kind in (0, max(tarsnap.KIND_ROLE) + 1, 255):
            body = data[:64] + bytes([kind]) + data[65:-64]
            for role in samples.ROLES:
                self.check_corrupt(self.decode, body + tarsnap.sign(
                    KEY.sign_privs[role], b'tarsnap-history-1\0' + body))

    def test_mutations(self):
        data = tarsnap.commit_pack(commit(), KEY)
        self.check_survives(data, self.decode, MUTATIONS * 9 // 10)

        def resigned(damaged):
            body = damaged[:-64]
            self.decode(body + tarsnap.sign(KEY.sign_privs[2],
                                            b'tarsnap-history-1\0' + body))
        self.check_survives(data, resigned, 500)

    def test_note(self):
        made = commit()
        note = made.note

        def opens(damaged):
            made.note = damaged
            if damaged and damaged != note:
                self.check_corrupt(tarsnap.note_open, KEY, made)
        for end in range(len(note)):
            opens(note[:end])
        for damaged in samples.mutations(note, MUTATIONS, SEED):
            opens(damaged)
        made.note, made.n = note, 5
        self.check_corrupt(tarsnap.note_open, KEY, made)
        made.note = b''
        self.assertEqual(tarsnap.note_open(KEY, made), (0,) * 9)

    def test_live_digest(self):
        """Sorted by archive id, whatever order it is learnt in."""
        archives = {bytes([n]) * 32: (b'r' * 32, b'l' * 16, state)
                    for n, state in ((7, OPEN), (2, COMPLETE))}
        data = (b'\2' * 32 + b'r' * 32 + bytes([COMPLETE])
                + b'\7' * 32 + b'r' * 32 + bytes([OPEN]))
        self.assertEqual(tarsnap.live_digest(archives), tarsnap.sha256(data))
        self.assertEqual(tarsnap.live_digest({}), NOTHING)


class Series(unittest.TestCase):
    def test_series_of(self):
        for title, series in (
                ('home-2026-01-31', 'home-#'), ('home-20260131', 'home-#'),
                ('db-2026-01-31_23-59-58', 'db-#'),
                ('db-20260131-235958', 'db-#'), ('db_1767225600', 'db_#'),
                ('2026-01-31T23:59', '#'), ('home', 'home'), ('', ''),
                ('web1-2026-01-31', 'web1-#'),
                ('web2-2026-01-31', 'web2-#'), ('disk-123', 'disk-123'),
                ('a-20260101-b-20260102', 'a-20260101-b-20260102'),
                ('x202601311', 'x202601311')):
            self.assertEqual(tarsnap.series_of(title.encode()),
                             series.encode(), title)


class Readers(unittest.TestCase):
    def test_never_beyond_the_end(self):
        reader = Reader(b'\1\2\3', 'it')
        self.assertEqual(reader.u16(), 0x102)
        for call in (reader.u16, reader.u32, reader.u64):
            self.assertRaises(CorruptError, call)
        for length in (2, -1, 1 << 70):
            self.assertRaises(CorruptError, reader.take, length)
        self.assertRaises(CorruptError, reader.end)
        self.assertEqual((reader.left(), reader.rest()), (1, b'\3'))
        reader.end()


if __name__ == '__main__':
    unittest.main()
