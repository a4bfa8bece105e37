#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Mail goes out once, whoever fails on the way; and says what it should."""

import contextlib
import email
import email.policy
import os
import signal
import subprocess
import sys
import time
import unittest

import mailpeer
import rawclient
import s3peers
import tarsnapd
from rawclient import here
from tarsnapd import ServerError

VALUES = {'amount': '$5.00', 'balance': '$7.25', 'date': '2026-11-26',
          'reference': 'cs_1'}
DAY = tarsnapd.DAY


class Clock(tarsnapd.Server):
    """A server whose clock a test sets."""

    ahead = 0

    def perform_here(self, wish):
        if wish[0] == 'now':
            return int(time.time()) + self.ahead
        return super().perform_here(wish)


class Case(unittest.TestCase):

    shared = None               # a mail server without TLS, for many tests
    PLACES = {}                 # where store and accounts are

    def setUp(self):
        self.path = rawclient.server_directory(self, self.PLACES)
        self.conf = os.path.join(self.path, 'tarsnapd.conf')
        with open(self.conf) as file:
            self.usual = file.read()
        self.said = []

    def configure(self, **options):
        """Options into tarsnapd.conf, and the server opened with them."""
        options.setdefault('mail-from', 'Backups <backup@example.org>')
        with open(self.conf, 'w') as file:
            file.write(self.usual + ''.join(
                '%s = %s\n' % option for option in options.items()))
        self.open()

    def open(self):
        self.server = Clock(self.path)
        self.addCleanup(self.server.close)

    def peer(self, tls='no', **options):
        """A mail server, and the configuration for it."""
        if tls == 'no':
            if Case.shared is None:
                Case.shared = mailpeer.Peer(unittest.addModuleCleanup)
            Case.shared.forget()
        peer = Case.shared if tls == 'no' else mailpeer.Peer(
            self.addCleanup, tls)
        if tls != 'no':
            secret = os.path.join(self.path, 'mail.password')
            with open(secret, 'w') as file:
                file.write(mailpeer.PASSWORD + '\n')
            os.chmod(secret, 0o600)
            options = {'mail-ca-bundle': peer.ca, 'mail-user': mailpeer.USER,
                       'mail-password-file': 'mail.password', **options}
        self.configure(**{'mail-smtp': 'localhost:%d' % peer.port,
                          'mail-tls': tls, **options})
        return peer

    def queue(self, key='1', to='zoe@example.net', kind='receipt', **values):
        return self.server.run(tarsnapd.mail_put(
            kind, to, key, dict(VALUES, **values), 'f' * 16))

    def send(self, ahead=0):
        """Send what is due so many seconds from now; how many went."""
        self.server.ahead = ahead
        return tarsnapd.mail_run(self.server, self.said.append)

    def left(self):
        return self.server.accounts.list('mail/due/')


