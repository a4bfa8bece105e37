# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A delete that can be taken back: --undelete, delete-delay, freeze.

Everything a stolen delete or nuke key destroys comes back, whole, in a signed
commit that every host follows; statistics are as if it had never been gone;
and who holds a key cannot shorten the time there is for that.
"""

import contextlib
import io
import os
import time
import unittest
from unittest import mock

import lab

import tarsnap
import tarsnapd

R, W, D, N = 1, 2, 3, 4
HEX = '%016x'


def operator(*args):
    """Run a server command in this process; (status, output)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = tarsnapd.main(list(args))
    return status, out.getvalue()


class Undelete(lab.LabTest):

    def setUp(self):
        super().setUp()
        stack = lab.fine()
        self.addCleanup(stack.close)
        for number in range(16):
            self.write('d%d/f' % (number % 4) + str(number),
                       os.urandom(1500 + 500 * number))
        self.models = {}
        self.keep('a')
        self.write('d1/new', os.urandom(20000))
        self.keep('b')
        self.write('d2/newer', os.urandom(9000))
        self.keep('c')

    def keep(self, name):
        self.host.create(name)
        self.models[name] = lab.snapshot(self.lab.tree)

    def whole(self, *names):
        """These archives, and no others, are there, and whole; the index
        made anew is the index there is.
        """
        found = self.host.good('--list-archives', cache=False).out.split()
        self.assertEqual(sorted(found), sorted(names))
        for name in names:
            self.host.check(name, self.models[name])
        machine = HEX % self.lab.key.machine
        before = operator('index-dump', self.lab.store, machine)
        self.assertEqual(operator('rebuild', self.lab.store)[0], 0)
        self.assertEqual(operator('index-dump', self.lab.store, machine),
                         before)

    def test_one_comes_back_as_it_was(self):
        before = self.host.meta()[2][:4], self.lab.live()
        self.host.good('-d', '-f', 'b')
        self.assertLess(len(self.lab.live()), len(before[1]))
        done = self.host.good('--undelete', '-f', 'b', '-v')
        self.assertIn('Undeleted archive "b"', done.err)
        self.assertEqual((self.host.meta()[2][:4], self.lab.live()), before)
        self.whole('a', 'b', 'c')
        # And it can be deleted again, and come back again.
        for _ in range(2):
            self.host.good('-d', '-f', 'b')
            self.host.good('--undelete', '-f', 'b')
        self.assertEqual((self.host.meta()[2][:4], self.lab.live()), before)
        self.host.good('--fsck')
        self.assertEqual(self.host.meta()[2][:4], before[0])

    def test_only_what_it_needs_comes_back(self):
        self.host.good('-d', '-f', 'c')
        with_two = self.host.meta()[2][:4], self.lab.live()
        self.host.good('-d', '-f', 'a', '-f', 'b')
        self.host.good('--undelete', '-f', 'b')
        self.host.good('--undelete', '-f', 'a')
        self.assertEqual((self.host.meta()[2][:4], self.lab.live()), with_two)
        self.whole('a', 'b')

    def test_blocks_that_went_with_a_later_delete(self):
        """What 'a' shared with 'b' was live when 'a' went, and is not now."""
        for name in 'abc':
            self.host.good('-d', '-f', name)
        self.assertEqual(self.lab.live(), {})
        self.host.good('--undelete', '-f', 'a')
        self.whole('a')

    def test_blocks_stored_again_meanwhile(self):
        for name in 'abc':
            self.host.good('-d', '-f', name)
        self.keep('other')
        self.host.good('--undelete', '-f', 'a', '-f', 'c')
        self.whole('a', 'c', 'other')
        self.host.good('-d', '-f', 'other')
        self.whole('a', 'c')

    def test_a_nuke_is_taken_back(self):
        before = self.host.meta()[2][:4], self.lab.live()
        with mock.patch.object(tarsnap.sys, 'stdin') as stdin:
            stdin.buffer.readline.return_value = b'No Tomorrow\n'
            self.host.good('--nuke')
        self.assertEqual(self.lab.live(), {})
        self.host.good('--undelete', '--since-commit', '4')
        self.assertEqual((self.host.meta()[2][:4], self.lab.live()), before)
        self.whole('a', 'b', 'c')

    def test_since_a_commit(self):
        self.host.good('-d', '-f', 'a')
        self.host.good('-d', '-f', 'b', '-f', 'c')
        listed = self.host.good('--undelete', '--dry-run', cache=False)
        rows = [line.split('\t') for line in listed.out.splitlines()]
        self.assertEqual([(row[0], row[2], row[3]) for row in rows],
                         [('a', '4', '-'), ('b', '5', '-'), ('c', '6', '-')])
        self.host.good('--undelete', '--since-commit', '5')
        self.whole('b', 'c')

    def test_other_hosts_follow(self):
        """A write-only host, one that prunes, one that only reads."""
        writer = self.lab.host('w', {W})
        writer.good('--fsck')
        writer.create('w1')
        pruner = self.lab.host('p', {D})
        pruner.good('--fsck')
        for name in ('a', 'b', 'c', 'w1'):
            pruner.good('-d', '-f', name)
        writer.create('w2')
        pruner.good('--undelete', '-f', 'w1')
        with lab.tapped() as log:
            writer.create('w3')
        # All but the record is there again, and it knows.
        self.assertEqual([row[1] for row in log.puts()], [b'a'])
        self.models.update(dict.fromkeys(
            ('w1', 'w2', 'w3'), lab.snapshot(self.lab.tree)))
        self.host.good('-d', '-f', 'w2')
        self.whole('w1', 'w3')
        self.assertEqual(self.host.meta()[2][:4], self.fsck_totals(pruner))

    def fsck_totals(self, host):
        host.good('--fsck')
        return host.meta()[2][:4]

    def test_what_is_refused(self):
        def says(text, *args, **options):
            done = self.host.run(*args, **options)
            self.assertEqual(done.status, 1, done)
            self.assertIn(text, done.err)

        says('No archive "x" was deleted', '--undelete', '-f', 'x')
        says('No archive "a" was deleted', '--undelete', '-f', 'a')
        says('takes archive names or --since-commit', '--undelete')
        says('takes archive names or --since-commit', '--undelete',
             '-f', 'a', '--since-commit', '1')
        reader = self.lab.host('r', {R, W})
        done = reader.run('--undelete', '-f', 'a')
        self.assertEqual(done.status, 1)
        self.assertIn('The delete authorization is not in key file',
                      done.err)
        self.host.good('-d', '-f', 'a')
        self.keep('a')
        says('No archive "a" was deleted', '--undelete', '-f', 'a')
        self.whole('a', 'b', 'c')

    def drop(self, dropped):
        """What a cleaner does: the log drops segments, then they go."""
        server = tarsnapd.Server(self.lab.store)
        machine = self.lab.key.machine
        try:
            state = server.run(tarsnapd.catch_up(machine))
            entry = tarsnapd.Entry(machine, state.k + 1, state.log_hash,
                                   state.time)
            entry.blocks, entry.bytes = state.blocks, state.bytes
            entry.drops = sorted(dropped)
            self.assertTrue(server.run(tarsnapd.log_put(entry)))
            server.run(tarsnapd.catch_up(machine))
        finally:
            server.close()

    def keeping(self, since):
        server = tarsnapd.Server(self.lab.store)
        try:
            server.run(tarsnapd.catch_up(self.lab.key.machine))
            return server.perform(('index', self.lab.key.machine, 'keeping',
                                   since))
        finally:
            server.close()

    def test_what_is_dropped_is_gone_and_says_so(self):
        now = int(time.time())
        self.assertEqual(self.keeping(0), {})
        for name in 'abc':
            self.host.good('-d', '-f', name)
        kept = self.keeping(now)
        self.assertEqual(len(kept), 3)
        self.assertEqual(self.keeping(now + 1000), {})
        self.drop(kept)
        self.assertEqual(self.keeping(0), {})
        done = self.host.run('--undelete', '-f', 'a')
        self.assertEqual(done.status, 1)
        self.assertIn('is kept no more', done.err)
        self.assertEqual(self.host.good('--undelete', '--dry-run',
                                        cache=False).out, '')

    def clean(self, days=0, rounds=2):
        """Give back so many days later all there is to give back."""
        real, policy = time.time, tarsnapd.Policy()
        policy.used, policy.gain = 100, 1
        with mock.patch.object(tarsnapd.time, 'time',
                               lambda: real() + days * tarsnapd.DAY):
            for _ in range(rounds):
                server = tarsnapd.Server(self.lab.store)
                server.run(tarsnapd.clean(self.lab.key.machine, policy,
                                          tarsnapd.Cleaned()))
                server.close()

    def segments(self):
        return sum(len(files) for _, _, files in
                   os.walk(os.path.join(self.lab.store, 'store', 'seg')))

    def test_the_cleaner_waits(self):
        machine = HEX % self.lab.key.machine
        operator('machine', self.lab.store, 'delete-delay', machine, '7')
        for name in 'abc':
            self.host.good('-d', '-f', name)
        before = self.segments()
        self.clean(days=6)
        kept = self.segments()
        self.assertGreaterEqual(kept, 3)
        self.assertLessEqual(kept, before)
        self.host.good('--undelete', '-f', 'a', '-f', 'c')
        self.whole('a', 'c')
        self.clean(days=6)
        self.whole('a', 'c')
        self.host.good('-d', '-f', 'a')
        # Receive times never go back, so this was deleted on the sixth day.
        self.clean(days=12)
        self.assertNotEqual(self.keeping(0), {})
        self.clean(days=14)
        self.assertEqual(self.keeping(0), {})
        self.whole('c')
        self.assertIn('is kept no more',
                      self.host.run('--undelete', '-f', 'b').err)
        self.whole('c')

    def test_deleted_while_the_cleaner_copies(self):
        """What it was about to drop has become something to keep."""
        machine = self.lab.key.machine
        operator('machine', self.lab.store, 'delete-delay', HEX % machine,
                 '7')
        self.clean()                    # all of them: one segment
        self.write('d3/one', os.urandom(9000))
        self.keep('e')
        server, policy = tarsnapd.Server(self.lab.store), tarsnapd.Policy()
        policy.merge, policy.gain = 2, 1
        steps, value, deleted = tarsnapd.clean(
            machine, policy, tarsnapd.Cleaned()), None, False
        with contextlib.suppress(StopIteration):
            while True:
                wish = steps.send(value)
                if wish[2:3] == ('check_move',) and not deleted:
                    deleted = True
                    self.host.good('-d', '-f', 'e')
                value = server.perform(wish) if wish[0] != 'answer' else None
        server.close()
        self.assertTrue(deleted)
        self.host.good('--undelete', '-f', 'e')
        self.whole('a', 'b', 'c', 'e')

    def test_what_was_moved_before_and_after(self):
        """Deleted out of a copy the cleaner made, brought back, and moved
        again; then that copy is gone, and the index is made anew.
        """
        self.host.good('-d', '-f', 'a')
        self.clean()                    # b and c: into a copy
        self.host.good('-d', '-f', 'b')
        self.host.good('--undelete', '-f', 'b')
        self.host.good('-d', '-f', 'c')
        self.clean()                    # b: into another
        self.whole('b')
        self.host.good('-d', '-f', 'b')
        self.clean()
        self.whole()
        self.assertEqual(self.segments(), 0)

    def test_a_lost_answer_and_a_conflict(self):
        """The commit's answer is lost; another host commits in between."""
        other = self.lab.host('o')
        other.good('--fsck')
        self.host.good('-d', '-f', 'a')
        done = []

        def lie(kind, rid, body, answers):
            if kind == tarsnap.REVIVE and not done:
                done.append('conflict')
                other.good('-d', '-f', 'b')
            elif kind == tarsnap.COMMIT and done == ['conflict'] and (
                    answers[-1][0] == tarsnap.COMMITTED):
                done.append('lost')
                raise tarsnap.ChannelLost('lost')
            return answers

        with lab.tapped(lie):
            self.host.good('--undelete', '-f', 'a')
        self.assertEqual(done, ['conflict', 'lost'])
        self.whole('a', 'c')
        self.assertEqual(self.host.meta()[2][:4], self.fsck_totals(other))

    def test_a_server_that_brings_back_too_little(self):
        """Names left out of ADDED are found by whoever follows."""
        other = self.lab.host('o')
        other.good('--fsck')
        self.host.good('-d', '-f', 'a')
        other.good('-d', '-f', 'b')
        self.host.good('--undelete', '-f', 'a')

        def lie(kind, rid, body, answers):
            if kind != tarsnap.CHANGES:
                return answers
            return [(k, i, b[:1] + bytes([b[1] - 1]) + b[2:-37]
                     if k == tarsnap.ADDED else b) for k, i, b in answers]

        with lab.tapped(lie):
            done = other.run('-d', '-f', 'c')
        self.assertEqual(done.status, 1)
        self.assertIn('left out or changed names that were put', done.err)


