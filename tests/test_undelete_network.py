# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Deletes taken back at a real server over TLS, its store a directory or a
bucket; and what is frozen meanwhile does not stand in the way.
"""

import os
import unittest

import s3peers
from test_s3_store import environment
from world import World, seed_choose, tree_equal, tree_small

import tarsnapd


class Undelete:
    """The same for every store; `cls.world` is a World with a server."""

    @classmethod
    def world_fill(cls):
        w = cls.world
        cls.seed = seed_choose(cls.__name__)
        w.keygen()
        cls.tree = w.path('tree')
        tree_small(cls.tree, cls.seed)
        cls.machine = w.tarsnapd('machine', w.server.path,
                                 'list').out.split()[0]
        cls.operator('delete-delay', cls.machine, '7')
        cls.names = ['one', 'two']
        for name in cls.names:
            w.ok('-c', '-f', name, '-C', w.root, 'tree')

    @classmethod
    def operator(cls, *words):
        return cls.world.tarsnapd('machine', cls.world.server.path, *words)

    def figures(self):
        stat = self.world.server.stat()
        return [stat[name] for name in ('archives', 'blocks', 'bytes')]

    def whole(self):
        """Both archives are there, and whole for a host with no memory."""
        self.assertEqual(self.world.names(cache=None), self.names)
        for name in self.names:
            tree_equal(self, self.tree, os.path.join(
                self.world.extract(name, cache=None), 'tree'))

    def clean(self):
        self.world.tarsnapd('clean', self.world.server.path, '--used', '99')

    def test_a_thief_with_every_key(self):
        w, before = self.world, self.figures()
        w.ok('-d', '-f', 'one')
        w.tarsnap('--nuke', give=b'No Tomorrow\n')
        self.assertEqual((w.names(), self.figures()), ([], [0, 0, 0]))
        for _ in range(2):
            self.clean()                # the delay keeps it
        listed = w.ok('--undelete', '--dry-run', cache=None).out
        self.assertEqual([line.split('\t')[0]
                          for line in listed.splitlines()], self.names)
        w.ok('--undelete', '-f', 'one')
        self.assertEqual(w.names(), ['one'])
        w.server.restart()
        w.ok('--undelete', '-f', 'two')
        self.assertEqual(self.figures(), before)
        self.whole()

    def test_with_a_role_frozen(self):
        w, before = self.world, self.figures()
        self.operator('freeze', self.machine, 'rw')
        self.addCleanup(self.operator, 'unfreeze', self.machine)
        w.ok('-d', '-f', 'two')
        w.ok('--undelete', '-f', 'two')
        done = w.tarsnap('-c', '-f', 'three', '-C', w.root, 'tree')
        self.assertEqual(done.code, 1)
        self.assertIn('the operator has frozen the role w', done.err)
        self.operator('freeze', self.machine, 'd')
        for words in (('-d', '-f', 'two'), ('--undelete', '-f', 'two')):
            done = w.tarsnap(*words)
            self.assertEqual(done.code, 1)
            self.assertIn('the operator has frozen the role d', done.err)
        self.operator('unfreeze', self.machine)
        self.assertEqual(self.figures(), before)
        self.whole()


class Files(Undelete, unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.world = World(cls, 'tls')
        cls.world_fill()


class S3(Undelete, unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        peer = s3peers.Moto()
        cls.addClassCleanup(peer.close)
        with environment(peer.environment()):
            tarsnapd.Bucket('backup', {}).request('create', '', 'PUT')
        cls.world = World(cls, 'tls', init=('--store', 's3://backup/x'),
                          env=peer.environment())
        cls.world_fill()


if __name__ == '__main__':
    unittest.main()