class Sending(Case):
    """To a real mail server."""

    def test_a_mail(self):
        peer = self.peer(**{'mail-bounces': 'bounces@example.org',
                            'web-url': 'https://backup.example.org/a'})
        self.assertTrue(self.queue())
        self.assertEqual(self.send(), 1)
        mail, = peer.mails()
        self.assertEqual((mail['from'], mail['to']), (
            'bounces@example.org', ['zoe@example.net']))
        text = email.message_from_string(mail['text'],
                                         policy=email.policy.default)
        self.assertEqual(text['From'], 'Backups <backup@example.org>')
        self.assertEqual(text['To'], 'zoe@example.net')
        self.assertEqual(text['Subject'], 'Backups: we received $5.00')
        self.assertEqual(text['Auto-Submitted'], 'auto-generated')
        self.assertRegex(text['Message-ID'],
                         r'\A<[0-9a-f]{32}@example\.org>\Z')
        self.assertLess(abs(text['Date'].datetime.timestamp()
                            - time.time()), 600)
        self.assertEqual(text.get_content_type(), 'text/plain')
        self.assertEqual(text.get_content().replace('\r', ''), '''\
On 2026-11-26 we received $5.00 for the account zoe@example.net,
reference cs_1.

The balance is now $7.25.

https://backup.example.org/a
''')
        self.assertEqual(mail['text'].count('\n'),
                         mail['text'].count('\r\n'))

    def test_what_the_pages_noted(self):
        """Who asked for a link gets it, and only who may have it."""
        peer = self.peer(**{'web-url': 'https://backup.example.org/'})
        for kind, address in (('join', 'new@example.net'),
                              ('reset', 'nobody@example.net'),
                              ('join', '-f@example'), ('join', 'a\nb@c.org')):
            for _ in range(2):
                self.server.run(tarsnapd.ask_put(kind, address))
        self.assertEqual(self.send(), 1)
        mail, = peer.mails()
        self.assertEqual(mail['to'], ['new@example.net'])
        self.assertIn('https://backup.example.org/?link=', mail['text'])
        self.assertEqual(self.server.accounts.list('ask/'), [])
        self.assertEqual(self.said, [])

    def test_a_step_is_mailed_once(self):
        peer = self.peer()
        self.assertTrue(self.queue())
        self.assertFalse(self.queue())
        self.send()
        self.assertFalse(self.queue())
        self.assertTrue(self.queue('2'))
        self.assertEqual([self.send(), self.send(30 * DAY)], [1, 0])
        self.assertEqual(len(peer.mails()), 2)
        self.assertEqual(self.server.accounts.list('mail/try/'), [])
        self.assertEqual(len(self.server.accounts.list('mail/done/')), 2)

    def test_later(self):
        """Each refusal for the moment: again after a while, never at once."""
        for plan in ('rcpt 450', 'data 451', 'mail 421', 'drop', 'took',
                     'rcpt 421', 'data 421'):
            with self.subTest(plan):
                peer = self.peer()
                peer.plan(plan)
                self.queue(plan)
                self.assertEqual(self.send(), 0)
                taken = plan == 'took'
                self.assertEqual(len(peer.mails()), taken)
                wait = tarsnapd.MAIL_FIRST
                self.assertEqual(self.send(wait - 60), 0)
                self.assertEqual(self.send(wait + 60), 1)
                mails = peer.mails()
                self.assertEqual(len(mails), 1 + taken)
                if taken:       # a reader's program drops the second
                    self.assertEqual(mails[0], mails[1])

    def test_never(self):
        """What is refused for good is marked, and stops no other."""
        peer = self.peer()
        for plan in ('rcpt 550', 'data 554'):
            peer.plan(plan, 'ok')
            self.queue(plan + ' 1')
            self.queue(plan + ' 2')
            self.assertEqual(self.send(), 1)
        self.assertEqual(len(peer.mails()), 2)
        self.assertEqual(self.left(), [])
        self.assertEqual(self.send(DAY), 0)
        self.assertEqual([line[:36] for line in self.said], [
            'mail receipt to zoe@example.net: %s' % code
            for code in ('550', '554')])
        status, out, _ = here('mail', self.path, '--list')
        self.assertEqual((status, out.count(' sent '), out.count(' failed ')),
                         (0, 2, 2))
        self.assertIn('554 not this', out)

    def test_waits_grow_and_end(self):
        self.peer().plan(*['data 451'] * 100)
        self.queue()
        ahead, times = 0, []
        while self.left():
            before = len(self.server.accounts.list('mail/try/'))
            self.send(ahead)
            if len(self.server.accounts.list('mail/try/')) != before:
                times.append(ahead)
            ahead += 900
        waits = [b - a for a, b in zip(times, times[1:])]
        self.assertEqual(waits[:5], [900, 1800, 3600, 7200, 14400])
        self.assertEqual(set(waits[5:]), {14400})
        self.assertEqual(self.said, ['mail receipt to zoe@example.net: given '
                                     'up: 451 not this'])
        self.assertLess(ahead, 6 * DAY)

    def test_a_server_that_is_down(self):
        """It costs no attempt, and mail goes out when it is back."""
        peer = mailpeer.Peer(self.addCleanup)
        self.configure(**{'mail-smtp': 'localhost:%d' % peer.port,
                          'mail-tls': 'no'})
        self.queue('1')
        self.queue('2')
        peer.close()
        self.assertEqual(self.send(), 0)
        self.assertRegex(self.said[0], r'\Amail: localhost:\d+: .*refused')
        self.assertEqual(len(self.said), 1)
        self.assertEqual(self.server.accounts.list('mail/try/'), [])
        again = mailpeer.Peer(self.addCleanup, port=peer.port)
        self.assertEqual(self.send(20 * DAY), 2)
        self.assertEqual(len(again.mails()), 2)

    def test_too_late(self):
        peer = self.peer()
        now = self.server.perform(('now',))
        self.server.run(tarsnapd.mail_put(
            'receipt', 'zoe@example.net', '1', VALUES, until=now + 60))
        self.assertEqual(self.send(61), 0)
        self.assertEqual((self.left(), peer.mails()), ([], []))

    def test_a_clock_set_back(self):
        peer = self.peer()
        peer.plan('data 451')
        self.queue()
        self.send(30 * DAY)
        self.assertEqual(self.send(0), 1)

    def test_tls(self):
        for tls in ('starttls', 'tls'):
            with self.subTest(tls):
                peer = self.peer(tls)
                self.queue(tls)
                self.assertEqual((self.send(), self.said), (1, []))
                self.assertEqual(len(peer.mails()), 1)

    def test_no_trust_no_mail(self):
        """A wrong certificate, a wrong password, a server without TLS."""
        peer = self.peer('starttls')
        self.queue()
        good = self.server.post.ca_bundle
        self.server.post.ca_bundle = None
        self.send()
        self.server.post.ca_bundle = good
        with open(self.server.post.file, 'w') as file:
            file.write('wrong\n')
        self.send()
        plain = self.peer()
        self.server.post.tls = 'starttls'
        self.send()
        for line, word in zip(self.said, (
                'certificate verify failed', '535 ', 'STARTTLS')):
            self.assertIn(word, line)
        self.assertEqual(len(self.said), 3)
        self.assertEqual((peer.mails(), plain.mails()), ([], []))
        self.assertEqual(len(self.left()), 1)


