# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""An index rebuilt from the log equals the live one byte for byte."""

import os
import random
import shutil
import struct
import tempfile
import unittest

import s3peers
from rawclient import (
    COMPLETE, D, DELETE_KIND, N, NUKE_KIND, OPEN, R, W, Client, Embedded,
    Error, Host, block, get, names_body, put, run, server_directory, sha,
    tarsnapd)
from test_s3_store import environment


class History:
    """A history of commits of all kinds, in the server directory `path`."""

    def begin(self):
        self.client = Client(Embedded(self.path))
        self.host = Host(self.client)
        self.client.auth(self.host.machine, self.host.keys, R, W, D, N)
        self.number = '%016x' % self.host.machine

    def dump(self):
        status, text, said = run('index-dump', self.path, self.number)
        self.assertEqual((status, said), (0, ''))
        return text

    def lose_index(self):
        for name in os.listdir(os.path.join(self.path, 'index')):
            os.unlink(os.path.join(self.path, 'index', name))

    def reopen(self):
        self.client.close()
        self.client = Client(Embedded(self.path))
        self.client.auth(self.host.machine, self.host.keys, R, W, D, N)

    def random_history(self, rng, steps):
        """Commits of all kinds; the set of names that must be live."""
        live, archives = {}, {}
        for step in range(steps):
            what = rng.choice('wwwwddcnkk' if step > 5 else 'ww')
            if what == 'k':
                self.clean()
            elif what == 'd' and archives:
                self.delete(rng, live, archives)
            elif what == 'n' and rng.random() < 0.2:
                self.host.commit(self.client, bytes(16), frame='NUKE',
                                 kind=NUKE_KIND)
                live.clear(), archives.clear()
            else:
                self.write(rng, live, archives, step, what == 'c')
        return live

    def write(self, rng, live, archives, step, checkpoint):
        tid = os.urandom(16)
        self.host.begin(self.client, tid)
        puts, withdrawn = [], set()
        for _ in range(rng.randrange(12)):
            # Few labels: many are live already or put twice.
            one = block('c', 'n%d' % rng.randrange(30), 200)
            puts.append(put(self.client, one))
            if rng.random() < 0.1:
                gone = rng.choice(puts)
                withdrawn.add(gone)
                self.client.send('WITHDRAW', names_body([gone]))
                puts = [name for name in puts if name != gone]
        record = put(self.client, block('a', 'r%d' % step))
        archive = sha(b'archive %d' % step)
        state = OPEN if checkpoint else COMPLETE
        self.host.commit(
            self.client, tid, puts=puts + [record],
            frame='CHECKPOINT' if checkpoint else 'COMMIT',
            linked=[(archive, record, bytes(16), state)])
        live.update(dict.fromkeys(puts + [record], 1))
        archives[archive] = record
        if checkpoint:
            last = put(self.client, block('a', 'last%d' % step))
            other = sha(b'other %d' % step)
            self.host.commit(self.client, tid, puts=[last],
                             unlinked=[(archive, record)],
                             linked=[(other, last, bytes(16), COMPLETE)])
            live[last] = 1
            del archives[archive]
            archives[other] = last

    def delete(self, rng, live, archives):
        archive = rng.choice(sorted(archives))
        record = archives.pop(archive)
        chunks = sorted(set(live) - set(archives.values()) - {record})
        gone = [record] + rng.sample(chunks, len(chunks) // 3)
        tid = os.urandom(16)
        self.host.begin(self.client, tid, kind=DELETE_KIND)
        for i in range(0, len(gone), 5):
            self.client.send('DELETE', names_body(gone[i:i + 5]))
        self.host.commit(self.client, tid, kind=DELETE_KIND, deletes=gone,
                         unlinked=[(archive, record)])
        for name in gone:
            del live[name]

    def clean(self):
        """One round; nothing is too small to be copied."""
        policy = tarsnapd.Policy()
        policy.gain, policy.merge = 1, 3
        server = tarsnapd.Server(self.path)
        server.run(tarsnapd.clean(self.host.machine, policy,
                                  tarsnapd.Cleaned()))
        server.close()

    def rehearse(self, steps):
        """All that a server can lose is deleted, and made again; the same
        byte for byte.
        """
        seed = random.randrange(1 << 32)
        print('test_server_rebuild: seed %d' % seed)
        live = self.random_history(random.Random(seed), steps)
        names = [block('c', 'n%d' % i)[0] for i in range(30)]
        found = [x != 'NOBLOCK' for x in get(self.client, names)]
        self.assertEqual(found, [name in live for name in names])
        self.client.close()
        before = self.dump()
        self.assertEqual(before.count('\nblocks '), len(live))
        in_segments = sum(int(line.split()[7]) for line in
                          before.splitlines() if line.startswith('segments'))
        self.assertEqual(in_segments, len(live))
        status, said, _ = run('rebuild', self.path)
        self.assertEqual(status, 0)
        self.assertRegex(
            said, r'^\d+ entries in [0-9.]+ seconds, \d+ a second$')
        print(said, end='')
        self.assertEqual(self.dump(), before)
        self.lose_index()
        self.assertEqual(self.dump(), before)


class Bucket(History, unittest.TestCase):

    def test_many_commits(self):
        peer = s3peers.Moto()
        self.addCleanup(peer.close)
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.path = os.path.join(base.name, 'srv')
        with environment(peer.environment()):
            tarsnapd.Bucket('backup', {}).request('create', '', 'PUT')
            tarsnapd.server_create(self.path, {'store': 's3://backup/x'})
            self.begin()
            self.rehearse(12)


class Rebuild(History, unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.begin()

    def place(self, key=''):
        return os.path.join(self.path, 'store', key)

    def read(self, key):
        with open(self.place(key), 'rb') as file:
            return file.read()

    def replace(self, key, data):
        # Not in place: it may have another name in a spool.
        tarsnapd.unlink_quietly(self.place(key))
        with open(self.place(key), 'wb') as file:
            file.write(data)

    def rot(self, key, place):
        """Change a byte of an object."""
        data = bytearray(self.read(key))
        data[place] ^= 0x10
        self.replace(key, bytes(data))

    def find(self, name):
        """(segment, offset, length, class) of a block."""
        server = tarsnapd.Server(self.path)
        try:
            return server.perform(('index', self.host.machine, 'find',
                                   [name]))[0]
        finally:
            server.close()

    def test_many_commits(self):
        self.rehearse(60)

    def test_a_damaged_index_is_made_anew(self):
        _, _, names = self.host.backup(self.client, 'one')
        self.client.close()
        before = self.dump()
        index = os.path.join(self.path, 'index', self.number + '.db')
        for suffix in ('-wal', '-shm'):
            tarsnapd.unlink_quietly(index + suffix)
        with open(index, 'r+b') as file:
            file.write(b'this is not a database at all' * 10)
        self.assertEqual(self.dump(), before)

    def test_an_index_of_another_history_is_not_believed(self):
        self.host.backup(self.client, 'one')
        self.client.close()
        copy = self.path + '-copy'
        shutil.copytree(self.path, copy)
        other = self.host.copy()
        for path, host, label in ((self.path, self.host, 'two'),
                                  (copy, other, 'three')):
            client = Client(Embedded(path))
            client.auth(host.machine, host.keys, R, W)
            host.backup(client, label)
            client.close()
        shutil.rmtree(self.place())
        shutil.copytree(os.path.join(copy, 'store'), self.place())
        self.assertEqual(self.dump(), run('index-dump', copy, self.number)[1])

    def test_a_log_that_lost_its_end(self):
        """The index has seen more: it is kept and nothing is written, until
        the operator says that this is the log.
        """
        self.host.backup(self.client, 'one')
        self.client.close()
        before = self.dump()
        self.reopen()
        _, _, names = self.host.backup(self.client, 'two')
        self.client.close()
        key = tarsnapd.log_key(self.host.machine, 2)
        os.unlink(self.place(key))
        self.reopen()
        self.assertNotIn('NOBLOCK', get(self.client, names))
        with self.assertRaisesRegex(Error, 'READONLY: .*%s: is missing' % key):
            self.host.backup(self.client, 'three')
        self.client.close()
        status, _, said = run('rebuild', self.path)
        self.assertEqual(status, 2)
        self.assertIn('the log ends at entry 1; before, it had 2', said)
        self.assertEqual(self.dump(), before)

    def test_a_damaged_log_entry_does_not_empty_the_index(self):
        _, _, names = self.host.backup(self.client, 'one')
        self.client.close()
        before = self.dump()
        key = tarsnapd.log_key(self.host.machine, 1)
        self.rot(key, 60)
        status, _, said = run('rebuild', self.path)
        self.assertEqual(status, 2)
        self.assertEqual(said.splitlines(), [
            'tarsnapd: machine %s: %s: checksum does not match'
            % (self.number, key),
            'tarsnapd: machine %s: the index stays as it was: it knows of '
            'these' % self.number])
        self.assertEqual(self.dump(), before)
        self.reopen()
        self.assertNotIn('NOBLOCK', get(self.client, names))
        # The commit is told, too: the index has it.
        self.assertEqual([x[0] for x in self.client.stream(
            'LIST', names_body([]))], ['COMMIT_OBJECT', 'ARCHIVES'])
        with self.assertRaisesRegex(Error, 'READONLY: .*' + key):
            self.host.backup(self.client, 'two')

    def test_what_is_left_of_a_damaged_log_can_be_read(self):
        """Without an index, and the entry in the middle."""
        names = []
        for label in ('one', 'two', 'three'):
            names += self.host.backup(self.client, label)[2]
        self.client.close()
        key = tarsnapd.log_key(self.host.machine, 2)
        for harm in (lambda: self.rot(key, 60),
                     lambda: os.unlink(self.place(key))):
            harm()
            self.lose_index()
            self.reopen()
            self.assertNotIn('NOBLOCK', get(self.client, names))
            rows = [x[1] for x in self.client.stream('LIST', names_body([]))]
            self.assertIn(sha(b'idone'), rows[1])
            self.assertNotIn(sha(b'idtwo'), rows[1])
            self.assertIn(sha(b'idthree'), rows[1])
            with self.assertRaisesRegex(Error, 'READONLY: .*' + key):
                self.host.begin(self.client, os.urandom(16))
            self.client.close()
            status, out, said = run('clean', self.path)
            self.assertEqual(status, 1)
            self.assertIn(key, said)

    def test_a_lost_segment_costs_its_own_blocks(self):
        names = [self.host.backup(self.client, label)[2]
                 for label in ('one', 'two', 'three')]
        self.client.close()
        segment = self.find(names[1][0])[0]
        data = self.read(segment)
        whole = self.dump()
        table = len(data) - tarsnapd.FOOTER.size - 4 * tarsnapd.ROW.size
        header = len(tarsnapd.SEGMENT_MAGIC) + 20

        def check(lost, text):
            self.lose_index()
            self.reopen()
            for part in names[0], names[2]:
                self.assertNotIn('NOBLOCK', get(self.client, part))
            self.assertEqual(get(self.client, names[1]).count('NOBLOCK'),
                             lost)
            if lost:
                with self.assertRaisesRegex(Error, 'READONLY: .*' + segment):
                    self.host.begin(self.client, os.urandom(16))
                self.client.send('GET', b'\3' + names_body(names[1][:1]))
                while True:
                    kind, body = self.client.next(errors=True)
                    if kind == 'ERROR':
                        self.assertIn(segment.encode(), body)
                    if kind == 'OK':
                        break
            self.client.close()
            status, _, said = run('rebuild', self.path)
            self.assertEqual((status, text in said), (2 if lost else 0, True))

        # Table or footer: the entries say the same.
        for place in (table, len(data) - 1, len(data) - 30):
            self.rot(segment, place)
            check(0, '')
            self.assertEqual(self.dump(), whole)
            self.replace(segment, data)
        # Also an entry: then it alone is lost.
        self.rot(segment, table)
        self.rot(segment, header)
        check(1, 'its table is damaged')
        # Cut off, empty, gone.
        self.replace(segment, data[:table - 1200])
        check(1, 'short read')
        self.replace(segment, b'')
        check(3, segment)
        os.unlink(self.place(segment))
        check(3, 'no such object')
        self.replace(segment, data)
        self.assertEqual(run('rebuild', self.path)[0], 0)
        self.assertEqual(self.dump(), whole)

    def test_a_damaged_copy_is_put_again_and_a_whole_one_is_not(self):
        _, record, names = self.host.backup(self.client, 'one')
        segment, offset, _, _ = self.find(names[0])
        self.rot(segment, offset + 500)
        self.client.send('GET', b'\0' + names_body(names))
        kind, body = self.client.next(errors=True)
        self.assertEqual(kind, 'ERROR')
        self.assertIn(b'read segment %s: block %s at %d is damaged' % (
            segment.encode(), names[0].hex().encode(), offset), body)
        self.assertEqual([self.client.next() for _ in range(3)], [
            ('BLOCK', names[1]), ('BLOCK', names[2]), ('OK', b'')])
        tid = os.urandom(16)
        self.host.begin(self.client, tid)
        stored = {}
        for name in names[:2]:
            other = block('c', 'of another length', 700)
            stored[name] = put(self.client, (name,) + other[1:]) and other[2]
        self.host.commit(self.client, tid, puts=names[:2])
        first, second = get(self.client, names[:2])
        self.assertEqual(first, stored[names[0]])
        self.assertNotEqual(second, stored[names[1]])
        _, _, _, blocks, size, _ = struct.unpack(
            '>Q32sQQQI', self.client.call('STAT')[1])
        self.assertEqual((blocks, size), (4, sum(
            map(len, get(self.client, names + [record])))))
        self.client.close()
        before = self.dump()
        self.assertEqual(run('rebuild', self.path)[::2], (0, ''))
        self.assertEqual(self.dump(), before)
        # Asked on another connection, it is not to be put again on this.
        self.reopen()
        tid = os.urandom(16)
        self.host.begin(self.client, tid)
        put(self.client, (names[0],) + block('c', 'again', 300)[1:])
        self.host.commit(self.client, tid, puts=names[:1])
        self.assertEqual(get(self.client, names[:1]), [first])

    def test_what_was_missed_for_a_moment_is_not_lost(self):
        """A log entry that another server makes just now, or a read that
        fails once.
        """
        for i in range(2):
            self.host.backup(self.client, 'n%d' % i)
        server = tarsnapd.Server(self.path)
        self.addCleanup(server.close)
        key = tarsnapd.log_key(self.host.machine, 1)
        for error in (tarsnapd.NoObject('read', key),
                      tarsnapd.StoreError('read', key, 'timed out')):
            server.perform(('index', self.host.machine, 'reset'))
            real, missed = server.store.get, []

            def get(name, *place):
                if name == key and not missed:
                    missed.append(name)
                    raise error
                return real(name, *place)

            server.store.get = get
            state = server.run(tarsnapd.catch_up(self.host.machine))
            server.store.get = real
            self.assertEqual((missed, state.k, state.lost), ([key], 2, None))

    def test_an_index_thrown_away_is_not_asked(self):
        """It would say that no segment was ever committed."""
        self.host.backup(self.client, 'one')
        server = tarsnapd.Server(self.path)
        self.addCleanup(server.close)
        machine = self.host.machine
        keys = server.store.list('seg/%016x/' % machine)
        self.assertEqual(len(keys), 1)
        self.assertEqual(server.run(tarsnapd.droppable(machine, 1, keys)), [])
        server.perform(('index', machine, 'reset'))
        with self.assertRaisesRegex(tarsnapd.StoreError, 'made anew'):
            server.run(tarsnapd.droppable(machine, 1, keys))

    def test_two_processes_on_one_index(self):
        other = Client(Embedded(self.path))
        self.addCleanup(other.close)
        other.auth(self.host.machine, self.host.keys, R, W)
        for i in range(4):
            client = (self.client, other)[i % 2]
            _, _, names = self.host.backup(client, 'n%d' % i)
            for reader in (self.client, other):
                self.assertNotIn('NOBLOCK', get(reader, names))
        self.client.close()
        before = self.dump()
        run('rebuild', self.path)
        self.assertEqual(self.dump(), before)


if __name__ == '__main__':
    unittest.main()
