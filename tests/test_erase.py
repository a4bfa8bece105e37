# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What the operator erases is gone, is said to be, and nothing else is.

Killed at any request, the same command completes it.
"""

import contextlib
import json
import os
import shutil
import tempfile
import unittest
from unittest import mock

import rawclient
import s3peers
import tarsnapd
import test_ledger
import world
from rawclient import D, Error, Host, R, W, get, here
from tarsnapd import ATTO, day_parse

WHY = 'its keys are lost'
GONE = 'all that this machine stored was deleted on 2026-11-26: ' + WHY


class Killed(BaseException):
    """The process ended here."""


class Erasing(test_ledger.Clocked):

    PRICES = ''

    def setUp(self):
        super().setUp()
        self.conf('mail-from = Backups <b@example.org>\n')
        self.good('user', 'address', 'joe', 'joe@example.org')
        self.ident = self.server().run(tarsnapd.account_need(
            'joe@example.org'))[1]['id']
        self.mails()

    def mails(self):
        """[text] of mails about erased machines, which are then sent."""
        server, found = self.server(), []
        for name, mail, done in server.run(tarsnapd.mail_list()):
            if not done:
                if mail['kind'] == 'erased':
                    found.append(tarsnapd.mail_render(
                        server.post, self.path, name, mail).get_content())
                server.run(tarsnapd.mail_end(name, mail))
        return found

    def stored(self, owner=True, blocks=3):
        """A machine with an archive and a deleted one; what is in it."""
        host = Host(self.client())
        if owner:
            self.server().run(tarsnapd.owner_set(host.machine, self.ident))
        client = self.client(host, R, W, D)
        old = host.backup(client, 'old', 2)
        host.names = host.backup(client, 'new', blocks)[2]
        tid = os.urandom(16)
        host.begin(client, tid, rawclient.DELETE_KIND)
        client.send('DELETE', rawclient.names_body(old[2] + [old[1]]))
        host.commit(client, tid, kind=rawclient.DELETE_KIND,
                    deletes=old[2] + [old[1]], unlinked=[old[:2]])
        return host

    def store(self):
        return self.server().store

    def keys(self, host, *places):
        """Keys of all that is kept of a machine's blocks."""
        return [key for place in places or ('seg', 'list')
                for key in self.store().list('%s/%016x/'
                                             % (place, host.machine))]

    def erase(self, host, *more, reason=WHY):
        return self.good('machine', 'erase', '%016x' % host.machine,
                         '--reason', reason, *more)

    def refused(self, host, roles=(R, W)):
        with self.assertRaises(Error) as caught:
            self.client(host, *roles)
        self.assertEqual(caught.exception.code, 'NOMACHINE')
        return str(caught.exception).partition(': ')[2]

    def rebuilt(self, host):
        """An index made anew says the same."""
        server = self.server()

        def dump():
            server.run(tarsnapd.catch_up(host.machine))
            return server.perform(('index', host.machine, 'dump'))

        before = dump()
        self.assertEqual(server.perform(('index', host.machine, 'lost')), [])
        server.perform(('index', host.machine, 'reset'))
        self.assertEqual(dump(), before)