class Senders(Case):
    """Killed at each step, and several at once."""

    def test_killed_at_each_step(self):
        """None is lost; what goes out twice is the same to the byte."""
        peer, done, step = self.peer(), False, 0
        while not done:
            step += 1
            self.queue('step %d' % step)
            calls = []

            def perform(wish, original=self.server.perform):
                calls.append(wish)
                if len(calls) == step:
                    raise KeyboardInterrupt
                return original(wish)

            self.server.perform = perform
            try:
                self.send()
                done = True
            except KeyboardInterrupt:
                pass
            del self.server.perform
            self.server.ahead = 0
            before = len(peer.mails())
            self.send(2 * tarsnapd.MAIL_FIRST)
            self.assertEqual(self.left(), [], step)
            self.assertEqual(self.server.accounts.list('mail/try/'), [])
            self.assertFalse(self.queue('step %d' % step))
            mails = peer.mails()
            self.assertLessEqual(len(mails) - before, 1)
            self.assertIn(len(mails), (1, 2), step)
            self.assertEqual(mails[0], mails[-1])
            peer.forget()
        self.assertGreater(step, 10)

    def test_two_at_once(self):
        """Of two hosts one sends; and the lock keeps one host's apart."""
        peer = self.peer()
        self.queue()
        name = tarsnapd.mail_name('receipt', '1')
        mail = self.server.run(tarsnapd.summed_get('mail/due/' + name))
        claims = [self.server.run(tarsnapd.mail_claim(name, mail, 0))
                  for _ in range(2)]
        self.assertEqual(claims, [True, False])
        self.assertEqual(self.send(), 0)
        # The one who had it sent it and was killed; we had looked before.
        self.server.run(tarsnapd.mail_end(name, mail))
        self.assertFalse(self.server.run(tarsnapd.mail_claim(name, mail, 0)))
        self.assertEqual(self.server.accounts.list('mail/try/'), [])
        self.assertEqual(peer.mails(), [])
        self.queue('2')
        lock = os.open(os.path.join(self.path, 'mail.lock'), os.O_RDWR)
        self.assertTrue(tarsnapd.lock_take(lock))
        self.assertEqual(rawclient.run('mail', self.path), (0, '', ''))
        os.close(lock)
        self.assertEqual((peer.mails(), len(self.left())), ([], 1))

    def test_queued_again_while_it_goes_out(self):
        peer = self.peer()
        steps = tarsnapd.mail_put('receipt', 'zoe@example.net', '1', VALUES)
        looked = steps.send(None)
        self.assertEqual(looked[0], 'size')
        self.server.run(tarsnapd.mail_put(
            'receipt', 'zoe@example.net', '1', VALUES))
        self.send()
        value = None                        # it had seen no mark
        with self.assertRaises(StopIteration):
            while True:
                value = self.server.perform(steps.send(value))
        self.send(DAY)
        self.assertEqual((len(peer.mails()), self.left()), (1, []))

    def test_serve_sends(self):
        peer = self.peer()
        self.queue()
        serve = rawclient.Serve(self.path)
        try:
            end = time.monotonic() + 60
            while not peer.mails() and time.monotonic() < end:
                time.sleep(0.05)
        finally:
            serve.stop()
        self.assertEqual(len(peer.mails()), 1)

    def test_kill_9_of_the_command(self):
        """While the server holds its answer back, which is the worst time."""
        peer = self.peer()
        peer.plan('hang')
        self.queue()
        child = subprocess.Popen([sys.executable, rawclient.program(), 'mail',
                                  self.path])
        end = time.monotonic() + 60
        while not peer.mails() and time.monotonic() < end:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        self.assertEqual(self.send(), 0)
        self.assertEqual(self.send(1000), 1)
        first, second = peer.mails()
        self.assertEqual(first, second)


