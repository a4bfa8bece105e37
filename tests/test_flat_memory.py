# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What a backup keeps of each block and each file does not add up.

The table of the run's blocks is held against a dict, and a backup's memory at
two sizes of one tree against each other, as Python counts it.
"""

import os
import random
import sys
import tracemalloc
import unittest
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
sys.path.insert(0, HERE)

import tarsnap                  # noqa: E402
from lab import LabTest         # noqa: E402

SEED = 20261124


def fields(own):
    return own and (own.cls, own.plain, own.stored, own.sums, own.used)


class Blocks(unittest.TestCase):

    def test_as_a_dict(self):
        """Whatever is set, dropped and put away in whatever order."""
        rng = random.Random(SEED)
        names = [rng.randbytes(32) for _ in range(3000)]
        # Some fall together: the end of the table comes round.
        names += [b'\xff' * 8 + rng.randbytes(24) for _ in range(40)]
        owned, model = tarsnap.Owned(), {}
        for _ in range(30000):
            name, what = rng.choice(names), rng.random()
            if what < .5:
                own = tarsnap.Own(
                    rng.choice((tarsnap.CHUNK, tarsnap.INDEX)),
                    rng.randrange(1 << 18), rng.choice((0, 7, 1 << 18)),
                    rng.random() < .9)
                if own.cls != tarsnap.CHUNK:
                    own.sums = (1 << 40, 1 << 39)
                old = model.get(name)
                if old and (old.cls != own.cls or old.stored > own.stored):
                    continue            # a block stays what it is, and put
                owned.set(name, own)
                model[name] = own
            elif what < .6:
                owned.drop(name)
                model.pop(name, None)
            elif what < .6002:
                owned.unuse()
                for own in model.values():
                    own.used = False
            self.assertEqual(fields(owned.get(name)), fields(model.get(name)))
        self.assertEqual(
            {name: fields(own) for name, own in owned.items()},
            {name: fields(own) for name, own in model.items()})
        owned.clear()
        self.assertEqual(list(owned.items()), [])

    def test_bytes_of_each(self):
        count, names = 20000, random.Random(SEED)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        owned = tarsnap.Owned()
        for _ in range(count):
            owned.set(names.randbytes(32),
                      tarsnap.Own(tarsnap.CHUNK, 5000, 2000))
        self.assertLess(tracemalloc.get_traced_memory()[0], 64 * count)


class Files(LabTest):

    def most(self, folder):
        """Python's memory at its highest in a backup, bytes."""
        tracemalloc.start()
        try:
            self.host.create(folder, folder)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def test_four_times_the_files(self):
        """Of each further file little is kept, also of its long name."""
        for folder, count in (('warm', 2), ('few', 600), ('many', 2400)):
            for i in range(count):
                self.write('%s/%d/%s%d' % (folder, i // 100, 'name' * 20, i),
                           b'number %s %d' % (folder.encode(), i))
        # So that what is kept at most is reached with few files.
        with mock.patch.multiple(tarsnap, PAGES_WAITING=1,
                                 PAGE_ENTRIES=100), \
                mock.patch.dict(tarsnap.MEMORY, {
                    None: (tarsnap.MIB, 100, tarsnap.MIB)}), \
                mock.patch.dict(tarsnap.ROWS, delta=50, small=50, memo=1):
            self.most('warm')
            few, many = self.most('few'), self.most('many')
        self.assertLess((many - few) / 1800, 100)


if __name__ == '__main__':
    unittest.main()
