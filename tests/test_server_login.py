# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Passwords cannot be guessed at leisure, owners cannot be locked out, and
nobody learns which users there are.
"""

import hashlib
import hmac
import os
import shutil
import unittest
from unittest import mock

from rawclient import (
    ZERO, Client, Embedded, Error, Keys, Serve, server_directory, tarsnapd)

NOW = 1700000000
# As long as that of the decoy, in JSON.
KNOWN, UNKNOWN = 'some@example.org', 'none@example.org'


class Guesses(unittest.TestCase):
    """The file of debts, with a clock of the test's own."""

    def setUp(self):
        self.path = server_directory(self)
        self.guesses = self.opened()

    def opened(self):
        guesses = tarsnapd.Guesses(os.path.join(self.path, 'guesses'), b's')
        self.addCleanup(guesses.close)
        return guesses

    def tries(self, address, user='joe', now=NOW, most=2000):
        """How many attempts are let through at once."""
        for count in range(most):
            if self.guesses.charge(address, user, now):
                return count
        return most

    def test_an_address_has_ten_and_then_one_a_minute(self):
        self.assertEqual(self.tries('192.0.2.1'), 10)
        self.assertEqual(self.guesses.charge('192.0.2.1', 'joe', NOW), 60)
        self.assertEqual(self.tries('192.0.2.1', 'another', NOW + 59), 0)
        self.assertEqual(self.tries('192.0.2.1', now=NOW + 60), 1)
        self.assertEqual(self.tries('192.0.2.1', now=NOW + 3600), 10)

    def test_what_is_refused_costs_nothing(self):
        self.tries('192.0.2.1')
        for _ in range(1000):
            self.assertEqual(self.tries('192.0.2.1'), 0)
        self.assertEqual(self.tries('192.0.2.1', now=NOW + 60), 1)

    def test_one_customer_of_ipv6_is_one_address(self):
        self.assertEqual(self.tries('2001:db8:1::1'), 10)
        self.assertEqual(self.tries('2001:db8:1:ffff::2'), 0)
        self.assertEqual(self.tries('2001:db8:2::1'), 10)
        self.assertEqual(self.tries('192.0.2.1'), 10)
        self.assertEqual(self.tries('::ffff:192.0.2.1'), 0)

    def attack(self, user='joe', addresses=300):
        """Guess from many addresses; how many got through."""
        return sum(self.tries('10.0.%d.%d' % divmod(number, 256), user)
                   for number in range(addresses))

    def test_an_account_that_many_guess_at(self):
        """100 guesses, and then 3 in 8 hours and more for each address."""
        through = self.attack()
        # Who is in the midst of ten when the hundred are over gets no more.
        self.assertEqual(through, 100 + 3 * 290)
        self.assertEqual(self.tries('10.0.1.1'), 0)
        self.assertEqual(self.tries('10.0.0.1', 'another'), 0)
        self.assertEqual(self.tries('10.9.9.9', 'another'), 10)
        self.assertEqual(self.tries('10.0.1.1', now=NOW + 3600), 10)

    def test_the_owner_is_not_locked_out(self):
        """Neither at an address that is new, nor at one that is known."""
        self.guesses.forgive('198.51.100.7', 'joe', NOW - 86400)
        self.attack()
        self.assertEqual(self.tries('198.51.100.8'), 3)
        self.assertEqual(self.tries('198.51.100.7'), 10)

    def test_a_right_password_costs_nothing(self):
        for _ in range(100):
            self.assertEqual(self.guesses.charge('192.0.2.1', 'joe', NOW), 0)
            self.assertEqual(self.guesses.forgive('192.0.2.1', 'joe', NOW),
                             0)

    def test_wrong_ones_before_it_are_not_forgotten(self):
        for _ in range(9):
            self.guesses.charge('192.0.2.1', 'joe', NOW)
        self.guesses.charge('192.0.2.1', 'mallory', NOW)
        self.guesses.forgive('192.0.2.1', 'mallory', NOW)
        self.assertEqual(self.tries('192.0.2.1'), 1)

    def test_challenges_of_an_address(self):
        done = 0
        while not self.guesses.ask('192.0.2.1', NOW):
            done += 1
        self.assertEqual(done, 200)
        self.assertEqual(self.guesses.ask('192.0.2.1', NOW + 10), 0)
        self.assertEqual(self.guesses.ask('192.0.2.2', NOW), 0)
        self.assertEqual(self.guesses.ask(None, NOW), 0)
        self.assertEqual(self.tries('192.0.2.1'), 10)

    def test_machines_of_an_account(self):
        done = 0
        while not self.guesses.forgive('192.0.2.1', 'joe', NOW):
            done += 1
        self.assertEqual(done, 1000)
        self.assertEqual(self.guesses.forgive('192.0.2.1', 'joe', NOW + 60),
                         0)

    def test_other_workers_and_a_restart(self):
        self.assertEqual(self.tries('192.0.2.1'), 10)
        other = self.opened()
        self.assertEqual(other.charge('192.0.2.1', 'joe', NOW), 60)
        self.guesses.close()
        self.assertEqual(self.opened().charge('192.0.2.1', 'joe', NOW), 60)

    def test_behind_a_front_only_accounts_are_counted(self):
        self.assertEqual(self.tries(None), 100)
        self.assertEqual(self.tries(None, 'another'), 100)

    def test_a_clock_set_back(self):
        self.tries('192.0.2.1', now=NOW + 10 ** 8)
        self.assertLessEqual(
            self.guesses.charge('192.0.2.1', 'joe', NOW), 8 * 3600)

    def test_a_damaged_file_is_begun_anew(self):
        self.tries('192.0.2.1')
        self.guesses.close()
        with open(self.guesses.path, 'wb') as file:
            file.write(b'rubbish' * 1000)
        with self.assertRaises(tarsnapd.StoreError):
            self.guesses.charge('192.0.2.1', 'joe', NOW)
        self.assertEqual(self.guesses.charge('192.0.2.1', 'joe', NOW), 0)

    def test_it_does_not_grow_without_end(self):
        with mock.patch.object(tarsnapd, 'MOST_DEBTS', 200):
            self.attack()
            count, = self.guesses.db.execute(
                'SELECT count(*) FROM debts').fetchone()
        self.assertLessEqual(count, 201)
        with open(self.guesses.path, 'rb') as file:
            data = file.read()
        self.assertNotIn(b'10.0.', data)
        self.assertNotIn(b'joe', data)


