# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""--verify: all that archives consist of is read; what is lost is named."""

import json
import os
import random
import unittest
from unittest import mock

import lab
import readlab
import tarsnap

FILES = 60


def setUpModule():
    global LAB, HOST, PROGRAM, BLOCKS
    rng = random.Random(30)
    with mock.patch.object(tarsnap, 'RACY', 0), lab.fine():
        LAB, HOST = readlab.shared()
        for number in range(FILES):
            readlab.file_make(os.fsencode(LAB.path('tree', 'd',
                                                   '%02d' % number)),
                              rng.randbytes(3000), 0o644)
        readlab.file_make(os.fsencode(LAB.path('tree', 'large')),
                          rng.randbytes(200000), 0o644)
        HOST.create('one')
        readlab.file_make(os.fsencode(LAB.path('tree', 'only two')),
                          rng.randbytes(3000), 0o644)
        HOST.create('two')
    PROGRAM = readlab.Program(HOST)
    BLOCKS = {name: row[0] for name, row in LAB.live().items()}


def fetched(log):
    """Names asked for, in order."""
    return [body[3:][at:at + 32] for kind, body in log
            if kind == tarsnap.GET for at in range(0, len(body) - 3, 32)]


def damage(names):
    """Flip a bit of these blocks in whatever the server sends."""
    def lie(kind, rid, body, answers):
        return [(answer[0], answer[1], answer[2][:-1]
                 + bytes([answer[2][-1] ^ 1]))
                if answer[0] == tarsnap.BLOCK and answer[2][:32] in names
                else answer for answer in answers]
    return lab.tapped(lie)


def of(cls):
    return sorted(name for name, found in BLOCKS.items() if found == cls)


def chunk_of(path, archive=b'one'):
    """The name of a chunk of the file at `path`."""
    remote = tarsnap.Remote(HOST.key, (lab.R,))
    fetcher = tarsnap.Fetcher(remote)
    try:
        live = {row[0]: row[1] for kind, body in remote.ask(
            tarsnap.LIST, b'\0\0') if kind == tarsnap.ARCHIVES
            for row in tarsnap.rows_unpack(body, tarsnap.ARCHIVE_ROW, '')}
        record = fetcher.get(tarsnap.record_kid(
            live[tarsnap.Names(HOST.key).archive(archive)]))
        for entry, page in tarsnap.archive_entries(fetcher, record):
            if entry.path == path:
                return list(tarsnap.entry_extents(fetcher, entry,
                                                  page))[-1][0].name
    finally:
        fetcher.close()
        remote.close()
    return None


class Verify(unittest.TestCase):

    def test_all_is_read_once(self):
        with lab.tapped() as log:
            status, out, err = PROGRAM.run('--verify')
        self.assertEqual((status, err), (0, b''))
        self.assertEqual(sorted(fetched(log)), sorted(BLOCKS))
        self.assertRegex(out, rb'^Verified %d blocks, \d+ bytes, of 2 '
                              rb'archives: none damaged\n$'
                         % (len(BLOCKS) - len(of(b'a'))))

    def test_one_archive(self):
        with lab.tapped() as log:
            self.assertEqual(PROGRAM.run('--verify', '-f', 'one')[0], 0)
        names = fetched(log)
        self.assertLess(len(names), len(BLOCKS))
        self.assertEqual(len(set(names)), len(names))
        self.assertNotIn(chunk_of(b'./only two', b'two'), names)

    def test_quiet(self):
        self.assertEqual(PROGRAM.run('--verify', '--quiet'), (0, b'', b''))
        with damage({of(b'c')[0]}):
            self.assertIn(b'\nVerified ', PROGRAM.run('--verify',
                                                      '--quiet')[1])

    def test_no_archives(self):
        _, host = readlab.shared()
        self.assertEqual(readlab.Program(host).run('--verify'), (
            0, b'Verified 0 blocks, 0 bytes, of 0 archives: none damaged\n',
            b''))

    def test_no_such_archive(self):
        status, out, err = PROGRAM.run('--verify', '-f', 'three')
        self.assertEqual((status, out), (1, b''))
        self.assertIn(b'Archive does not exist: three', err)

    def test_every_chunk_damaged_is_found(self):
        for path, archives in ((b'./d/07', (b'one', b'two')),
                               (b'./large', (b'one', b'two')),
                               (b'./only two', (b'two',))):
            victim = chunk_of(path, b'two')
            with self.subTest(path), damage({victim}):
                status, out, err = PROGRAM.run('--verify')
            self.assertEqual(status, 1)
            *lines, last = out.splitlines()
            self.assertEqual([line.split(b'\t')[:2] for line in lines],
                             [[name, path] for name in archives])
            self.assertIn(victim.hex()[:16].encode(), lines[0])
            self.assertTrue(last.endswith(b': 1 damaged'), last)
            self.assertEqual(err, b'tarsnap: Error exit delayed from '
                                  b'previous errors.\n')

    def test_every_index_block_damaged_is_found(self):
        for victim in of(b'i')[::4]:
            with self.subTest(victim.hex()[:16]), damage({victim}):
                status, out, _ = PROGRAM.run('--verify')
            self.assertEqual(status, 1)
            self.assertIn(victim.hex()[:16].encode(), out)
            self.assertTrue(out.endswith(b': 1 damaged\n'), out)

    def test_a_record_damaged_is_found(self):
        for victim in of(b'a'):
            for args in (), ('-f', 'one', '-f', 'two'):
                with self.subTest(args), damage({victim}):
                    status, out, _ = PROGRAM.run('--verify', *args)
                self.assertEqual(status, 1)
                self.assertIn(b'archive record ' + victim.hex()[:16]
                              .encode(), out)
                self.assertIn(b'of 2 archives: 1 damaged', out)

    def test_what_was_damaged_is_what_extraction_loses(self):
        victims = set(random.Random(31).sample(of(b'c'), 5))
        with damage(victims):
            out = PROGRAM.run('--verify', '-f', 'two')[1]
            target = LAB.fresh()
            os.mkdir(target)
            err = PROGRAM.run('-x', '-f', 'two', '-C', target)[2]
        named = {line.split(b'\t')[1] for line in out.splitlines()[:-1]}
        self.assertEqual(named, {line.split(b': ')[0] for line in
                                 err.splitlines() if b'./' in line})

    def test_json(self):
        victim = chunk_of(b'./d/07')
        with damage({victim}):
            status, out, err = PROGRAM.run('--verify', '--json')
        rows = [json.loads(line) for line in out.splitlines()]
        self.assertEqual(status, 1)
        self.assertEqual([(row['type'], row.get('archive'), row.get('path'),
                           row.get('block')) for row in rows], [
            ('damage', 'one', './d/07', victim.hex()),
            ('damage', 'two', './d/07', victim.hex()),
            ('summary', None, None, None)])
        self.assertEqual(rows[2]['damaged'], 1)
        self.assertEqual((rows[2]['from'], rows[2]['to']), (0, 1))
        self.assertEqual(json.loads(err)['type'], 'message')

    def test_an_archive_deleted_meanwhile_is_not_damaged(self):
        with mock.patch.object(tarsnap, 'RACY', 0):
            laboratory, host = readlab.shared('a')
            readlab.file_make(os.fsencode(laboratory.path('tree', 'b')),
                              b'b' * 70000, 0o644)
            host.create('b', 'b')
        program = readlab.Program(host)
        real = tarsnap.Verifier.chunks

        def chunks(verifier, low, high):
            host.good('-d', '-f', 'b')
            real(verifier, low, high)
            # As if the server had really dropped what it may drop now.
            live = laboratory.live()
            for name, in verifier.db.execute('SELECT name FROM seen'):
                if name not in live:
                    verifier.damaged[name] = 'missing'
            self.assertTrue(verifier.damaged)

        with mock.patch.object(tarsnap.Verifier, 'chunks', chunks):
            status, out, err = program.run('--verify')
        self.assertEqual((status, err), (0, b''))
        self.assertRegex(out, b'^Verified .*: none damaged\n$')

