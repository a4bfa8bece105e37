# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What is kept of each block and each file does not add up.

The table of the run's blocks is held against a dict, and the memory of a
backup, of --fsck and of a server's rebuild at two sizes against each other, as
Python counts it.  Where many blocks are needed bench/simulate.py makes them.
"""

import gc
import os
import random
import sys
import threading
import time
import tracemalloc
import unittest
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
sys.path.insert(0, HERE)
sys.path.insert(0, os.path.join(os.path.dirname(HERE), 'bench'))

import simulate                 # noqa: E402
import tarsnap                  # noqa: E402
import tarsnapd                 # noqa: E402
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


class Server:
    """In the place of tarsnapd.Local: to CHANGES it says LENGTHS in turn."""

    statement = b''

    def __init__(self, lengths):
        self.lengths = lengths
        self.made = 0                   # answers
        self.ended = threading.Event()

    def receive(self, kind, rid, _):
        return self.changes(rid) if kind == tarsnap.CHANGES else [
            (tarsnap.OK, rid, b'the other')]

    def changes(self, rid):
        for length in self.lengths:
            self.made += 1
            yield tarsnap.ADDED, rid, bytes(length)
        yield tarsnap.OK, rid, b''

    def idle(self):
        return []

    def close(self):
        self.ended.set()


class Answers(unittest.TestCase):
    """A server in this process makes its answers as they are taken."""

    def setUp(self):
        self.server = Server([100000] * 1000)
        link = mock.Mock(transport=tarsnap.TRANSPORT_DIR, local=self.server)
        link.close = self.server.close
        with mock.patch.object(tarsnap, 'link_make', lambda *_: link):
            self.channel = tarsnap.Channel('here')
        self.addCleanup(self.channel.close)
        self.rid = self.channel.post(tarsnap.CHANGES)

    def rested(self):
        """Wait until it rests; how many answers were made."""
        self.assertEqual(self.channel.next(self.rid)[0], tarsnap.ADDED)
        end = time.monotonic() + 60
        while not self.channel.resting and self.server.made < 1000:
            self.assertLess(time.monotonic(), end)
            time.sleep(0.001)
        return self.server.made

    def test_made_as_they_are_taken(self):
        for taken in range(1, 500):
            most = taken + tarsnap.QUEUED_HERE // 100000 + 1
            self.assertLessEqual(self.rested(), most)
        left = sum(1 for _ in self.channel.stream(self.rid))
        self.assertEqual(left, 1000 - 499)
        self.assertEqual(self.channel.queued, 0)

    def test_who_waits_for_another_answer_gets_it(self):
        self.assertLess(self.rested(), 20)
        self.assertEqual(self.channel.call(tarsnap.STAT),
                         (tarsnap.OK, b'the other'))
        self.assertEqual(sum(1 for _ in self.channel.stream(self.rid)), 999)

    def test_what_nobody_takes_any_more(self):
        """A forgotten request is got out of the way; at the end, left."""
        self.assertLess(self.rested(), 20)
        self.channel.forget(self.rid)
        self.assertEqual(self.channel.call(tarsnap.STAT)[1], b'the other')
        self.assertEqual(self.server.made, 1000)
        self.server.made = 0
        self.rid = self.channel.post(tarsnap.CHANGES)
        self.assertLess(self.rested(), 20)
        self.channel.close()
        self.assertTrue(self.server.ended.wait(60))
        self.assertLess(self.server.made, 20)


class Store(LabTest):
    """A store of blocks without content, twice as many each time."""

    BLOCKS = 14000              # at first, in two commits

    def fill(self, name):
        """One more archive, of as many blocks."""
        path = os.path.join(self.lab.tree, name)
        with open(path, 'wb') as file:
            file.truncate(self.BLOCKS * simulate.CHUNK)
        reader = tarsnap.FileReader
        with mock.patch.multiple(
                reader, read=reader.read, read_range=reader.read_range,
                sparse=reader.sparse):
            simulate.simulate(tarsnap)
            self.host.good('-c', '-f', name, '--checkpoint-bytes', '1000000',
                           '-C', self.lab.tree, name)

    def most(self, work):
        """Python's memory at its highest in `work`, bytes."""
        gc.collect()
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def growth(self, work):
        """Bytes for each block that there is more."""
        self.fill('few')
        work()                                      # what is kept for good
        few = self.most(work)
        self.fill('many')
        self.assertGreater(len(self.lab.live()), 2 * self.BLOCKS)
        return (self.most(work) - few) / self.BLOCKS

    def fsck(self):
        real = tarsnap.Fetcher.decode

        def decode(fetcher, kid, body):
            return kid.cls != tarsnap.CHUNK and real(fetcher, kid, body)

        # So that what is kept at most is reached with few blocks.
        with mock.patch.multiple(
                tarsnap, QUEUED_HERE=64 << 10, INDEX_WINDOW=64 << 10,
                LEARN=1000), \
                mock.patch.object(tarsnap.Fetcher, 'decode', decode):
            self.host.good('--fsck', '--read-data')

    def test_fsck_of_twice_the_blocks(self):
        """What it kept of each once was 40 bytes and more of the answer to
        CHANGES, 170 of index blocks, and 140 of the chunks to read.
        """
        with mock.patch.object(tarsnap, 'PAGE_KIDS', 64):
            self.assertLess(self.growth(self.fsck), 30)

    def rebuild(self):
        with mock.patch.dict(tarsnapd.LIMIT, {'rows at once': 1000}):
            server = tarsnapd.Server(self.lab.store)
            try:
                found, lines = tarsnapd.rebuild(server, self.lab.key.machine)
            finally:
                server.close()
        self.assertEqual(lines, [])
        self.assertGreater(found, self.BLOCKS)

    def test_rebuild_of_twice_the_blocks(self):
        self.assertLess(self.growth(self.rebuild), 30)


if __name__ == '__main__':
    unittest.main()