class Delay(lab.LabTest):

    def test_only_made_shorter_when_the_longer_one_is_over(self):
        day = tarsnapd.DAY
        delay = tarsnapd.delete_delay
        self.assertEqual(delay([], 0), 0)
        self.assertEqual(delay([[0, 7]], 10 ** 9), 7 * day)
        shorter = [[0, 7], [100 * day, 1]]
        self.assertEqual(delay(shorter, 100 * day), 7 * day)
        self.assertEqual(delay(shorter, 107 * day - 1), 7 * day)
        self.assertEqual(delay(shorter, 107 * day), day)
        # Nor by going down in two steps.
        steps = [[0, 30], [100 * day, 10], [101 * day, 0]]
        self.assertEqual(delay(steps, 102 * day), 30 * day)
        self.assertEqual(delay(steps, 130 * day), 0)
        self.assertEqual(delay([[0, 0], [5, 7]], 5), 7 * day)

    def test_operator_sets_it(self):
        machine = HEX % self.lab.key.machine

        def run(*args):
            return operator('machine', self.lab.store, *args)

        self.assertIn('delete-delay 0\n', run('show', machine)[1])
        self.assertIn('delete-delay 7\n', run('delete-delay', machine,
                                              '7')[1])
        status, text = run('delete-delay', machine, '0')
        self.assertEqual(status, 0)
        self.assertIn('delete-delay 7\ndelete-delay-shorter-from ', text)
        for words in (('delete-delay', machine, 'x'), ('freeze', machine, 'q'),
                      ('delete-delay', machine, '99999'), ('show', '17'),
                      ('delete-delay', machine), ('thaw', machine)):
            status, text = run(*words)
            self.assertEqual((status, text.count('\n')), (1, 1), text)
        self.write('f', b'x' * 1000)
        self.host.create('a')
        self.host.good('-d', '-f', 'a')
        row = self.host.good('--undelete', '--dry-run').out.split('\t')
        self.assertNotEqual(row[3], '-\n')

    def test_new_machines_get_the_servers(self):
        with open(os.path.join(self.lab.store, 'tarsnapd.conf'), 'a') as file:
            file.write('delete-delay = 7\n')
        key = lab.register(self.lab.store)
        self.assertIn('delete-delay 7\n', operator(
            'machine', self.lab.store, 'show', HEX % key.machine)[1])


