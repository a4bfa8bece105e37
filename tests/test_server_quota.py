# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Quotas and read-only: what is refused, in which words, and what goes on."""

import os
import random
import unittest
from unittest import mock

import lab
import rawclient
import tarsnap
from lab import LabTest, snapshot
from rawclient import (
    COMPLETE, Client, Embedded, Error, Host, R, W, block, here, put,
    server_directory, sha)

MB = 10 ** 6


class Clients(LabTest):
    """What tarsnap says and leaves behind."""

    def setUp(self):
        super().setUp()
        self.machine = '%016x' % self.lab.key.machine
        self.noise = random.Random(1)

    def command(self, *words):
        status, out, err = here('machine', self.lab.store, *words)
        self.assertEqual((status, err), (0, ''))
        return out

    def held(self):
        return int(self.command('show', self.machine).split()[5])

    def test_quota(self):
        self.write('one', self.noise.randbytes(MB))
        model = snapshot(self.lab.tree)
        self.host.create('one')
        used = self.held()
        self.assertTrue(MB < used < 1.2 * MB, used)
        self.command('quota', self.machine, '2M')
        self.write('two', self.noise.randbytes(3 * MB))
        result = self.host.create('two', status=1)
        self.assertRegex(
            result.err, r'quota of the machine is 2000000 bytes, %d are used,'
            r' and this takes \d+ more' % used)
        # What there is can be read, and deleting makes room.
        self.host.check('one', model)
        self.assertLessEqual(self.held(), 2 * MB)
        self.command('quota', self.machine, '5M')
        self.host.create('two')
        self.command('quota', self.machine, 'none')
        self.write('four', self.noise.randbytes(3 * MB))
        self.host.create('four')
        self.command('quota', self.machine, '1k')
        self.assertEqual(self.host.run('-d', '-f', 'two').status, 0)
        self.assertEqual(self.host.run('-d', '-f', 'one').status, 0)
        os.unlink(os.path.join(self.lab.tree, 'four'))
        self.assertEqual(self.host.create('five', status=1).out, '')

    def test_checkpoints_stay(self):
        for i in range(6):
            self.write('file%d' % i, self.noise.randbytes(MB))
        self.command('quota', self.machine, '4M')
        result = self.host.good('-c', '-f', 'whole', '--checkpoint-bytes',
                                '1000000', '-C', self.lab.tree, '.',
                                status=1)
        self.assertIn('quota of the machine is 4000000 bytes', result.err)
        self.assertEqual(self.host.run('--recover').status, 0)
        self.assertEqual(self.host.good('--list-archives').out,
                         'whole.part\n')
        found = snapshot(self.host.extract('whole.part',
                                           status=1))
        self.assertIn(b'file0', found)
        # What --recover entered, a record, is on top of what was let in.
        self.assertLessEqual(self.held(), 4 * MB + 4000)
        # Put again with more room it sends the rest, and what was cut off.
        self.command('quota', self.machine, '8M')
        self.host.create('again')
        self.assertGreater(self.held(), 6 * MB)

    def test_read_only_machine(self):
        self.write('one', b'one')
        model = snapshot(self.lab.tree)
        self.host.create('one')
        self.host.create('two')
        self.command('read-only', self.machine, 'on')
        self.assertIn('read-only on', self.command('show', self.machine))
        result = self.host.run('-c', '-f', 'three', '-C', self.lab.tree, '.')
        self.assertEqual(result.status, 1)
        self.assertIn('this machine is read-only: archives can be read and '
                      'deleted, not stored', result.err)
        self.host.check('one', model)
        self.host.good('-d', '-f', 'two')
        self.host.good('--fsck')
        self.command('read-only', self.machine, 'off')
        self.host.create('three')
        self.assertEqual(self.host.good('--list-archives').out,
                         'one\nthree\n')

    def test_read_only_server(self):
        self.write('one', b'one')
        model = snapshot(self.lab.tree)
        self.host.create('one')
        with open(os.path.join(self.lab.store, 'tarsnapd.conf'), 'a') as file:
            file.write('read-only = yes\n')
        for words in (('-c', '-f', 'three', '-C', self.lab.tree, '.'),
                      ('-d', '-f', 'one')):
            result = self.host.good(*words, status=1)
            self.assertIn('the server is read-only for now: archives can '
                          'be read, not stored or deleted', result.err)
        self.host.check('one', model)
        with self.assertRaisesRegex(tarsnap.Refused, 'read-only'):
            lab.register(self.lab.store)