class Machine(Erasing):

    def test_all_of_it_goes_and_nothing_else(self):
        mine, other = self.stored(), self.stored()
        everything = self.store().list('')
        said = self.erase(mine)
        self.assertIn('1 archives, 4 blocks, ', said)
        self.assertIn('nothing was deleted; with --yes', said)
        self.assertEqual(self.store().list(''), everything)
        self.client(mine, R, W)
        log = self.keys(mine, 'log')
        self.assertIn(' bytes of space are free', self.erase(mine, '--yes'))
        self.assertEqual(self.keys(mine), [])
        left = set(self.store().list(''))
        self.assertEqual({key for key in everything if key not in left
                          and '%016x' % mine.machine not in key}, set())
        self.assertLess(set(log), set(self.keys(mine, 'log')))
        for role in (R, W, D, rawclient.N):
            self.assertEqual(self.refused(mine, (role,)), GONE)
        self.assertEqual(len(get(self.client(other, R), other.names)), 3)
        self.assertIn('erased 2026-11-26 08:00:00Z ' + WHY, self.good(
            'machine', 'show', '%016x' % mine.machine))
        text, = self.mails()
        self.assertIn('(%016x), on 2026-11-26:\n    its keys' % mine.machine,
                      text)
        self.rebuilt(mine)
        self.assertIn(': 0 damaged', self.good('scrub'))
        self.good('repair')
        self.good('rebuild')
        self.good('clean')

    def test_again_is_no_more(self):
        host = self.stored()
        self.erase(host, '--yes')
        log = self.keys(host, 'log')
        self.at(3)
        said = self.erase(host, '--yes', reason='another')
        self.assertIn('was deleted on 2026-11-26: ' + WHY, said)
        self.assertEqual(self.keys(host, 'log'), log)
        self.assertEqual(self.refused(host), GONE)
        self.assertEqual(len(self.mails()), 1)

    def test_a_session_that_goes_on_gets_no_further(self):
        """What it has put is dropped by name before it is deleted."""
        host = self.stored()
        client = self.client(host, R, W)
        tid = os.urandom(16)
        host.begin(client, tid)
        names = [rawclient.put(client, rawclient.block('c', 'more', 9000))]
        with mock.patch.dict(tarsnapd.LIMIT, {'segment': 5000}):
            client.wait_received(1)
        orphans = [key for key in self.keys(host, 'seg')
                   if tid.hex() in key]
        self.assertTrue(orphans)
        self.erase(host, '--yes')
        last = self.server().run(tarsnapd.catch_up(host.machine)).k
        entry = tarsnapd.log_decode(host.machine, last, self.store().get(
            tarsnapd.log_key(host.machine, last)))
        self.assertEqual(entry.erased, WHY)
        self.assertLessEqual(set(orphans), set(entry.drops))
        for frame, body in (
                ('COMMIT', host.build(tid, puts=names)),
                ('GET', b'\3' + rawclient.names_body(host.names))):
            with self.assertRaises(Error) as caught:
                client.call(frame, body)
            self.assertEqual(str(caught.exception), 'NOMACHINE: ' + GONE)
        self.assertEqual(self.keys(host), [])
        # What a session elsewhere had not heard of is dropped in its turn.
        segment = tarsnapd.segment_key(host.machine, tid, 7, bytes(32))
        self.store().put(segment, b'late')
        self.good('clean')
        self.assertEqual(self.keys(host), [])
        entry = tarsnapd.log_decode(host.machine, last + 1, self.store().get(
            tarsnapd.log_key(host.machine, last + 1)))
        self.assertEqual(entry.drops, [segment])
        self.rebuilt(host)

    def test_what_is_deleted_later_is_kept_from_nobody(self):
        """A delete delay is for whoever has the keys, not the operator."""
        self.conf('delete-delay = 30\n')
        host = self.stored()
        self.assertEqual(len(self.keys(host, 'seg')), 3)
        self.erase(host, '--yes')
        self.assertEqual(self.keys(host), [])

    def test_killed_at_every_request(self):
        host = self.stored()
        self.good('scrub')              # so that there are extracts
        self.assertEqual(len(self.keys(host, 'list')), 3)
        base = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, base)
        saved = os.path.join(base, 'saved')
        shutil.copytree(self.path, saved, symlinks=True)
        steps, logs = 0, set()
        while self.dies(steps, host):
            self.erase(host, '--yes')
            self.assertEqual(self.keys(host), [], steps)
            self.assertEqual(self.refused(host), GONE, steps)
            self.assertEqual(len(self.mails()), 1, steps)
            logs.add(len(self.keys(host, 'log')))
            self.rebuilt(host)
            shutil.rmtree(self.path)
            shutil.copytree(saved, self.path, symlinks=True)
            steps += 1
        self.assertGreater(steps, 9)
        self.assertEqual(len(logs), 1)

    def dies(self, left, host):
        """Erase until the process dies before request `left` that changes
        something; False if it came to its end.
        """
        perform = tarsnapd.Server.perform

        def dying(server, wish):
            nonlocal left
            if wish[0] in ('put', 'delete', 'spool') or (
                    wish[0] == 'index' and wish[2] == 'apply'):
                left -= 1
                if left < 0:
                    raise Killed
            return perform(server, wish)

        with mock.patch.object(tarsnapd.Server, 'perform', dying):
            try:
                here('machine', self.path, 'erase', '%016x' % host.machine,
                     '--reason', WHY, '--yes')
            except Killed:
                return True
        return False

    def test_bad_input(self):
        host = self.stored()
        number = '%016x' % host.machine
        for words, says in (
                (('erase', number), '--reason'),
                (('erase', number, '--reason', ''), '1 to 1000'),
                (('erase', number, '--reason', 'a\nb'), '1 to 1000'),
                (('erase', number, '--reason', 'x' * 1001), '1 to 1000'),
                (('erase', '0' * 15 + '1', '--reason', 'x'), 'no machine'),
                (('show', number, '--yes'), 'are for erase')):
            self.wrong(says, 'machine', *words)
        self.assertTrue(self.keys(host))


