# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""An index rebuilt from the log equals the live one byte for byte."""

import os
import random
import unittest

from rawclient import (
    COMPLETE, D, DELETE_KIND, N, NUKE_KIND, OPEN, R, W, Client, Embedded,
    Host, block, get, names_body, put, run, server_directory, sha, tarsnapd)


class Rebuild(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.client = Client(Embedded(self.path))
        self.host = Host(self.client)
        self.client.auth(self.host.machine, self.host.keys, R, W, D, N)
        self.number = '%016x' % self.host.machine

    def dump(self):
        status, text, said = run('index-dump', self.path, self.number)
        self.assertEqual((status, said), (0, ''))
        return text

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

    def test_many_commits(self):
        seed = random.randrange(1 << 32)
        print('test_server_rebuild: seed %d' % seed)
        live = self.random_history(random.Random(seed), 60)
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
        for name in os.listdir(os.path.join(self.path, 'index')):
            os.unlink(os.path.join(self.path, 'index', name))
        self.assertEqual(self.dump(), before)

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
        before = self.dump()
        self.reopen()
        _, _, names = self.host.backup(self.client, 'two')
        self.client.close()
        # The store is put back from a copy; the index is not.
        os.unlink(os.path.join(self.path, 'store', tarsnapd.log_key(
            self.host.machine, 2)))
        self.assertEqual(self.dump(), before)

    def test_a_damaged_log_entry_is_named(self):
        self.host.backup(self.client, 'one')
        self.client.close()
        key = tarsnapd.log_key(self.host.machine, 1)
        path = os.path.join(self.path, 'store', key)
        os.chmod(path, 0o600)
        with open(path, 'r+b') as file:
            file.seek(60)
            file.write(b'XX')
        status, out, said = run('rebuild', self.path)
        self.assertEqual((status, out), (1, ''))
        self.assertIn(key, said)
        self.assertEqual(said.count('\n'), 1)

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