class Work:
    """What a login has done: its wishes, and calls of what costs time."""

    def __init__(self, path, user, password, spoil=False):
        # Verbs and how much they read, in order; a claim that is there and
        # one that is not are looked for in either order.
        self.wishes, self.read, self.calls = [], [], []
        client = Client(Embedded(path))
        local = client.link.local
        perform = local.server.perform

        def noted(wish):
            self.wishes.append(wish[:2] if wish[0] == 'guess' else wish[0])
            found = perform(wish)
            if wish[0] in tarsnapd.STORE_VERBS:
                self.read.append((wish[0], len(found) if wish[0] in (
                    'get', 'list') else found))
            return found

        self.code, self.frames = None, []
        with mock.patch.object(local.server, 'perform', noted), \
                self.counted(hmac, 'digest'), \
                self.counted(hashlib, 'scrypt'), \
                self.counted(tarsnapd, 'login_check'), \
                self.counted(tarsnapd, 'versioned_decode'), \
                self.counted(tarsnapd, 'versioned_encode'), \
                mock.patch.object(client.link, 'frames', Kept(
                    client.link.frames, self.frames)):
            try:
                client.register(Keys(), user, password, spoil=spoil)
            except Error as e:
                self.code = e.code
        client.close()
        self.read[:2] = sorted(self.read[:2])

    def counted(self, module, name):
        real = getattr(module, name)

        def call(*args, **options):
            self.calls.append((name, sum(
                len(x) for x in args if isinstance(x, (str, bytes)))))
            return real(*args, **options)
        return mock.patch.object(module, name, call)


class Kept:
    """A queue of frames that remembers what went through."""

    def __init__(self, queue, kept):
        self.queue, self.kept = queue, kept

    def __bool__(self):
        return bool(self.queue)

    def extend(self, frames):
        frames = list(frames)
        self.kept += frames
        self.queue.extend(frames)

    def popleft(self):
        return self.queue.popleft()