class Bucket(Senders):
    """The same where accounts are in a bucket."""

    PLACES = {'accounts': 's3://backup/x'}
    test_serve_sends = test_kill_9_of_the_command = None

    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(s3peers.bucket('backup'))
        super().setUp()


class Program(Case):
    """To a program instead of a server."""

    def setUp(self):
        super().setUp()
        self.out = os.path.join(self.path, 'tmp', 'out')
        self.program = os.path.join(self.path, 'tmp', 'sendmail')

    def make(self, status=0):
        with open(self.program, 'w') as file:
            file.write('#!/bin/sh\necho "$*" >%s\ncat >>%s\necho sorry >&2\n'
                       'exit %d\n' % (self.out, self.out, status))
        os.chmod(self.program, 0o755)

    def test_sendmail(self):
        self.configure(**{'mail-sendmail': self.program + ' -v'})
        self.queue()
        self.assertEqual(self.send(), 0)
        self.assertEqual(self.said, [
            'mail: %s: No such file or directory' % self.program])
        self.make(75)
        self.assertEqual(self.send(1000), 0)
        self.make()
        self.assertEqual(self.send(4000), 1)
        with open(self.out) as file:
            words, *lines = file.read().split('\n')
        self.assertEqual(words, '-v -i -f backup@example.org '
                         'zoe@example.net')
        self.assertIn('Subject: Backups: we received $5.00', lines)
        self.queue('2')
        self.make(67)
        self.assertEqual(self.send(), 0)
        self.assertEqual(self.left(), [])
        self.assertRegex(self.said[-1], 'zoe.*status 67: sorry')