class Closed(Erasing):

    def exported(self):
        """{machine: [second, reason] if it was erased} of the account."""
        found = self.server().run(tarsnapd.account_export(self.ident))
        self.assertEqual([one for one in found['machines']
                          if not one['ours']], [])
        return {int(one['number'], 16): one['erased']
                and list(one['erased'].values())
                for one in json.loads(json.dumps(found['machines']))}

    def test_the_export_says_which_machine_was(self):
        mine, also = self.stored(), self.stored()
        self.erase(mine)
        self.assertEqual(self.exported(), {mine.machine: None,
                                           also.machine: None})
        self.erase(mine, '--yes')
        self.at(3)
        self.assertEqual(self.exported(), {
            mine.machine: [self.now - 3 * tarsnapd.DAY, WHY],
            also.machine: None})

    def test_all_machines_of_an_account(self):
        mine, also, other = self.stored(), self.stored(), self.stored(False)
        self.wrong('is not closed and has not been below zero', 'user',
                   'erase', 'joe@example.org', '--yes')
        self.good('user', 'close', 'joe@example.org')
        said = self.good('user', 'erase', 'joe@example.org')
        self.assertEqual(said.count(' archives, '), 2)
        self.assertEqual(len(self.keys(mine, 'seg')), 3)
        self.good('user', 'erase', self.ident, '--yes')
        for host in (mine, also):
            self.assertEqual(self.keys(host), [])
            self.assertIn('the account was closed on 2026-11-26',
                          self.refused(host))
        self.client(other, R, W)
        text, = self.mails()
        self.assertEqual(text.count('the account was closed on'), 2)
        self.assertEqual(self.exported(), dict.fromkeys(
            (mine.machine, also.machine),
            [self.now, 'the account was closed on 2026-11-26']))
        self.good('user', 'erase', self.ident, '--yes')
        self.assertEqual(self.mails(), [])


class Deletable(Erasing):

    PRICES = test_ledger.Clocked.PRICES

    def test_without_money(self):
        """What was used until then stays charged, to the second; nothing
        after; and whoever pays may begin anew.
        """
        self.good('bill')
        self.good('user', 'credit', 'joe@example.org', '1', '--reason', 'x')
        host = self.stored(blocks=9)
        self.at(1)
        self.good('bill')
        held = self.usage(host, 0)[0].bytes
        self.assertGreater(held, 0)
        self.good('user', 'debit', 'joe@example.org', '2', '--reason', 'x')
        for day, works in ((2, False), (8, True)):
            self.at(day, 12)
            self.good('bill')
            if not works:
                self.wrong('has not been below zero for 7 days', 'user',
                           'erase', 'joe@example.org', '--yes')
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'r+') as file:
            conf = file.read()
            file.write('amnesty = yes\n')
            file.flush()
            self.wrong('has not been below', 'user', 'erase',
                       'joe@example.org')
            file.truncate(len(conf))
        balance = self.good('user', 'show', 'joe@example.org')
        self.good('user', 'erase', 'joe@example.org', '--yes')
        self.assertIn('below zero since 2026-11-27', self.refused(host))
        self.assertEqual(self.good('user', 'show', 'joe@example.org'),
                         balance)
        self.at(11)
        self.good('bill')
        self.assertEqual(self.usage(host, 7)[0].stored, held)
        row, amounts = self.usage(host, 8)
        self.assertEqual((row.bytes, row.stored), (0, held // 2))
        self.assertGreater(sum(amounts), 0)
        self.assertEqual(self.usage(host, 9)[0].stored, 0)
        for day in range(11):
            self.good('bill', '--check', tarsnapd.day_text(
                day_parse(test_ledger.START) + day))
        server = self.server()
        self.assertTrue(server.run(tarsnapd.ledger_pay(
            self.ident, 'bank', '1', 9 * ATTO)))
        new = Host(self.client(), user='joe@example.org', password=b'pw')
        new.backup(self.client(new, R, W), 'anew')
        self.assertIn('below zero', self.refused(host))


class Bucket(Erasing):
    """Where the store and the accounts are buckets."""

    PLACES = {'store': 's3://backup/x', 'accounts': 's3://backup/y'}

    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(s3peers.bucket('backup'))
        super().setUp()

    def test_all_of_it_goes(self):
        mine, other = self.stored(), self.stored()
        self.erase(mine, '--yes')
        self.assertEqual(self.keys(mine), [])
        self.assertEqual(self.refused(mine), GONE)
        self.assertEqual(len(get(self.client(other, R), other.names)), 3)
        self.rebuilt(mine)
        self.assertEqual(len(self.mails()), 1)
        self.assertIn(': 0 damaged', self.good('scrub'))


class Seen(unittest.TestCase):
    """What its user sees."""

    def test_one_line_and_a_new_machine(self):
        w = world.World(self)
        w.keygen()
        world.write(w.path('tree', 'file'), b'x' * 99)
        w.ok('-c', '-f', 'a', '-C', w.root, 'tree')
        number, = os.listdir(w.path('store', 'store', 'machine'))
        w.tarsnapd('machine', w.path('store'), 'erase', number, '--reason',
                   WHY, '--yes')
        for words in (['-x', '-f', 'a'], ['--list-archives'], ['--fsck'],
                      ['-c', '-f', 'b', '-C', w.root, 'tree'],
                      ['-d', '-f', 'a'], ['--print-stats']):
            done = w.tarsnap(*words)
            if words != ['--print-stats']:      # that of the cache
                self.assertEqual(done.code, 1, (words, done))
                self.assertRegex(
                    done.lines[0], r'^tarsnap: .*all that this machine '
                    r'stored was deleted on \d{4}-\d\d-\d\d: ' + WHY)
            self.assertNotIn('Traceback', done.err)
        key = w.keygen('new')
        w.ok('-c', '-f', 'a', '-C', w.root, 'tree', key=key,
             cache=w.path('new-cache'))


del Erasing

if __name__ == '__main__':
    unittest.main()