class Equal(unittest.TestCase):
    """An unknown user and a wrong password are one to who asks."""

    def setUp(self):
        self.path = server_directory(self)

    def login(self, user, password):
        return Work(self.path, user, password)

    def run_steps(self, steps):
        server = tarsnapd.Server(self.path)
        try:
            return server.run(steps)
        finally:
            server.close()

    def test_the_same_work_and_the_same_frames(self):
        self.run_steps(tarsnapd.account_create(KNOWN, b'pw'))
        wrong = self.login(KNOWN, b'wrong')
        unknown = self.login(UNKNOWN, b'wrong')
        self.assertEqual((wrong.code, unknown.code), ('LOGIN', 'LOGIN'))
        self.assertEqual(wrong.wishes, unknown.wishes)
        self.assertIn(('guess', 'charge'), wrong.wishes)
        self.assertEqual(wrong.read, unknown.read)
        self.assertEqual([verb for verb, _ in wrong.read],
                         ['list', 'list', 'get', 'list', 'get'])
        self.assertNotIn(('get', 0), wrong.read)
        self.assertEqual(wrong.calls, unknown.calls)
        self.assertIn('login_check', [name for name, _ in wrong.calls])
        # The salt differs, and nothing else.
        self.assertEqual([(kind, len(body)) for kind, _, body
                          in wrong.frames],
                         [(kind, len(body)) for kind, _, body
                          in unknown.frames])
        self.assertEqual(wrong.frames[0][2][32:], unknown.frames[0][2][32:])
        self.assertEqual(wrong.frames[1], unknown.frames[1])

    def test_closed_and_moved_ones_too(self):
        for user in ('gone', 'away'):
            self.run_steps(tarsnapd.account_create(user, b'pw'))
        self.run_steps(tarsnapd.account_close('gone'))
        self.run_steps(tarsnapd.account_move(self.run_steps(
            tarsnapd.account_need('away')), 'here'))
        unknown = self.login('none', b'pw')
        for user in ('gone', 'away'):
            work = self.login(user, b'pw')
            self.assertEqual(work.code, 'LOGIN')
            self.assertEqual(work.wishes, unknown.wishes)
            self.assertEqual([name for name, _ in work.calls],
                             [name for name, _ in unknown.calls])

    def test_decoys_are_no_accounts(self):
        for user in (tarsnapd.DECOY_ADDRESS, tarsnapd.DECOY_CLAIM,
                     tarsnapd.NO_CLAIM):
            self.assertFalse(self.run_steps(
                tarsnapd.account_login(user, b's'))[0])
            self.assertIsNone(self.run_steps(tarsnapd.account_get(user)))
            with self.assertRaises(tarsnapd.ServerError):
                self.run_steps(tarsnapd.account_create(user, b'pw'))
        self.assertTrue(self.run_steps(
            tarsnapd.account_load(tarsnapd.DECOY)))
        self.assertEqual([x['address'] for x in self.run_steps(
            tarsnapd.account_list())], ['joe'])
        self.assertEqual(len(self.run_steps(tarsnapd.account_ids())), 1)

    def without_decoys(self, claim=True):
        """As a store was before there were any, or after one was lost."""
        prefixes = [tarsnapd.account_prefix(tarsnapd.DECOY)]
        if claim:
            prefixes.append(tarsnapd.address_prefix(tarsnapd.DECOY_CLAIM))
        for prefix in prefixes:
            shutil.rmtree(os.path.join(self.path, 'store', prefix))

    def test_without_decoys(self):
        self.without_decoys()
        self.assertEqual(self.login('nobody', b'pw').code, 'LOGIN')
        self.assertEqual(self.login('joe', b'wrong').code, 'LOGIN')
        self.assertIsNone(self.login('joe', b'pw').code)

    def test_an_older_store_gets_them_when_it_is_served(self):
        before = self.login('nobody', b'pw').read
        for claim in (True, False):
            self.without_decoys(claim)
            self.assertNotEqual(self.login('nobody', b'pw').read, before)
            Serve(self.path).kill()
            self.assertEqual(self.login('nobody', b'pw').read, before)

    def challenge(self, user):
        client = Client(Embedded(self.path))
        body = client.call('REGISTER1', ZERO + bytes([len(user)])
                           + user.encode())[1]
        client.close()
        return body

    def test_letters_case_tells_nothing(self):
        """One salt for all spellings, whether there is a user or not."""
        for user in ('joe', 'nobody'):
            self.assertEqual(self.challenge(user),
                             self.challenge(user.upper()))
        self.assertNotEqual(self.challenge('joe'), self.challenge('nobody'))

    def test_a_right_password_still_does(self):
        self.assertIsNone(self.login('joe', b'pw').code)
        self.assertIsNone(self.login('JOE', b'pw').code)

    def test_challenges_are_few(self):
        client = Client(Embedded(self.path))
        self.addCleanup(client.close)
        with self.assertRaises(Error) as caught:
            for _ in range(17):
                client.call('REGISTER1', ZERO + b'\3joe')
        self.assertEqual(caught.exception.code, 'BAD')
        self.assertTrue(client.link.local.over)


class Wire(unittest.TestCase):

    def test_a_guesser_is_put_off_and_told_how_long(self):
        """Across connections, workers, and a restart."""
        path = server_directory(self)
        serve = Serve(path, '--workers', '2')
        self.addCleanup(lambda: serve.kill() if serve.alive() else None)
        codes = []
        for _ in range(12):
            client = serve.client()
            try:
                client.register(Keys(), 'joe', b'wrong')
            except Error as e:
                codes.append(e.code)
                said = str(e)
            client.close()
        self.assertEqual(codes, ['LOGIN'] * 10 + ['BUSY'] * 2)
        self.assertRegex(said, 'too many wrong passwords; try again in '
                               '[0-9]+ seconds')
        self.assertEqual(serve.stop()[0], 0)
        again = Serve(path)
        self.addCleanup(again.kill)
        client = again.client()
        with self.assertRaises(Error) as caught:
            client.register(Keys(), 'joe', b'pw')
        self.assertEqual(caught.exception.code, 'BUSY')
        client.close()


if __name__ == '__main__':
    unittest.main()
