# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A share of `make books`: the ledger adds up whatever happens meanwhile."""

import copy
import random
import subprocess
import sys
import tempfile
import unittest

import books
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


if __name__ == '__main__':
    unittest.main()
