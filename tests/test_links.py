#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Links in mails: made by us alone, for a while, once; and what is exported.
"""

import base64
import contextlib
import email
import email.policy
import json
import os
import time
import unittest

import rawclient
import s3peers
import tarsnapd
from rawclient import Client, Embedded, Host, run
from tarsnapd import ServerError
from test_mail import Clock

URL = 'https://backup.example.org/manage'


class Case(unittest.TestCase):

    PLACES = {}                 # where store and accounts are

    def setUp(self):
        self.path = rawclient.server_directory(self, self.PLACES)
        with open(os.path.join(self.path, 'tarsnapd.conf'), 'a') as file:
            file.write('mail-from = backup@example.org\nweb-url = %s\n' % URL)
        self.server = Clock(self.path)
        self.post = self.server.post
        self.addCleanup(self.server.close)
        self.ann = self.steps(tarsnapd.account_create(
            'ann@example.org', b'old'))

    def steps(self, steps):
        return self.server.run(steps)

    def found(self, address='ann@example.org'):
        return self.steps(tarsnapd.account_need(address))

    def mails(self):
        """{kind: mail} that are due; they are taken as sent."""
        found = {}
        for name, mail, done in self.steps(tarsnapd.mail_list()):
            if not done:
                self.steps(tarsnapd.mail_end(name, mail))
                self.assertNotIn(mail['kind'], found)
                found[mail['kind']] = mail
        return found

    def token(self, to, kind):
        """What stands in the only link that was mailed."""
        mail, = self.mails().values()
        self.assertEqual((mail['to'], mail['kind']), (to, kind))
        link = mail['values']['link']
        self.assertTrue(link.startswith(URL + '?link='))
        return link.partition('link=')[2]

    def use(self, token, password=None):
        return self.steps(tarsnapd.link_use(self.post, token, password))

    def bad(self, token, password=b'x'):
        with self.assertRaisesRegex(ServerError, 'not good any more'):
            self.use(token, password)

    def password(self, address='ann@example.org'):
        """Which of a few it is."""
        account = self.found(address)[1]
        salt = bytes.fromhex(account['salt'])
        return [x for x in (b'old', b'new', b'newer') if account['stored']
                == tarsnapd.account_verifier(x, salt)['stored']]

    def reset(self):
        self.steps(tarsnapd.link_reset(self.post, 'Ann@example.org'))
        return self.token('ann@example.org', 'reset-password')

    def move(self, new='anna@example.org'):
        self.steps(tarsnapd.link_move(self.post, self.found(), new))
        return self.token(new, 'confirm-address')


    def told(self):
        """[kind, whether it goes out, None: perhaps] of mails that are due,
        which then are no more.
        """
        found = []
        for name, mail, done in self.steps(tarsnapd.mail_list()):
            if not done:
                found.append([mail['kind'],
                              self.steps(tarsnapd.mail_true(mail))])
                self.steps(tarsnapd.mail_clear(name))
        return sorted(found, key=str, reverse=True)


class Changes(Case):
    """Who changes an account is told, if and only if it was changed."""

    def killed(self, steps, left):
        """Carry `steps` out up to the put number `left`; True if there was
        one.
        """
        value = None
        while True:
            try:
                wish = steps.send(value)
            except StopIteration:
                return False
            left -= wish[0] == 'put'
            if left < 0:
                return True
            value = self.server.perform(wish)

    def check(self, make, kind):
        """`make` begins a change of an account as found."""
        puts = 0
        while True:
            before = self.steps(tarsnapd.account_load(self.ann))
            killed = self.killed(make(before), puts)
            after = self.steps(tarsnapd.account_load(self.ann))
            queued = [mail for _, mail, done in self.steps(
                tarsnapd.mail_list()) if not done]
            for mail in queued:
                self.assertEqual(mail['to'], before[1]['address'])
            self.assertEqual(self.told(), [[kind, True]] if after != before
                             else [[kind, None]] * len(queued), puts)
            if not killed:
                self.assertNotEqual(after, before)
                return puts
            self.assertEqual(after, before)
            puts += 1

    def test_password(self):
        self.assertEqual(self.check(
            lambda found: tarsnapd.password_change(
                self.post, found, b'new'), 'password-changed'), 2)

    def test_address(self):
        self.assertEqual(self.check(
            lambda found: tarsnapd.address_change(
                self.post, found, 'b@example.org'), 'address-changed'), 3)

    def test_what_never_was_is_not_told(self):
        steps = tarsnapd.password_change(self.post, self.found(), b'new')
        self.assertTrue(self.killed(steps, 1))
        self.assertEqual(tarsnapd.mail_run(self.server, self.fail), 0)
        self.assertEqual(self.server.accounts.list('mail/done'), [])
        self.assertEqual(len(self.server.accounts.list('mail/due')), 1)
        self.server.ahead = tarsnapd.MAIL_NEEDS + 1
        self.assertEqual(tarsnapd.mail_run(self.server, self.fail), 0)
        self.assertEqual(self.server.accounts.list('mail/'), [])


class Bucket(Changes):
    """The same, and links, where accounts are in a bucket."""

    PLACES = {'accounts': 's3://backup/x'}

    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        stack.enter_context(s3peers.bucket('backup'))

    def tearDown(self):
        """Every test begins with none."""
        for key in self.server.accounts.list(''):
            self.server.accounts.delete(key)

    def test_a_link_works_once(self):
        token, other = self.reset(), self.move()
        self.assertEqual(self.use(token, b'new'), 'ann@example.org')
        self.assertEqual(self.password(), [b'new'])
        self.bad(token)
        self.bad(other)
        self.assertEqual(list(self.mails()), ['password-changed'])


class Links(Case):

    def test_forgotten_password(self):
        token = self.reset()
        for _ in range(2):                      # looking uses nothing up
            what, found = self.steps(tarsnapd.link_read(token))
            self.assertEqual((what['kind'], found[1]['id']),
                             ('reset', self.ann))
        self.assertEqual(self.password(), [b'old'])
        self.assertEqual(self.use(token, b'new'), 'ann@example.org')
        self.assertEqual(self.password(), [b'new'])
        self.assertEqual(list(self.mails()), ['password-changed'])
        self.bad(token)
        self.assertEqual(self.password(), [b'new'])

    def test_an_address_without_account(self):
        self.steps(tarsnapd.link_reset(self.post, 'bob@example.org'))
        self.steps(tarsnapd.link_reset(self.post, 'joe'))   # not an address
        self.assertEqual(self.mails(), {})

    def test_one_mail_in_a_while(self):
        """Whoever asks a hundred times has one mail sent."""
        each = tarsnapd.LINK_EACH
        self.server.ahead = each - int(time.time()) % each
        self.reset()
        for again in range(10):
            self.assertFalse(self.steps(tarsnapd.link_reset(
                self.post, 'ann@example.org')))
            self.assertEqual(self.steps(tarsnapd.link_join(
                self.post, 'bob@example.org')), not again)
        self.token('bob@example.org', 'confirm-address')
        self.server.ahead += each
        self.reset()

    def test_it_ends(self):
        token, other = self.reset(), self.move()
        seconds = tarsnapd.LINK_SECONDS
        self.server.ahead = seconds['reset'] - 5
        self.steps(tarsnapd.link_read(token))
        self.server.ahead = seconds['reset'] + 1
        self.bad(token)
        self.steps(tarsnapd.link_read(other))
        self.server.ahead = seconds['move'] + 1
        self.bad(other)

    def test_what_ends_it_before(self):
        """A new password, another address, the end of the account."""
        def password():
            self.steps(tarsnapd.password_change(self.post, self.found(),
                                                b'newer'))

        def address():
            for new in ('b@example.org', 'ann@example.org'):
                found = self.steps(tarsnapd.account_load(self.ann))
                self.steps(tarsnapd.address_change(self.post, found, new))

        def close():
            self.steps(tarsnapd.account_close('ann@example.org'))

        for change in (password, address, close):
            tokens = [self.reset(), self.move()]
            change()
            for token in tokens:
                self.bad(token)
            for name, mail, done in self.steps(tarsnapd.mail_list()):
                if not done:
                    self.steps(tarsnapd.mail_end(name, mail))

    def test_of_two_at_once_one_wins(self):
        token = self.reset()
        ahead = tarsnapd.link_use(self.post, token, b'new')
        value = None
        while True:
            wish = ahead.send(value)
            if wish[0] == 'put' and wish[1].startswith('account/'):
                break
            value = self.server.perform(wish)
        self.use(token, b'newer')
        with self.assertRaisesRegex(ServerError, 'by somebody else'):
            ahead.send(self.server.perform(wish))
        self.assertEqual(self.password(), [b'newer'])
        self.assertEqual(self.told(), [['password-changed', True],
                                       ['password-changed', False]])

    def test_another_address(self):
        token = self.move()
        self.assertEqual(self.found()[1]['id'], self.ann)
        self.assertEqual(self.use(token), 'anna@example.org')
        self.assertEqual(self.found('anna@example.org')[1]['id'], self.ann)
        mail = self.mails()['address-changed']
        self.assertEqual((mail['to'], mail['values']['new']),
                         ('ann@example.org', 'anna@example.org'))
        self.bad(token)

    def test_an_address_taken_meanwhile(self):
        token = self.move()
        self.steps(tarsnapd.account_create('anna@example.org', b'x'))
        with self.assertRaisesRegex(ServerError, 'exists already'):
            self.use(token)
        self.assertEqual(self.found()[1]['id'], self.ann)

    def test_join(self):
        self.steps(tarsnapd.link_join(self.post, 'bob@example.org'))
        token = self.token('bob@example.org', 'confirm-address')
        self.assertIsNone(self.steps(tarsnapd.account_get(
            'bob@example.org')))
        self.use(token, b'new')
        self.assertEqual(self.password('bob@example.org'), [b'new'])
        self.bad(token)
        self.steps(tarsnapd.account_close('bob@example.org'))
        self.bad(token)                         # also not when it is free
        self.steps(tarsnapd.link_join(self.post, 'ann@example.org'))
        self.assertEqual(self.mails(), {})      # she has one
        with self.assertRaisesRegex(ServerError, 'not a mail address'):
            self.steps(tarsnapd.link_join(self.post, 'b@c\nBcc: d@e'))

    def test_forged(self):
        """No bit of a link can be changed, and no other key makes one."""
        token = self.reset()
        for i in range(len(token)):
            other = 'A' if token[i] != 'A' else 'B'
            with self.subTest(i):
                self.bad(token[:i] + other + token[i + 1:])
        what, signature = token.split('.')
        for text in ('', '.', 'x', what, what + '.', token + '.', '\xe9.x',
                     '.' + signature, 'a' * 5000, token + '\n'):
            self.bad(text)
        data = json.loads(base64.urlsafe_b64decode(what + '=='))
        self.assertEqual(set(data), {'kind', 'account', 'state', 'until'})
        other = tarsnapd.Server(rawclient.server_directory(self))
        self.addCleanup(other.close)
        with self.assertRaisesRegex(ServerError, 'not good'):
            other.run(tarsnapd.link_read(token))


class Commands(Case):

    def test_links(self):
        server = self.path
        self.assertEqual(run('user', server, 'reset', 'ann@example.org'),
                         (0, '', ''))
        token = self.token('ann@example.org', 'reset-password')
        self.assertEqual(run('user', server, 'link', URL + '?link=' + token,
                             stdin=b'new\n'), (0, 'ann@example.org\n', ''))
        self.assertEqual(self.password(), [b'new'])
        status, _, err = run('user', server, 'link', token, stdin=b'x\n')
        self.assertEqual((status, err), (1, 'tarsnapd: %s\n'
                                         % tarsnapd.LINK_BAD))
        self.mails()
        self.assertEqual(run('user', server, 'confirm', 'ann@example.org',
                             'c@example.org'), (0, '', ''))
        token = self.token('c@example.org', 'confirm-address')
        self.assertEqual(run('user', server, 'link', token)[:2],
                         (0, 'c@example.org\n'))
        self.mails()
        self.assertEqual(run('user', server, 'invite', 'd@example.org'),
                         (0, '', ''))
        token = self.token('d@example.org', 'confirm-address')
        self.assertEqual(run('user', server, 'link', token,
                             stdin=b'pw\n')[0], 0)
        self.assertEqual(run('user', server, 'list')[1],
                         'c@example.org\nd@example.org\njoe\n')
        for words, says in (
                (('reset', 'joe'), 'joe is not a mail address'),
                (('reset', 'nobody'), 'does not exist'),
                (('invite', 'd@example.org'), 'exists already'),
                (('invite', 'x y'), 'not a mail address'),
                (('confirm', 'joe', 'a@b@c'), 'not a mail address')):
            status, _, err = run('user', server, *words)
            self.assertEqual((status, err.count('\n')), (1, 1))
            self.assertIn(says, err)

    def test_changes_by_the_operator_are_mailed(self):
        for words, kind in ((('passwd', 'ann@example.org'),
                             'password-changed'),
                            (('address', 'ann@example.org', 'c@example.org'),
                             'address-changed')):
            self.assertEqual(run('user', self.path, *words, stdin=b'n\n'),
                             (0, '', ''))
            mail = self.mails()[kind]
            self.assertEqual(mail['to'], 'ann@example.org')

    def test_without_mail(self):
        path = rawclient.server_directory(self)
        status, _, err = run('user', path, 'invite', 'b@example.org')
        self.assertEqual(status, 1)
        self.assertIn('links need mail-from and web-url', err)
        self.assertEqual(run('user', path, 'passwd', 'joe', stdin=b'n\n'),
                         (0, '', ''))

    def test_announcement(self):
        """To all who asked for news, once, with a link that ends it."""
        for name in ('b@example.org', 'c@example.org'):
            self.steps(tarsnapd.account_create(name, b'x'))
        for name in ('ann@example.org', 'b@example.org', 'joe'):
            self.assertEqual(run('user', self.path, 'news', name, 'on'),
                             (0, '', ''))
        file = os.path.join(self.path, 'tmp', 'news')
        with open(file, 'w') as out:
            out.write('Subject: Less to pay\n\nGood news:\n\n  $5 \u2192 '
                      '$4.\n')
        for count in (2, 0):
            self.assertEqual(run('mail', self.path, '--announce', file),
                             (0, '%d mails queued\n' % count, ''))
        links = {}
        for name, mail, done in self.steps(tarsnapd.mail_list()):
            message = email.message_from_bytes(tarsnapd.mail_bytes(
                tarsnapd.mail_render(self.post, self.path, name, mail)),
                policy=email.policy.default)
            self.assertEqual(message['Subject'], 'Less to pay')
            self.assertTrue(message.get_content().replace('\r', '')
                            .startswith('Good news:\n\n  $5 \u2192 $4.\n'))
            self.assertEqual(message['List-Unsubscribe'],
                             '<%s>' % mail['values']['leave'])
            links[mail['to']] = mail['values']['leave']
            self.assertIn(links[mail['to']], message.get_content())
        self.assertEqual(set(links), {'ann@example.org', 'b@example.org'})
        self.assertIn('news on\n', run('user', self.path, 'show',
                                       'ann@example.org')[1])
        self.server.ahead = 300 * tarsnapd.DAY
        self.use(links['ann@example.org'].partition('link=')[2])
        self.assertNotIn('news', self.found()[1])
        self.assertEqual(self.password(), [b'old'])
        self.server.ahead = 366 * tarsnapd.DAY
        self.bad(links['b@example.org'].partition('link=')[2])
        self.assertEqual(run('user', self.path, 'news', 'joe', 'so')[0], 1)

    def test_export(self):
        client = Client(Embedded(self.path))
        number, other = (Host(client).machine for _ in range(2))
        client.close()
        joe = self.found('joe')[1]['id']
        for machine, owner in ((number, joe), (number, self.ann),
                               (other, self.ann), (other, joe)):
            self.steps(tarsnapd.owner_set(machine, owner))
        self.reset()
        self.server.ahead = 1000
        self.steps(tarsnapd.link_reset(self.post, 'ann@example.org'))
        self.steps(tarsnapd.address_change(self.post, self.found(),
                                           'c@example.org'))
        status, out, err = run('user', self.path, 'export', 'c@example.org')
        self.assertEqual((status, err), (0, ''))
        found = json.loads(out)
        self.assertEqual([x['address'] for x in found['account']],
                         ['ann@example.org', 'c@example.org'])
        self.assertEqual({x['number']: x['ours'] for x in
                          found['machines']}, {
            '%016x' % number: True, '%016x' % other: False})
        mine, = [x for x in found['machines'] if x['ours']]
        self.assertEqual(mine['versions'][0]['name'], self.steps(
            tarsnapd.machine_load(number)).name)
        self.assertEqual(sorted(x['kind'] for x in found['mails']), [
            'address-changed', 'reset-password', 'reset-password'])
        for secret in (joe, 'link=', '"salt"', '"stored"'):
            self.assertNotIn(secret, out)

    def test_scrub_names_damage(self):
        self.steps(tarsnapd.link_reset(self.post, 'ann@example.org'))
        self.assertEqual(run('scrub', self.path)[0], 0)
        keys = self.server.accounts.list('mail/') + ['link/key']
        self.assertEqual(len(keys), 2)
        for key in keys:
            file = os.path.join(self.server.accounts.root, key)
            with open(file, 'r+b') as out:
                out.seek(30)
                out.write(b'#')
        status, _, err = run('scrub', self.path)
        self.assertEqual(status, 2)
        for key in keys:
            self.assertIn('damaged: %s: ' % key, err)


if __name__ == '__main__':
    unittest.main()
