# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""How often each command waits for the server: a number that does not grow.

Counted by the proxy of bench/network.py, connection and TLS included: the
longest chain of things said by one side after it had heard the one before.
"""

import os
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
sys.path.insert(0, os.path.join(os.path.dirname(HERE), 'bench'))

import many         # noqa: E402
import network      # noqa: E402
import trees        # noqa: E402
import world        # noqa: E402

RTT = 0.02      # seconds, so that what is in flight together is seen to be
ARCHIVES = 1000
FEW = 12        # of which four make the connection and prove who we are


class RoundTrips(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls, 'tls')
        key = w.keygen()
        cls.proxy = network.Proxy(('127.0.0.1', w.server.port), RTT)
        cls.addClassCleanup(cls.proxy.close)
        trees.tiny(w.path('tree'), 2000)
        w.ok('-c', '-f', 'one', '-C', w.root, 'tree')
        cls.alone = cls.trips('--list-archives')
        many.Many(w.server.path, key).make(ARCHIVES)

    @classmethod
    def trips(cls, *args):
        """How often a command that must succeed goes to and fro."""
        cls.proxy.counts = network.Counts()
        cls.done = cls.world.ok('--server', cls.proxy.server, *args)
        return cls.proxy.counts.figures()['round_trips']

    def few(self, *args, most=FEW):
        found = self.trips(*args)
        self.assertLessEqual(found, most, args)
        return found

    def test_listing_a_thousand_archives(self):
        found = self.few('--list-archives')
        self.assertEqual(len(self.done.out.splitlines()), ARCHIVES + 1)
        # Their records are asked for together; the cache directory was
        # behind, so the commits since then are asked for as well.
        self.assertLessEqual(found, self.alone + 3)

    def test_one_archive_among_a_thousand(self):
        self.few('-t', '-f', 'one')
        self.assertGreater(len(self.done.out.splitlines()), 2000)
        out = self.world.path('out')
        os.mkdir(out)
        self.few('-x', '-p', '-f', 'one', '-C', out)
        world.tree_equal(self, self.world.path('tree'),
                         os.path.join(out, 'tree'))

    def test_with_a_cache_directory(self):
        # It has a thousand commits of another host to catch up with.
        self.few('--fsck', most=FEW + 6)
        self.assertEqual(self.trips('--print-stats'), 0)
        self.few('--print-stats', '-f', '*')
        self.assertIn('many-%d ' % (ARCHIVES - 1), self.done.out)
        self.few('-c', '-f', 'two', '-C', self.world.root, 'tree')
        one = self.few('-d', '-f', 'two')
        # Each further archive is a commit of its own.
        self.few('-d', '-f', 'many-7', '-f', 'many-8', most=2 * one)


if __name__ == '__main__':
    unittest.main()