class Texts(Case):

    def render(self, key='1'):
        name = tarsnapd.mail_name('receipt', key)
        mail = self.server.run(tarsnapd.summed_get('mail/due/' + name))
        return tarsnapd.mail_render(self.server.post, self.path, name, mail)

    def write(self, text, kind='receipt'):
        os.makedirs(os.path.join(self.path, 'mail'), exist_ok=True)
        with open(os.path.join(self.path, 'mail', kind), 'wb') as file:
            file.write(text)

    def test_no_value_makes_a_header(self):
        self.configure()
        evil = 'x\r\nBcc: eve@example.org\n\nhello\x00\u2028.\r\n.\r\n'
        self.queue(amount=evil, reference=evil)
        data = self.render().as_bytes()
        message = email.message_from_bytes(data, policy=email.policy.default)
        self.assertEqual(sorted(message.keys()), sorted([
            'From', 'To', 'Subject', 'Date', 'Message-ID', 'Auto-Submitted',
            'Content-Type', 'Content-Transfer-Encoding', 'MIME-Version']))
        self.assertNotIn(b'\nBcc', data)
        self.assertNotIn(b'\n.', data)

    def test_addresses(self):
        self.configure()
        for good in ('a@b', 'a.b+c@example.org', "o'x@1.example",
                     'x' * 64 + '@example.org'):
            self.assertTrue(tarsnapd.mail_address(good), good)
        for bad in ('', 'zoe', '@b', 'a@', 'a@b@c', 'a b@c', 'a@b\n', '-a@b',
                    'a@-b', 'a@b..c', '.a@b', 'a.@b', 'a..b@c', 'a@b\r\nx',
                    'a,b@c', '<a@b>', 'a@b>', 'zo\xe9@b', 'a@\xe9', 'a\x00@b',
                    'x' * 65 + '@b', 'a@' + 'b' * 64, 'a@' + 'b.' * 150 + 'b'):
            self.assertFalse(tarsnapd.mail_address(bad), bad)
            with self.assertRaisesRegex(ServerError, 'not a mail address'):
                self.queue(to=bad)
        self.assertEqual(self.left(), [])

    def test_every_text(self):
        self.configure()
        for kind, text in tarsnapd.MAIL_TEXTS.items():
            with self.subTest(kind):
                subject, body = tarsnapd.mail_text(self.path, kind)
                self.assertTrue(subject and body)
                self.assertLess(max(map(len, text.split('\n'))), 79)
                self.server.run(tarsnapd.mail_put(
                    kind, 'zoe@example.net', kind, {
                        word: word for word in tarsnapd.mail_words(text)}))
                name = tarsnapd.mail_name(kind, kind)
                self.assertNotIn('$', tarsnapd.mail_render(
                    self.server.post, self.path, name, self.server.run(
                        tarsnapd.summed_get('mail/due/' + name)))
                    .get_content())

    def test_an_operators_text(self):
        self.configure()
        self.queue()
        self.write('Subject: Danke für $amount\r\n\r\nHallo $address: \u20ac '
                   '$amount, $$5\n.\n'.encode())
        message = email.message_from_bytes(self.render().as_bytes(),
                                           policy=email.policy.default)
        self.assertEqual(message['Subject'], 'Danke für $5.00')
        self.assertEqual(
            message.get_content().replace('\r', ''),
            'Hallo zoe@example.net: \u20ac $5.00, $5\n.\n')
        self.assertIn('Subject: Danke für', here(
            'mail', self.path, '--text', 'receipt')[1])

    def test_a_text_of_no_use(self):
        """It is said, the mail stays, others go."""
        peer = self.peer()
        self.queue()
        now = {'date': '2026-11-26', 'balance': '$1.00'}
        for text, word in ((b'Subject: $nothing\n\nx\n', 'nothing'),
                           (b'Subject: x\n\n100 $ \n', ''),
                           (b'hello\n', 'first line'), (b'\xff', 'UTF-8'),
                           (b'Subject: x\nBcc: y@z\n\nx\n', 'first line')):
            self.said.clear()
            self.write(text)
            self.server.run(tarsnapd.mail_put('reinstated', 'a@b',
                                              repr(text), now))
            self.assertEqual(self.send(), 1)
            self.assertEqual(len(self.said), 1, text)
            self.assertIn(word, self.said[0])
            self.assertEqual(len(self.left()), 1)
        os.unlink(os.path.join(self.path, 'mail', 'receipt'))
        self.assertEqual(self.send(), 1)
        self.assertEqual(len(peer.mails()), 6)


class Command(Case):

    def test_dry_run_and_list(self):
        peer = self.peer()
        self.queue()
        status, out, err = here('mail', self.path, '--dry-run')
        self.assertEqual((status, err), (0, ''))
        self.assertIn('Subject: Backups: we received $5.00', out)
        self.assertRegex(here('mail', self.path, '--list')[1],
                         r'Z receipt zoe@example\.net due\n\Z')
        self.assertEqual(peer.mails(), [])
        peer.plan('data 451')
        self.assertEqual(here('mail', self.path), (0, '', ''))
        self.assertRegex(here('mail', self.path, '--list')[1],
                         r' again \S+ \S+Z: 451 not this\n')
        self.assertEqual(here('mail', self.path, '--dry-run')[1], '')

    def test_configuration(self):
        self.open()
        self.assertIsNone(self.server.post)
        status, _, err = here('mail', self.path)
        self.assertEqual(status, 1)
        self.assertIn('no mail-from', err)
        for wrong, word in (
                ({'mail-from': 'nobody'}, 'not a mail address'),
                ({'mail-from': 'a@b', 'mail-bounces': 'x y'}, 'not a mail'),
                ({'mail-from': 'a@b', 'mail-smtp': 'x:y'}, 'HOST:PORT'),
                ({'mail-from': 'a@b', 'mail-tls': 'on'}, 'mail-tls is'),
                ({'mail-from': 'a@b', 'mail-user': 'x', 'mail-tls': 'no'},
                 'in the clear')):
            with self.assertRaisesRegex(ServerError, word):
                tarsnapd.Post(wrong, self.path)
        for text, found in (('h', ('h', 587)), ('h:25', ('h', 25)),
                            ('[::1]', ('::1', 587)),
                            ('[::1]:26', ('::1', 26))):
            self.assertEqual(tarsnapd.Post(
                {'mail-from': 'a@b', 'mail-smtp': text}, self.path).smtp,
                found)

    def test_a_password_others_can_read(self):
        self.peer('starttls')
        os.chmod(self.server.post.file, 0o644)
        self.queue()
        self.send()
        self.assertIn('others can read it', self.said[0])


if __name__ == '__main__':
    unittest.main()
