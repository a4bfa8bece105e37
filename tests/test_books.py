# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A share of `make books`: the ledger adds up whatever happens meanwhile."""

import contextlib
import copy
import os
import random
import subprocess
import sys
import tempfile
import threading
import unittest
from unittest import mock

import books
import rawclient
import s3peers
import tarsnapd
from books import DAY, PRICES, Books, Dead
from world import seed_choose


class Share(unittest.TestCase):

    def test_the_ledger_is_that_of_one_clean_run(self):
        first = seed_choose('books.py')
        done = subprocess.run(
            [sys.executable, books.__file__, '--seed', str(first), '--events',
             '350', '--worlds', '4'], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)
        words = dict(pair.rsplit(' ', 1) for pair in
                     done.stdout.split(': ')[1].strip().split(', '))
        for word in ('bill', 'killed', 'lost answers', 'lost requests',
                     'move', 'pay', 'views lost'):
            self.assertGreater(int(words.get(word, 0)), 0, word)


class Alone(unittest.TestCase):

    def books(self, seed, events, late=590):
        """A world in which nobody has billed, after so many events."""
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        world = Books(random.Random(seed), base.name, '2024-02-26', late)
        self.addCleanup(world.close)
        world.bill = lambda: None
        for _ in range(events):
            world.event()
        return world

    def test_killed_at_every_request(self):
        """Over a month's end; the next run, on another host, completes it."""
        seed = seed_choose('killed')
        world = self.books(seed, 80)
        world.now = (world.start + 6) * DAY
        objects, made = world.store.objects, sum(world.stats.values())
        world.store.objects = dict(objects)
        world.run(tarsnapd.bill(PRICES))
        count = sum(world.stats.values()) - made
        whole = world.ledger(world.store)
        self.assertIn('closed/2024-02/0', whole)
        for n in range(0, count, 7):
            world.store.objects = dict(objects)
            for host in world.hosts:
                host.view.remove()
            world.left = n
            with self.assertRaises(Dead):
                world.run(tarsnapd.bill(PRICES))
            world.left = None
            world.run(tarsnapd.bill(PRICES), world.hosts[n % 2])
            self.assertEqual(world.ledger(world.store), whole, n)

    def test_commits_that_come_days_late(self):
        """Nothing is lost and nothing charged twice, whatever the clock."""
        seed = seed_choose('late')
        world = self.books(seed, 1, 4 * DAY)
        del world.bill                  # that of the class
        for _ in range(250):
            world.event()
        found, committed = world.charged()
        self.assertEqual(found, committed)
        self.assertGreater(len(found), 3)

    def test_a_view_made_anew_is_the_same(self):
        """From the last closing on it knows what the whole ledger says."""
        world = self.books(seed_choose('view'), 120)
        world.now += 70 * DAY
        world.run(tarsnapd.bill(PRICES, late=True))
        world.run(tarsnapd.ledger_catch_up())
        view = world.hosts[0].view
        whole = copy.copy(view.call('balances', ()))
        self.assertGreater(len(whole), 3)
        view.remove()
        self.read = []
        get = world.store.get
        world.store.get = lambda key, *where: (
            self.read.append(key), get(key, *where))[1]
        world.run(tarsnapd.ledger_catch_up())
        self.assertEqual(view.call('balances', ()), whole)
        first = min(key for key in self.read if key.startswith('usage/'))
        self.assertGreaterEqual(first, 'usage/2024-03-31', first)


class Bucket(unittest.TestCase):
    """Accounts and ledger in a bucket."""

    START = tarsnapd.day_parse('2026-11-28')
    PLACES = ('usage/', 'closed/', 'ledger/', 'standing/', 'mail/')

    def test_a_share(self):
        seed = seed_choose('books.py --s3')
        done = subprocess.run(
            [sys.executable, books.__file__, '--s3', '--seed', str(seed),
             '--events', '15'], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)

    def server(self, path, **places):
        """A Server with prices and mail, made anew at `path`."""
        tarsnapd.server_create(path, places)
        with open(os.path.join(path, 'tarsnapd.conf'), 'a') as file:
            file.write('storage-price = 250\nupload-price = 250\n'
                       'mail-from = Backups <b@example.org>\n')
        server = tarsnapd.Server(path)
        self.addCleanup(server.close)
        return server

    def fill(self, server, rng):
        """Accounts with and without money, machines that commit."""
        server.run(tarsnapd.start_make(self.START))
        for number in range(4):
            ident = '%016x' % rng.getrandbits(64)
            server.run(tarsnapd.versioned_put(
                tarsnapd.account_prefix(ident), 0, {
                    'id': ident, 'address': 'u%d@example.org' % number}))
            if number % 2:
                server.run(tarsnapd.ledger_pay(ident, 'bank', '1', 10 ** 19))
            machine = rng.getrandbits(64)
            server.run(tarsnapd.versioned_put(
                'machine/%016x/' % machine, 0, {'name': 'x'}))
            server.run(tarsnapd.owner_set(machine, ident))
            before = bytes(32)
            for k in range(1, 4):
                entry = tarsnapd.Entry(machine, k, before, (
                    self.START + k) * DAY + rng.randrange(DAY))
                entry.commit = books.commit_object(machine, 1)
                entry.bytes = rng.randrange(10 ** 9)
                data = tarsnapd.log_encode(entry)
                server.store.put(tarsnapd.log_key(machine, k), data)
                before = rawclient.sha(data)

    def bill(self, server, ready=None):
        """What `tarsnapd bill` does; its steps that were taken."""
        if ready:
            ready.wait()
        server.run(tarsnapd.bill(server.prices))
        return [one.account for one in server.run(tarsnapd.standing_update(
            server.perform(('view', 'balances')), server.prices, False,
            server.post))]

    def ledger(self, server):
        return {key: server.accounts.get(key) for place in self.PLACES
                for key in server.accounts.list(place)}

    def test_two_hosts_bill_at_once(self):
        """They make what one makes alone on files, and tell each owner once.
        """
        seed = seed_choose('two hosts')
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        perform = tarsnapd.Server.perform_here
        now = self.START * DAY
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(s3peers.bucket('books'))
        stack.enter_context(mock.patch.object(
            tarsnapd.Server, 'perform_here', lambda server, wish: (
                now if wish == ('now',) else perform(server, wish))))
        alone, *both = [self.server(os.path.join(base.name, name), **places)
                        for name, places in (
            ('alone', {'accounts': 'accounts'}),
            ('a', {'store': 's3://books/x', 'accounts': 's3://books/y'}),
            ('b', {'store': 's3://books/x', 'accounts': 's3://books/y'}))]
        for server in (alone, both[0]):
            self.fill(server, random.Random(seed))
        now = (self.START + 5) * DAY + 3600
        took, ready = [], threading.Barrier(2)
        threads = [threading.Thread(target=lambda server=server: took.append(
            self.bill(server, ready))) for server in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(took), 2)
        self.assertEqual(sorted(sum(took, [])), self.bill(alone))
        found = self.ledger(both[0])
        self.assertEqual(found, self.ledger(alone))
        self.assertEqual(len([key for key in found
                              if key.startswith('mail/due/')]), 2)
        for server in both:
            self.assertEqual(self.bill(server), [])
        self.assertEqual(self.ledger(both[1]), found)


if __name__ == '__main__':
    unittest.main()
