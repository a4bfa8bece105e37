#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Accounts: their names, their machines, and the store they are kept in."""

import os
import stat
import tempfile
import time
import traceback
import unittest

import rawclient
import tarsnapd
from rawclient import Client, Embedded, Host, run
from tarsnapd import ServerError

OTHER = 65534               # a user and group that own nothing here


class Accounts(unittest.TestCase):

    def setUp(self):
        path = rawclient.server_directory(self)
        self.server = tarsnapd.Server(path)
        self.addCleanup(self.server.close)

    def run_steps(self, steps):
        return self.server.run(steps)

    def create(self, address, password=b'pw'):
        return self.run_steps(tarsnapd.account_create(address, password))

    def get(self, address):
        found = self.run_steps(tarsnapd.account_get(address))
        return found and found[1]['id']

    def test_one_address_one_account(self):
        ann = self.create('Ann@Example.org')
        self.assertEqual(self.get('ann@example.ORG'), ann)
        with self.assertRaisesRegex(ServerError, 'exists already'):
            self.create('ann@example.org')
        self.assertIsNone(self.get('bob@example.org'))

    def test_an_address_changes_hands(self):
        ann, bob = self.create('ann'), self.create('bob')
        move = tarsnapd.account_move
        found = self.run_steps(tarsnapd.account_need('ann'))
        with self.assertRaisesRegex(ServerError, 'bob exists'):
            self.run_steps(move(found, 'bob'))
        self.assertEqual((self.get('ann'), self.get('bob')), (ann, bob))
        self.run_steps(move(found, 'anna'))
        self.assertEqual((self.get('ann'), self.get('anna')), (None, ann))
        other = self.create('ann')
        self.assertEqual(self.get('ann'), other)
        with self.assertRaisesRegex(ServerError, 'somebody else'):
            self.run_steps(move(found, 'late'))     # not the newest version
        self.assertIsNone(self.get('late'))

    def test_a_crash_at_each_step_of_a_move(self):
        """One of the two addresses counts, and it can be done again."""
        ann = self.create('ann')
        for step in range(30):
            found = self.run_steps(tarsnapd.account_need('ann'))
            steps = tarsnapd.account_move(found, 'anna')
            value, done = None, False
            for _ in range(step):
                try:
                    value = self.server.perform(steps.send(value))
                except StopIteration:
                    done = True
                    break
            if done:
                break
            steps.close()
            names = [name for name in ('ann', 'anna') if self.get(name)]
            self.assertEqual(len(names), 1, step)
            if names == ['anna']:       # back, for the next step
                found = self.run_steps(tarsnapd.account_need('anna'))
                self.run_steps(tarsnapd.account_move(found, 'ann'))
        self.assertTrue(done)
        self.assertEqual(self.get('anna'), ann)

    def test_closed(self):
        ann = self.create('ann')
        self.run_steps(tarsnapd.account_close('ann'))
        self.assertIsNone(self.get('ann'))
        self.assertNotEqual(self.create('ann'), ann)
        kept = self.run_steps(tarsnapd.account_load(ann))[1]
        self.assertIn('closed', kept)

    def test_password(self):
        """A new one leaves nothing of the old one; the rest stays."""
        ann = self.create('ann', b'old')
        found = self.run_steps(tarsnapd.account_need('ann'))
        self.run_steps(tarsnapd.account_password(found, b'new'))
        account = self.run_steps(tarsnapd.account_need('ann'))[1]
        self.assertEqual(account['id'], ann)
        for name in ('salt', 'stored'):
            self.assertNotEqual(account[name], found[1][name])
        self.assertEqual(account['stored'], tarsnapd.account_verifier(
            b'new', bytes.fromhex(account['salt']))['stored'])

    def test_machines_of_before_there_was_a_list(self):
        """bill lists them, with their names."""
        ann = self.create('ann')
        client = Client(Embedded(self.server.path))
        number = Host(client).machine
        client.close()
        self.run_steps(tarsnapd.owner_set(number, ann))
        store = self.server.accounts
        store.delete('owned/%s/%016x' % (ann, number))
        self.assertEqual(self.run_steps(tarsnapd.owned_machines(ann)), {})
        for _ in range(2):
            self.run_steps(tarsnapd.owned_complete())
        name = self.run_steps(tarsnapd.machine_load(number)).name
        self.assertEqual(self.run_steps(tarsnapd.owned_machines(ann)),
                         {'%016x' % number: name})
        bob = self.create('bob')
        self.run_steps(tarsnapd.owner_set(number, bob, name))
        self.assertEqual(self.run_steps(tarsnapd.owned_machines(ann)), {})

    def test_owners(self):
        ann, bob = self.create('ann'), self.create('bob')
        client = Client(Embedded(self.server.path))
        number = Host(client).machine
        client.close()
        self.assertIsNone(self.run_steps(tarsnapd.owner_get(number)))
        for ident in (ann, bob):
            self.run_steps(tarsnapd.owner_set(number, ident))
            self.run_steps(tarsnapd.owner_set(number, ident))   # no change
            self.assertEqual(self.run_steps(tarsnapd.owner_get(number)),
                             ident)
        self.assertEqual(len(self.server.accounts.list('owner/')), 2)
        self.assertEqual(self.run_steps(tarsnapd.owner_machines()),
                         {number: bob})


