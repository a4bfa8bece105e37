# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A disk that is full: one clear line, and with space again all goes on.

The disk is a real one, a small tmpfs, which only root can mount.  In turn the
server is on it, the client's cache directory, and what is restored.
"""

import os
import random
import subprocess
import sys
import tempfile
import unittest

import lab
from world import USER, Server, World, seed_choose

NO_SPACE = 'No space left on device'
MIB = 1 << 20


class FullDisk:
    """A tmpfs of `size` bytes, gone with the test."""

    def __init__(self, case, size):
        self.path = tempfile.mkdtemp(prefix='full-')
        case.addCleanup(os.rmdir, self.path)
        done = subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=%d,mode=700' % size, 'none',
             self.path], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise unittest.SkipTest('cannot mount a tmpfs: '
                                    + done.stderr.strip())
        case.addCleanup(subprocess.run, ['umount', self.path], check=True)
        self.ballast = os.path.join(self.path, 'ballast')

    def fill(self, left=0):
        """Leave no more than about `left` bytes."""
        free = os.statvfs(self.path)
        with open(self.ballast, 'wb', buffering=0) as file:
            size = free.f_bavail * free.f_frsize - left
            while size > 0:
                try:
                    size -= file.write(bytes(min(size, 65536)))
                except OSError:
                    break

    def free(self):
        os.unlink(self.ballast)


@unittest.skipUnless(os.geteuid() == 0, 'only root can mount a file system')
class Full(unittest.TestCase):

    def setUp(self):
        self.dice = random.Random(seed_choose(self.id()))
        self.world = World(self, 'dir')
        self.tree = self.world.path('tree')
        os.mkdir(self.tree)
        self.more(300000)

    def more(self, size):
        """The tree grows; what is in it now."""
        name = 'f%d' % len(os.listdir(self.tree))
        with open(os.path.join(self.tree, name), 'wb') as file:
            file.write(self.dice.randbytes(size))
        self.model = lab.snapshot(self.tree)

    def create(self, name, **options):
        return self.world.tarsnap('-c', '-f', name, '-C', self.tree, '.',
                                  **options)

    def check(self, name, model=None):
        found = lab.snapshot(self.world.extract(name, cache=None))
        found[b''] = (model or self.model)[b'']
        self.assertEqual(lab.difference(model or self.model, found), [])

    def fails(self, done, reason, code=1):
        """One line of reason, and this exit status."""
        self.assertEqual(done.code, code, done)
        self.assertNotIn('Traceback', done.err)
        lines = [line for line in done.lines if reason in line]
        self.assertEqual(len(lines), 1, done)
        self.assertRegex(lines[0], '^tarsnapd?: ')

    def test_under_the_server(self):
        disk = FullDisk(self, 6 * MIB)
        world = self.world
        os.mkdir(os.path.join(disk.path, 'server'), 0o700)
        os.symlink(os.path.join(disk.path, 'server'), world.path('server'))
        world.server = Server(world)
        self.addCleanup(world.server.kill)
        world.address = '127.0.0.1:%d' % world.server.port
        world.keygen()
        self.assertEqual(self.create('before').code, 0)
        before = self.model
        self.more(2 * MIB)
        for left in (0, MIB):
            with self.subTest(left=left):
                disk.fill(left)
                self.fails(self.create('full'), NO_SPACE)
                self.assertEqual(world.names(cache=None), ['before'])
                self.check('before', before)
                disk.free()
        disk.fill()
        for command in (('-d', '-f', 'before'), ('--nuke',)):
            done = world.tarsnap(*command, give=b'No Tomorrow\n')
            self.fails(done, NO_SPACE)
        done = world.run([sys.executable, world.program('tarsnapd'), 'user',
                          world.server.path, 'quota', USER, '1G'])
        self.fails(done, NO_SPACE)
        self.assertIsNone(world.server.running.process.poll())
        disk.free()
        self.assertEqual(self.create('full').code, 0)
        self.check('full')
        self.check('before', before)
        for command in ('clean', 'scrub', 'rebuild'):
            world.tarsnapd(command, world.server.path)

    def test_under_a_server_that_is_made(self):
        disk = FullDisk(self, MIB)
        path = os.path.join(disk.path, 'server')
        disk.fill()
        argv = [sys.executable, self.world.program('tarsnapd'), 'init', path]
        self.fails(self.world.run(argv), NO_SPACE)
        disk.free()
        self.assertEqual(self.world.run(argv).code, 0)

    def test_under_the_cache_directory(self):
        disk = FullDisk(self, MIB)
        cache = os.path.join(disk.path, 'cache')
        self.world.keygen()
        lefts = (0, 4096, 30000)
        for number in range(len(lefts)):
            self.world.ok('-c', '-f', 'old-%d' % number, '-C', self.tree, '.',
                          cache=cache)
        for number, left in enumerate(lefts):
            for _ in range(100):
                self.more(100)
            name = 'full-%d' % number
            with self.subTest(left=left):
                disk.fill(left)
                done = self.create(name, cache=cache)
                there = name in self.world.names(cache=None)
                if done.code:
                    self.fails(done, 'is full', 2 if there else 1)
                    self.assertNotIn('--fsck', done.err)
                done = self.world.tarsnap('--fsck', cache=cache)
                if done.code:
                    self.fails(done, 'is full')
                done = self.world.tarsnap('-d', '-f', 'old-%d' % number,
                                          cache=cache)
                if done.code:
                    self.fails(done, 'is full', 2 - (
                        'old-%d' % number in self.world.names(cache=None)))
                disk.free()
                if not there:
                    self.world.ok('-c', '-f', name, '-C', self.tree, '.',
                                  cache=cache)
                self.check(name)
                before = self.world.ok('--print-stats', cache=cache).out
                self.world.ok('--fsck', cache=cache)
                self.assertEqual(self.world.ok('--print-stats',
                                               cache=cache).out, before)

    def test_under_what_is_restored(self):
        disk = FullDisk(self, 8 * MIB)
        self.world.keygen()
        for _ in range(3):
            self.more(MIB)
        self.assertEqual(self.create('one').code, 0)
        for left in (0, MIB + 200000):
            where = tempfile.mkdtemp(dir=disk.path)
            disk.fill(left)
            done = self.world.tarsnap('-x', '-p', '-f', 'one', '-C', where,
                                      cache=None)
            self.assertEqual(done.code, 1, done)
            self.assertNotIn('Traceback', done.err)
            self.assertIn(NO_SPACE, done.err)
            disk.free()
            self.world.ok('-x', '-p', '-f', 'one', '-C', where, cache=None)
            found = lab.snapshot(where)
            found[b''] = self.model[b'']
            self.assertEqual(lab.difference(self.model, found), [])
            subprocess.run(['rm', '-r', where], check=True)

    def test_under_standard_output(self):
        self.world.keygen()
        self.assertEqual(self.create('one').code, 0)
        for command in (('--list-archives',), ('-r', '-f', 'one'),
                        ('-t', '-f', 'one'), ('--print-stats',)):
            with self.subTest(command=command), open('/dev/full', 'wb') as f:
                done = subprocess.run(self.world.argv(command), stdout=f,
                                      stderr=subprocess.PIPE, text=True,
                                      env=self.world.environment)
                self.assertEqual(done.returncode, 1, done)
                self.assertIn(NO_SPACE, done.stderr)
                self.assertNotIn('Traceback', done.stderr)
                self.assertNotIn('Exception', done.stderr)


if __name__ == '__main__':
    unittest.main()