class Account(unittest.TestCase):

    def test_all_machines_together(self):
        path = server_directory(self)
        self.assertEqual(here('user', path, 'quota', 'joe', '100k')[0], 0)
        self.assertIn('quota 100000\n', here('user', path, 'show', 'joe')[1])
        sessions = [Client(Embedded(path)) for _ in range(2)]
        hosts = [Host(one, user='joe', password=b'pw') for one in sessions]
        for one, host in zip(sessions, hosts):
            self.addCleanup(one.close)
            one.auth(host.machine, host.keys, R, W)
        hosts[0].backup(sessions[0], 'a', 6, 10000)
        # What has only arrived counts.
        tid = os.urandom(16)
        hosts[1].begin(sessions[1], tid)
        names = [put(sessions[1], block('c', str(i), 10000))
                 for i in range(2)]
        sessions[1].wait_received(2)
        hosts[0].begin(sessions[0], os.urandom(16))
        put(sessions[0], block('c', 'more', 9000))
        sessions[0].wait_received(1)
        sessions[0].send('PUT', b''.join(block('c', 'most', 12000)))
        with self.assertRaisesRegex(
                Error, r'QUOTA: quota of the account is 100000 bytes, '
                r'8\d+ are used, and this takes 21\d+ more'):
            sessions[0].next()
        # Another one's figures are those of its BEGIN.
        names.append(put(sessions[1], block('a', 'r')))
        hosts[1].commit(sessions[1], tid, puts=names, linked=[
            (sha(b'x'), names[-1], bytes(16), COMPLETE)])

    def begun_together(self, path, count):
        """(session, host, tid) of so many machines of joe that have begun a
        write.
        """
        found = []
        for _ in range(count):
            session = Client(Embedded(path))
            self.addCleanup(session.close)
            host, tid = Host(session, user='joe', password=b'pw'), (
                os.urandom(16))
            session.auth(host.machine, host.keys, R, W)
            host.begin(session, tid)
            found.append((session, host, tid))
        return found

    def test_machines_that_began_together(self):
        """Each had room by itself when it began; all of them have not."""
        path = server_directory(self)
        self.assertEqual(here('user', path, 'quota', 'joe', '100k')[0], 0)
        began, stored = self.begun_together(path, 4), 0
        for session, host, tid in began:
            names = [put(session, block('c', tid.hex(), 80000)),
                     put(session, block('a', tid.hex()))]
            session.wait_received(2)
            try:
                host.commit(session, tid, puts=names, linked=[
                    (sha(tid), names[1], bytes(16), COMPLETE)])
                stored += 80000
            except Error as e:
                self.assertRegex(str(e), 'QUOTA: quota of the account is '
                                 r'100000 bytes, \d+ are used, and this '
                                 r'takes 80\d+ more')
        self.assertEqual(stored, 80000)

    def test_what_others_put_is_looked_at_again(self):
        """Else all of it could arrive, if never be committed."""
        path = server_directory(self)
        here('user', path, 'quota', 'joe', '400k')
        with mock.patch.dict(rawclient.tarsnapd.LIMIT, {
                'segment': 50000, 'seconds measured': 0}):
            one, two = self.begun_together(path, 2)
            for i in range(5):
                put(one[0], block('c', 'one%d' % i, 60000))
                one[0].wait_received(i + 1)
            with self.assertRaisesRegex(Error, 'QUOTA: quota of the account'):
                for i in range(5):
                    put(two[0], block('c', 'two%d' % i, 60000))
                    two[0].wait_received(i + 1)
            self.assertLess(i, 4)

    def test_two_at_once_are_judged_at_the_commit(self):
        path = server_directory(self)
        one, two = Client(Embedded(path)), Client(Embedded(path))
        host = Host(one)
        for session in (one, two):
            self.addCleanup(session.close)
        here('machine', path, 'quota', '%016x' % host.machine, '50000')
        for session in (one, two):
            session.auth(host.machine, host.keys, R, W)
        tids = os.urandom(16), os.urandom(16)
        puts = []
        for session, tid in zip((one, two), tids):
            host.begin(session, tid)
        for session, tid in zip((one, two), tids):
            puts.append([put(session, block('c', tid.hex(), 30000)),
                         put(session, block('a', tid.hex()))])
        host.commit(one, tids[0], puts=puts[0], linked=[
            (sha(b'1'), puts[0][1], bytes(16), COMPLETE)])
        with self.assertRaisesRegex(Error, 'QUOTA: .*takes 30'):
            host.commit(two, tids[1], puts=puts[1], linked=[
                (sha(b'2'), puts[1][1], bytes(16), COMPLETE)])

    def test_wrong_words(self):
        path = server_directory(self)
        for words in (('machine', path, 'quota', '1', '5'),
                      ('user', path, 'quota', 'jim', '5'),
                      ('user', path, 'quota', 'joe', 'much'),
                      ('machine', path, 'read-only', '1')):
            status, out, err = here(*words)
            self.assertEqual((status, out, err.count('\n')), (1, '', 1), err)


if __name__ == '__main__':
    unittest.main()
