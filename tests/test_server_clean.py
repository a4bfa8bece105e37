# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Cleaning gives space back and loses nothing, whatever happens meanwhile."""

import itertools
import json
import os
import random
import shutil
import time
import unittest
from unittest import mock

from rawclient import (
    COMPLETE, D, DELETE_KIND, N, R, W, Client, Embedded, Error, Host, Serve,
    block, get, names_body, put, run, server_directory, sha, tarsnapd, u64)

NEVER = 1 << 40          # so late was nothing deleted


def size_on_disk(path):
    """Bytes of all files below `path`."""
    return sum(os.path.getsize(os.path.join(where, name))
               for where, _, names in os.walk(path) for name in names)


class Case(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.store = os.path.join(self.path, 'store')
        self.client = self.connect()
        self.host = Host(self.client)
        self.client.auth(self.host.machine, self.host.keys, R, W, D, N)
        self.archives = {}          # label -> (archive id, record, names)
        fsync = mock.patch.object(os, 'fsync', lambda fd: None)
        fsync.start()
        self.addCleanup(fsync.stop)

    def connect(self, host=None):
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        if host:
            client.auth(host.machine, host.keys, R, W, D, N)
        return client

    def server(self):
        server = tarsnapd.Server(self.path)
        self.addCleanup(server.close)
        return server

    def backup(self, label, blocks=4, size=10000):
        self.archives[label] = self.host.backup(self.client, label, blocks,
                                                size)

    def delete(self, *labels, keep=0):
        """Delete archives, but the first `keep` chunks of each."""
        gone, unlinked = [], []
        for label in labels:
            archive, record, names = self.archives.pop(label)
            unlinked.append((archive, record))
            gone += [record] + names[keep:]
        tid = os.urandom(16)
        self.host.begin(self.client, tid, kind=DELETE_KIND)
        for i in range(0, len(gone), 1000):
            self.client.send('DELETE', names_body(gone[i:i + 1000]))
        self.host.commit(self.client, tid, kind=DELETE_KIND, deletes=gone,
                         unlinked=unlinked)

    def clean(self, server=None, **policy):
        """One round; what it did."""
        done, rules = tarsnapd.Cleaned(), tarsnapd.Policy()
        for name, value in policy.items():
            self.assertTrue(hasattr(rules, name))
            setattr(rules, name, value)
        server = server or self.server()
        server.run(tarsnapd.clean(self.host.machine, rules, done))
        return done

    def check_readable(self, client=None):
        """Every block of every archive is what was put."""
        for label, (_, record, names) in self.archives.items():
            wanted = [block('c', '%s-%d' % (label, i), self.size)[2]
                      for i in range(len(names))]
            self.assertEqual(get(client or self.client, names), wanted)
            self.assertEqual(get(client or self.client, [record]),
                             [block('a', label)[2]])

    size = 10000


class Space(Case):

    def test_space_comes_back_in_the_second_round(self):
        for i in range(8):
            self.backup('a%d' % i, 20)
        full = size_on_disk(self.store)
        self.delete(*('a%d' % i for i in range(7)), keep=2)
        done = self.clean()
        self.assertEqual(done.dropped, 7)
        self.assertGreater(size_on_disk(self.store), full)
        self.check_readable()
        done = self.clean()
        self.assertEqual(done.deleted, 7)
        self.assertLess(size_on_disk(self.store), full / 8 + 14 * 13000)
        self.check_readable()
        self.assertEqual(self.clean().dropped, 0)
        kept = [block('c', 'a%d-%d' % (i, j))[0]
                for i in range(7) for j in range(2)]
        self.assertNotIn('NOBLOCK', get(self.client, kept))

    def test_small_segments_are_merged_and_then_left_alone(self):
        for i in range(17):
            self.backup('a%d' % i, 1)
        self.assertEqual(self.clean().dropped, 16)
        self.assertEqual(self.clean().dropped, 0)
        self.check_readable()

    def test_a_history_of_backups_and_deletes(self):
        """Fifty days, of which seven are kept; a tenth changes each day."""
        rng = random.Random(1)
        days, tree = [], ['f%d' % i for i in range(100)]
        live = set()
        for day in range(50):
            for i in rng.sample(range(100), 10):
                tree[i] = 'f%d %d' % (i, day)
            names = {block('c', label)[0]: label for label in tree}
            tid = os.urandom(16)
            self.host.begin(self.client, tid)
            puts = [put(self.client, block('c', label, 8000))
                    for name, label in names.items() if name not in live]
            record = put(self.client, block('a', 'day %d' % day))
            archive = sha(b'day %d' % day)
            self.host.commit(self.client, tid, puts=puts + [record], linked=[
                (archive, record, bytes(16), COMPLETE)])
            live.update(puts)
            days.append((archive, record, set(names)))
            if len(days) > 7:
                archive, record, _ = days.pop(0)
                gone = live - set().union(*(x[2] for x in days))
                live -= gone
                self.drop(gone | {record}, [(archive, record)])
            self.clean()
        self.clean()
        used = self.figures()
        print('cleaned: %.2f times the live bytes' % (
            size_on_disk(self.store) / used['bytes']))
        self.assertEqual(used['dropped'] + used['orphans'], 0)
        self.assertLess(used['segment bytes'], 1.6 * used['bytes'])
        self.assertLess(size_on_disk(self.store), 1.9 * used['bytes'])
        self.assertNotIn('NOBLOCK', get(self.client, sorted(live)))

    def drop(self, gone, unlinked):
        tid = os.urandom(16)
        self.host.begin(self.client, tid, kind=DELETE_KIND)
        self.client.send('DELETE', names_body(sorted(gone)))
        self.host.commit(self.client, tid, kind=DELETE_KIND, deletes=gone,
                         unlinked=unlinked)

    def figures(self):
        return self.server().run(tarsnapd.stats(self.host.machine))

    def test_figures_are_those_of_a_listing(self):
        for i in range(6):
            self.backup('a%d' % i, 5)
        self.delete('a0', 'a1')
        tid = os.urandom(16)
        self.host.begin(self.client, tid)
        put(self.client, block('c', 'open', 5000))
        self.client.link.local.idle()
        session = self.client.link.local.session
        for _ in tarsnapd.drive(session.server, session._segment_close(
                session.tx), 0):
            pass
        self.clean()
        status, out, said = run('stats', self.path, '--json')
        self.assertEqual((status, said), (0, ''))
        found = json.loads(out)
        sizes = size_on_disk(os.path.join(self.store, 'seg'))
        self.assertEqual(sizes, found['segment_bytes']
                         + found['dropped_bytes'] + found['orphan_bytes'])
        self.assertEqual((found['dropped'], found['orphans'],
                          found['archives'], found['machines']),
                         (2, 1, 4, 1))
        live = [block('c', 'a%d-%d' % (i, j), self.size)[2]
                for i in range(2, 6) for j in range(5)]
        live += [block('a', 'a%d' % i)[2] for i in range(2, 6)]
        self.assertEqual((found['blocks'], found['bytes']),
                         (len(live), sum(map(len, live))))
        self.assertEqual(found['used'], round(
            100 * found['bytes'] / sizes, 1))
        self.assertEqual([x['archives'] for x in found['machine']], [4])

    def test_a_dry_run_changes_nothing(self):
        self.backup('a')
        self.backup('b')
        self.delete('a')
        before = listing(self.store)
        status, out, _ = run('clean', self.path, '--dry-run')
        self.assertEqual(status, 0)
        self.assertIn('\ndropped 1\n', out)
        self.assertEqual(listing(self.store), before)
        status, out, _ = run('clean', self.path, '--machine',
                             '%016x' % self.host.machine)
        self.assertIn('\ndropped 1\n', out)
        self.assertNotEqual(listing(self.store), before)

    def test_a_server_cleans_by_itself(self):
        self.backup('a', 20)
        self.delete('a')
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
            file.write('clean-hours = 0.0002\n')
        serve = Serve(self.path, '--workers', '2')
        end = time.monotonic() + 60
        while size_on_disk(self.store) > 100000:
            self.assertLess(time.monotonic(), end)
            time.sleep(0.05)
        self.assertEqual(serve.stop()[0], 0)


class Past(Case):

    def test_changes_are_told_as_before(self):
        """The lists of what commits put, withdrew and deleted."""
        for i in range(10):
            self.backup('a%d' % i, 3)
        self.withdraw()
        self.delete('a1', 'a2', 'a3')
        before = self.changes()
        self.assertGreater(len(before), 20)
        self.clean()
        self.assertEqual(self.clean().deleted, 4)
        self.assertEqual(self.changes(), before)

    def withdraw(self):
        tid = os.urandom(16)
        self.host.begin(self.client, tid)
        first = put(self.client, block('c', 'first', 30000))
        self.client.send('WITHDRAW', names_body([first]))
        last = put(self.client, block('c', 'last', 100))
        self.host.commit(self.client, tid, puts=[last])

    def changes(self):
        return self.client.stream('CHANGES', u64(0) + bytes(32) + b'\1')

    def test_rebuilt_from_what_is_left(self):
        for i in range(9):
            self.backup('a%d' % i, 3)
            self.clean(gain=1, merge=3)
            if i % 3 == 2:
                self.delete('a%d' % (i - 1), keep=1)
        self.clean(gain=1, merge=3)
        live = [self.server().perform(('index', self.host.machine, 'dump'))]
        for name in os.listdir(os.path.join(self.path, 'index')):
            os.unlink(os.path.join(self.path, 'index', name))
        server = self.server()
        server.run(tarsnapd.catch_up(self.host.machine))
        live.append(server.perform(('index', self.host.machine, 'dump')))
        self.assertEqual(*live)
        self.check_readable(self.connect(self.host))

    def test_a_lost_segment_is_not_taken_for_a_dropped_one(self):
        self.backup('a')
        self.backup('b')
        self.delete('b', keep=1)
        self.clean()
        self.clean()
        lost = [key for key in listing(self.store)
                if key.startswith('seg/') and tarsnapd.CLEANER.hex() in key]
        os.unlink(os.path.join(self.store, lost[0]))
        status, _, said = run('rebuild', self.path)
        self.assertEqual(status, 2)
        self.assertIn(lost[0], said)


class Moving(Case):

    def test_a_reader_looks_again_as_often_as_a_block_moves(self):
        """Each time its segment was dropped and deleted under his hands."""
        self.backup('one', 1)
        _, _, names = self.archives['one']
        server, policy = self.server(), tarsnapd.Policy()
        policy.gain, policy.used = -10 ** 6, 10 ** 6     # whatever there is
        real, moved = tarsnapd.FileStore.get, []

        def moving(store, key, *place):
            if store is not server.store and key.startswith('seg/') and (
                    len(moved) < 3):
                moved.append(key)
                for _ in range(2):
                    server.run(tarsnapd.clean(self.host.machine, policy,
                                              tarsnapd.Cleaned()))
            return real(store, key, *place)

        with mock.patch.object(tarsnapd.FileStore, 'get', moving):
            found = get(self.client, names)
        self.assertEqual(found, [block('c', 'one-0', 10000)[2]])
        self.assertEqual(len(set(moved)), 3)


class Meanwhile(Case):

    def second(self):
        """Another server directory on the same store."""
        path = self.path + '2'
        shutil.copytree(self.path, path, ignore=lambda where, names: [
            name for name in names
            if name in ('store', 'spool', 'index') and where == self.path])
        for name in (path + '/spool', path + '/index', self.store + '/.tmp'):
            os.mkdir(name, 0o700)
        with open(os.path.join(path, 'tarsnapd.conf'), 'w') as file:
            file.write('[server]\nstore = %s\n' % self.store)
        server = tarsnapd.Server(path)
        self.addCleanup(server.close)
        return server

    def prepare(self):
        for i in range(6):
            self.backup('a%d' % i, 6)
        for i in range(3):
            self.delete('a%d' % i, keep=i)

    def test_a_reader_that_knows_nothing_of_it(self):
        self.prepare()
        other = self.second()
        other.run(tarsnapd.catch_up(self.host.machine))
        names = [block('c', 'a1-0')[0]] + self.archives['a4'][2]
        session = tarsnapd.Session(other, 3)
        session.machine = other.run(tarsnapd.machine_load(self.host.machine))
        session.roles = 'r'
        for _ in range(2):
            self.clean(gain=1, merge=2)
        answers = [answer[0] for answer in tarsnapd.drive(
            other, session.handle(tarsnapd.GET, b'\3' + names_body(names)),
            0)]
        self.assertEqual(answers, [tarsnapd.BLOCK] * len(names)
                         + [tarsnapd.OK])

    def test_a_commit_of_dropped_segments_is_expired(self):
        self.backup('a')
        tid, names = os.urandom(16), []
        with mock.patch.dict(tarsnapd.LIMIT, {'segment': 30000}):
            self.host.begin(self.client, tid)
            for i in range(12):
                names.append(put(self.client, block('c', 'x%d' % i, 10000)))
                self.client.link.frames.extend(self.client.link.local.idle())
        status, out, _ = run('clean', self.path, '--abandon')
        self.assertIn('\norphans 4\n', out)    # this process has it open
        self.assertIn('\ndropped 0\n', out)
        other = self.second()
        self.assertEqual(self.clean(other, dead=-1).dropped, 4)
        with self.assertRaises(Error) as caught:
            self.host.commit(self.client, tid, puts=names)
        self.assertEqual(caught.exception.code, 'EXPIRED')
        self.assertEqual(self.clean(other).deleted, 4)
        self.backup('b')
        self.check_readable()

    def interrupted(self, meanwhile):
        """A round that is interrupted before its first log entry."""
        policy, server = tarsnapd.Policy(), self.server()
        policy.gain = 1
        steps = tarsnapd.clean(self.host.machine, policy, tarsnapd.Cleaned())
        value = None
        while True:
            try:
                wish = steps.send(value)
            except StopIteration:
                return
            if wish[:1] == ('put',) and wish[1].startswith('log/'):
                meanwhile, call = None, meanwhile
                if call:
                    call()
            value = None if wish[0] == 'answer' else server.perform(wish)

    def test_copies_that_were_given_up_are_not_used(self):
        self.prepare()
        other = self.second()
        self.interrupted(lambda: self.clean(other, copies=-1, gain=10 ** 9))
        for _ in range(2):
            self.clean(other)
        self.check_kept()

    def check_kept(self):
        self.check_readable()
        kept = [block('c', 'a%d-%d' % x)[0] for x in ((1, 0), (2, 0), (2, 1))]
        self.assertNotIn('NOBLOCK', get(self.client, kept))

    def test_a_race_lost_to_another_cleaner(self):
        self.prepare()
        other = self.second()
        self.interrupted(lambda: self.clean(other, gain=1))
        for _ in range(2):
            self.clean(copies=-1)
        self.check_kept()

    def test_a_race_lost_to_a_delete_and_a_backup_of_the_same(self):
        self.prepare()
        self.backup('b')

        def meanwhile():
            self.delete('b')
            self.backup('b')
        self.interrupted(meanwhile)
        for _ in range(2):
            self.clean()
        self.check_kept()

    def test_nothing_is_dropped_that_was_not_copied(self):
        self.backup('a')
        server, machine = self.server(), self.host.machine
        state = server.run(tarsnapd.catch_up(machine))
        key = [x for x in listing(self.store) if x.startswith('seg/')]
        self.assertEqual(server.perform((
            'index', machine, 'check_move', state.k, key, [], [], NEVER)),
            ([], []))
        self.assertIsNone(server.perform((
            'index', machine, 'check_move', state.k + 1, key, [], [],
            NEVER)))

    def test_any_order_of_two_cleaners_a_writer_and_a_pruner(self):
        """One wish of one of them at a time, by seed."""
        seed = random.randrange(1 << 32)
        print('test_server_clean: seed %d' % seed)
        rng = random.Random(seed)
        self.prepare()
        other = self.second()
        mine = self.server()
        for turn in range(12):
            label = 'turn%d' % turn
            self.race(rng, (mine, other), label)
            self.check_readable()
        machine = self.host.machine
        for server in (mine, other):
            server.run(tarsnapd.catch_up(machine))
        dumps = [server.perform(('index', machine, 'dump'))
                 for server in (mine, other)]
        self.assertEqual(*dumps)

    def race(self, rng, servers, label):
        """Two rounds, during which an archive comes and one goes."""
        policy = tarsnapd.Policy()
        policy.gain, policy.merge, policy.batch = 1, 2, 30000
        running = [(server, tarsnapd.clean(self.host.machine, policy,
                                           tarsnapd.Cleaned()), [None])
                   for server in servers]
        events = {rng.randrange(60): self.event_backup,
                  rng.randrange(60): self.event_delete}
        for step in itertools.count():
            if step in events:
                events[step](rng, label)
            if not running:
                break
            one = rng.choice(running)
            try:
                value = one[2][0]
                wish = one[1].throw(value) if isinstance(
                    value, Exception) else one[1].send(value)
                one[2][0] = None
                if wish[0] not in ('answer', 'wait'):
                    one[2][0] = one[0].perform(wish)
            except StopIteration:
                running.remove(one)
            except tarsnapd.StoreError as e:
                one[2][0] = e

    def event_backup(self, rng, label):
        self.backup(label, rng.randrange(1, 8))

    def event_delete(self, rng, _):
        self.delete(rng.choice(sorted(self.archives)), keep=rng.randrange(3))


class Death(Case):

    DURABLE = ('put', 'delete', 'spool')

    def test_killed_before_or_after_any_step(self):
        for i in range(4):
            self.backup('a%d' % i, 6)
        self.delete('a0', keep=1)
        self.clean()
        self.delete('a1', 'a2', keep=2)
        self.client.close()
        base = self.path + '.base'
        shutil.copytree(self.path, base)
        total = self.die(None)
        self.assertGreater(total, 10)
        for number in range(2 * total):
            shutil.rmtree(self.path)
            shutil.copytree(base, self.path)
            with self.subTest(before=number % 2 == 0, step=number // 2):
                self.die(number)
                self.recovered()

    def die(self, number):
        """Clean until a durable step, counted twice; how many there are."""
        server = tarsnapd.Server(self.path)
        policy = tarsnapd.Policy()
        policy.gain = 1
        steps = tarsnapd.clean(self.host.machine, policy, tarsnapd.Cleaned())
        value, count = None, 0
        try:
            while True:
                wish = steps.send(value)
                durable = wish[0] in self.DURABLE
                if durable and number == 2 * count:
                    return count
                value = None if wish[0] == 'answer' else server.perform(wish)
                if durable and number == 2 * count + 1:
                    return count
                count += durable
        except StopIteration:
            return count
        finally:
            server.close()

    def recovered(self):
        client = self.connect(self.host)
        self.check_readable(client)
        kept = [block('c', label)[0] for label in ('a0-0', 'a1-1', 'a2-0')]
        self.assertNotIn('NOBLOCK', get(client, kept))
        for _ in range(2):
            self.clean(gain=1, copies=-1)
        self.check_readable(client)
        self.assertNotIn('NOBLOCK', get(client, kept))
        done = self.clean()
        self.assertEqual((done.orphans, done.deleted, done.dropped),
                         (0, 0, 0))
        spool = os.path.join(self.path, 'spool', '%016x' % self.host.machine)
        self.assertEqual(os.listdir(spool), [])
        client.close()

    def test_damage_is_named_and_stays_where_it_is(self):
        self.backup('a')
        self.delete('a', keep=1)
        key = max((x for x in listing(self.store) if x.startswith('seg/')),
                  key=lambda x: os.path.getsize(os.path.join(self.store, x)))
        path = os.path.join(self.store, key)
        os.chmod(path, 0o600)
        with open(path, 'r+b') as file:
            file.seek(1000)
            file.write(b'XX')
        status, out, said = run('clean', self.path)
        self.assertEqual(status, 1)
        self.assertIn(key, said)
        self.assertIn('\ndamaged 1\n', out)
        run('clean', self.path)
        self.assertTrue(os.path.exists(path))


def listing(path):
    """Keys of a store in a directory."""
    return sorted(os.path.relpath(os.path.join(where, name), path)
                  for where, _, names in os.walk(path) for name in names)


if __name__ == '__main__':
    unittest.main()