class Apart(unittest.TestCase):
    """Accounts in a store of their own."""

    def setUp(self):
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.base = base.name
        self.path = os.path.join(base.name, 'srv')

    def files(self, path):
        return {os.path.relpath(os.path.join(where, name), path)
                .split('/')[0] for where, _, names in os.walk(path)
                for name in names}

    def test_by_default(self):
        self.assertEqual(run('init', self.path)[0], 0)
        self.assertEqual(run('user', self.path, 'add', 'zoe', stdin=b'a\n'),
                         (0, '', ''))
        self.assertEqual(self.files(os.path.join(self.path, 'accounts')),
                         {'account', 'address'})
        self.assertEqual(self.files(os.path.join(self.path, 'store')),
                         {'store-id'})
        status, out, _ = run('user', self.path, 'show', 'zoe')
        self.assertEqual(status, 0)
        self.assertRegex(out, r'\Aaccount [0-9a-f]{16}\naddress zoe\n'
                         r'created \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ\n\Z')

    def test_shared_with_a_group(self):
        """What is written is the group's too, whatever the umask."""
        shared = os.path.join(self.base, 'shared')
        os.mkdir(shared)
        os.chmod(shared, 0o2770)
        self.assertEqual(run('init', self.path, '--accounts', shared)[0], 0)
        self.assertEqual(run('user', self.path, 'add', 'zoe',
                             stdin=b'a\n')[0], 0)
        for where, _, names in os.walk(os.path.join(shared, 'account')):
            self.assertEqual(stat.S_IMODE(os.stat(where).st_mode), 0o2770)
            for name in names:
                self.assertEqual(stat.S_IMODE(os.stat(
                    os.path.join(where, name)).st_mode), 0o660)
        for where, folders, _ in os.walk(os.path.join(self.path, 'store')):
            for name in folders:
                mode = os.stat(os.path.join(where, name)).st_mode
                self.assertEqual(stat.S_IMODE(mode), 0o700)

    @unittest.skipIf(os.geteuid(), 'only root can become another user')
    def test_another_user_has_accounts_and_no_block(self):
        """Who has the store of accounts only can do all an owner may, and
        can read nothing else.
        """
        shared = os.path.join(self.base, 'shared')
        os.mkdir(shared)
        os.chown(shared, -1, OTHER)
        os.chmod(shared, 0o2770)
        os.chmod(self.base, 0o755)
        self.assertEqual(run('init', self.path, '--accounts', shared)[0], 0)
        self.assertEqual(run('user', self.path, 'add', 'zoe@example.org',
                             stdin=b'old\n')[0], 0)
        before = self.files(self.path)
        post = tarsnapd.Post({'mail-from': 'b@example.org',
                              'web-url': 'https://example.org/'}, '/')
        child = os.fork()
        if not child:
            status = 1
            try:
                os.setgroups([])
                os.setgid(OTHER)
                os.setuid(OTHER)
                self.as_other(shared, post)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(self.files(self.path), before)
        # What the other user wrote is good for the operator.
        self.assertEqual(run('user', self.path, 'list'),
                         (0, 'anna@example.org\nbob@example.org\n', ''))
        self.assertEqual(run('scrub', self.path)[0], 0)
        self.assertEqual(run('user', self.path, 'passwd', 'anna@example.org',
                             stdin=b'x\n'), (0, '', ''))

    def as_other(self, shared, post):
        for name in ('', 'store', 'store/store-id', 'secret',
                     'identity.key'):
            with self.assertRaises(PermissionError):
                os.stat(os.path.join(self.path, name, '.')
                        if name in ('', 'store')
                        else os.path.join(self.path, name))
        store = tarsnapd.FileStore(shared, os.path.join(shared, '.tmp'))
        def perform(wish):
            here = {'now': lambda: int(time.time()), 'random': os.urandom}
            return here.get(wish[0], getattr(store, wish[0], None))(
                *wish[1:])

        def steps(wishes):
            return tarsnapd.carry_out(wishes, perform)

        def link():
            """The link that is due; all mail is taken as sent."""
            found = []
            for name, mail, done in steps(tarsnapd.mail_list()):
                if not done:
                    steps(tarsnapd.mail_end(name, mail))
                    found += [mail['values'].get('link', '')]
            return max(found).partition('link=')[2]

        steps(tarsnapd.link_reset(post, 'zoe@example.org'))
        steps(tarsnapd.link_use(post, link(), b'new'))
        found = steps(tarsnapd.account_need('zoe@example.org'))
        steps(tarsnapd.link_move(post, found, 'anna@example.org'))
        steps(tarsnapd.link_use(post, link()))
        steps(tarsnapd.link_join(post, 'bob@example.org'))
        steps(tarsnapd.link_use(post, link(), b'x'))


if __name__ == '__main__':
    unittest.main()
