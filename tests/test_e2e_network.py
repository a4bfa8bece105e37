# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The whole job with a server over TLS; restoring with next to nothing."""

import os
import shutil
import subprocess
import sys
import unittest

import mainjob
import world


class Network(mainjob.MainJob, unittest.TestCase):

    @classmethod
    def world_make(cls):
        return world.World(cls, 'tls')

    @classmethod
    def tree_make(cls, path, seed):
        world.tree_full(path, seed, 10 * world.MIB)

    def test_one_file_and_a_key_restore(self):
        # A bare machine: tarsnap.py and the key, nothing else of ours.
        w, bare = self.world, self.world.path('bare')
        os.mkdir(bare)
        os.mkdir(w.path('elsewhere'))
        for path in (os.path.join(world.ROOT, 'tarsnap.py'), w.key):
            shutil.copy(path, bare)
        done = w.run(
            [sys.executable, '-I', os.path.join(bare, 'tarsnap.py'),
             '--no-default-config', '--keyfile', os.path.join(bare, 'key'),
             '-x', '-p', '-f', 'third', '-C', w.path('elsewhere')],
            cwd=w.path('elsewhere'),
            env={'PATH': os.environ.get('PATH', '')})
        self.assertEqual((done.code, done.out, done.err), (0, '', ''))
        world.tree_equal(self, self.after, w.path('elsewhere', 'tree'))
        self.assertEqual(sorted(os.listdir(bare)), ['key', 'tarsnap.py'])

    def test_ten_readers_at_once(self):
        # One tool in the field runs ten extracts at a time.
        w, readers = self.world, []
        for number in range(10):
            os.mkdir(w.path('reader%d' % number))
            readers.append(w.start('-x', '-p', '-f', 'third', '-C',
                                   w.path('reader%d' % number), 'tree/added'))
        for number, reader in enumerate(readers):
            done = reader.wait()
            self.assertEqual((done.code, done.err), (0, ''))
            with open(w.path('reader%d' % number, 'tree/added/grows')) as file:
                self.assertEqual(file.read(), 'as before')

    def test_a_restarted_server_serves_on(self):
        w = self.world
        done = w.server.restart()
        self.assertIsNone(done)
        w.tarsnapd('rebuild', w.server.path)
        self.assertIn('third', w.names())
        world.tree_equal(self, self.before, os.path.join(
            w.extract('first'), 'tree'))

    def test_a_new_certificate_keeps_the_pin(self):
        w = self.world
        w.tarsnapd('cert', w.server.path)
        w.server.restart()
        self.assertIn('third', w.names())

    def test_the_server_ends_cleanly(self):
        server = self.world.server
        done = server.kill(15)
        server.start()
        self.assertEqual((done.code, done.out), (0, ''))
        first, *lines = done.lines
        self.assertRegex(first, r'\Atarsnapd: listening on \S+\Z')
        for line in lines:
            self.assertRegex(line, r'\Atime=\S+ pid=\d+ event='
                             r'(start|request|refuse|close|stop)\b')
        self.assertTrue(lines[-1].endswith('event=stop'))

    def test_the_store_holds_nothing_readable(self):
        names = subprocess.run(
            ['grep', '-rlaE', 'quick brown fox|linked|tree/|with attributes',
             self.world.server.path], stdout=subprocess.PIPE).stdout
        self.assertEqual(names, b'')


if __name__ == '__main__':
    unittest.main()