class Freeze(lab.LabTest):

    def session(self, letters='w', machine=True):
        """A session bound to the machine, as a forced command makes it."""
        local = tarsnapd.open_local(
            self.lab.store, False, 'stdio',
            self.lab.key.machine if machine else None)
        self.addCleanup(local.close)
        return local

    def auth(self, local, role):
        key = self.lab.key
        nonce = bytes(32)
        signed = (b'tarsnap-auth-1\0\0\1\2' + key.store + bytes(32)
                  + tarsnap.U64.pack(key.machine) + bytes([role])
                  + local.session.nonce + nonce)
        body = (b'\0\1' + tarsnap.U64.pack(key.machine) + bytes([role])
                + nonce + tarsnap.sign(key.sign_privs[role], signed))
        return local.receive(tarsnap.AUTH, 1, body)[-1][0]

    def test_a_frozen_role_is_out_at_once(self):
        machine = HEX % self.lab.key.machine
        before = self.session()
        for role in (R, D):
            self.assertEqual(self.auth(before, role), tarsnap.AUTHOK)
        status, text = operator('machine', self.lab.store, 'freeze', machine,
                                'dn')
        self.assertEqual(status, 0)
        self.assertIn('frozen dn\n', text)
        # One that is in already: at its next BEGIN.
        begin = (bytes([tarsnap.KIND_DELETE]) + bytes(32)
                 + bytes(8 + 32) + b'\0')
        answer = before.receive(tarsnap.BEGIN, 2, begin)[-1]
        self.assertEqual(answer[0], tarsnap.ERROR)
        self.assertIn(b'frozen', answer[2])
        after = self.session()
        self.assertEqual(self.auth(after, D), tarsnap.ERROR)
        self.assertEqual(self.auth(after, W), tarsnap.AUTHOK)
        # Who could write to the files is let in, and can repair.
        self.assertEqual(self.auth(self.session(machine=False), D),
                         tarsnap.AUTHOK)
        operator('machine', self.lab.store, 'unfreeze', machine)
        self.assertEqual(self.auth(self.session(), D), tarsnap.AUTHOK)

    def test_reading_stops_within_seconds(self):
        machine = HEX % self.lab.key.machine
        local = self.session()
        self.assertEqual(self.auth(local, R), tarsnap.AUTHOK)
        operator('machine', self.lab.store, 'freeze', machine, 'r')
        real = time.time
        later = tarsnapd.LIMIT['seconds to freeze'] + 1
        with mock.patch.object(tarsnapd.time, 'time',
                               lambda: real() + later):
            answer = local.receive(tarsnap.LIST, 2, b'\0\0')[-1]
        self.assertEqual(answer[0], tarsnap.ERROR)


if __name__ == '__main__':
    unittest.main()
