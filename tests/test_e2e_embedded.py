# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The whole job with a directory as server: all comes back as it was."""

import os
import subprocess
import unittest

import mainjob
import world
from world import KIB


class Embedded(mainjob.MainJob, unittest.TestCase):

    @classmethod
    def world_make(cls):
        return world.World(cls, 'dir', compiled=False)

    def test_vast_files_and_paths(self):
        w = self.world
        world.tree_vast(w.path('vast'), self.seed)
        done = w.ok('-c', '--print-stats', '-f', 'vast', '-C', w.root, 'vast')
        self.assertLess(done.numbers('New data')[0], 1000 * KIB)
        where = os.path.join(w.extract('vast'), 'vast')
        world.tree_equal(self, w.path('vast'), where)
        # 10 GB came back as the 300 kB they are.
        self.assertLess(os.stat(os.path.join(where, 'sparse')).st_blocks * 512,
                        1000 * KIB)
        w.ok('-d', '-f', 'vast')

    def test_one_name_of_a_linked_file(self):
        where = self.world.extract('third', 'tree/links/b/c/same')
        with open(os.path.join(where, 'tree/links/b/c/same'), 'rb') as file:
            self.assertEqual(file.read(), b'linked' * 10000)

    def test_odd_names_are_listed_escaped(self):
        lines = self.world.ok('-t', '-f', 'third').raw.split(b'\n')
        for name in (rb'tree/names/new\nline', rb'tree/names/back\\slash',
                     rb'tree/names/invalid\377\376utf-8',
                     rb'tree/names/tab\tquote"' + b"'",
                     'tree/names/ümläut€𝄞'.encode()):
            self.assertIn(name, lines)

    def test_the_tree_was_all_it_should_be(self):
        # What the file system of the temporary directory cannot hold was
        # left out, and not tested.
        attributes = set()
        for entry in self.before.values():
            attributes.update(entry['attributes'])
        wanted = {'user.one', 'system.posix_acl_access',
                  'system.posix_acl_default'}
        missing = sorted(wanted - attributes)
        if not any('device' in entry for entry in self.before.values()):
            missing.append('devices')
        if missing:
            self.skipTest('not tested: ' + ', '.join(missing))
        self.assertEqual(self.before[b'links/fifo']['names'],
                         (b'links/a/fifo2', b'links/fifo'))

    def test_the_store_holds_nothing_readable(self):
        names = subprocess.run(
            ['grep', '-rlaE', 'quick brown fox|linked|tree/|with attributes',
             self.world.path('store')], stdout=subprocess.PIPE).stdout
        self.assertEqual(names, b'')


if __name__ == '__main__':
    unittest.main()