class Share(unittest.TestCase):
    """--verify-share goes on where the last run ended."""

    def setUp(self):
        self.cache = LAB.fresh('cache')

    def run_share(self, share):
        """(names of chunks fetched, stdout)."""
        with lab.tapped() as log:
            status, out, err = PROGRAM.run('--verify', '--verify-share',
                                           share, '--cachedir', self.cache)
        self.assertEqual(status, 0, err)
        return [name for name in fetched(log) if BLOCKS[name] == b'c'], out

    def test_ten_times_a_tenth_is_all_and_each_once(self):
        seen = []
        for number in range(10):
            names, out = self.run_share('10%')
            seen += names
            self.assertIn(b'; file data from %d.0%% to %d.0%%\n' % (
                10 * number, 10 * number + 10), out)
        self.assertEqual(sorted(seen), of(b'c'))
        self.assertEqual(sorted(self.run_share('100%')[0]), of(b'c'))

    def test_by_bytes(self):
        seen, runs = [], 0
        while len(seen) < len(of(b'c')):
            names, _ = self.run_share('100k')
            self.assertTrue(names)
            seen += names
            runs += 1
        self.assertEqual(sorted(seen), of(b'c'))
        self.assertGreater(runs, 2)
        self.assertLess(runs, 6)

    def test_a_share_finds_the_damage_in_it(self):
        victim = of(b'c')[0]
        with damage({victim}):
            found = [PROGRAM.run('--verify', '--verify-share', '50%',
                                 '--cachedir', self.cache)[0]
                     for _ in range(2)]
        self.assertEqual(found, [1, 0])

    def test_what_is_remembered_may_be_lost(self):
        self.run_share('10%')
        path = os.path.join(self.cache, 'verified')
        with open(path, 'w') as file:
            file.write('nonsense')
        status, out, err = PROGRAM.run('--verify', '--verify-share', '10%',
                                       '--cachedir', self.cache)
        self.assertEqual(status, 0)
        self.assertIn(b'verifying begins anew', err)
        self.assertIn(b'from 0.0% to 10.0%', out)

    def test_usage(self):
        for args in (('--verify-share', '10%'),
                     ('--verify-share', '0%', '--cachedir', self.cache),
                     ('--verify-share', '101%', '--cachedir', self.cache),
                     ('--verify-share', 'x', '--cachedir', self.cache),
                     ('--verify-share', '5%', '--cachedir', self.cache,
                      '-f', 'one')):
            with self.subTest(args):
                status, out, err = PROGRAM.run('--verify', *args)
                self.assertEqual((status, out), (1, b''))
                self.assertTrue(err.startswith(b'tarsnap: '), err)


if __name__ == '__main__':
    unittest.main()
