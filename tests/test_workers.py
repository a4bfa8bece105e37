# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The processes that deflate and seal: every block comes back, whatever its
size and however many; one that dies or seals wrongly ends the run with one
line; none outlives the process that forked it.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zlib
from unittest import mock

import lab
import world
from lab import tarsnap
from test_review_regressions import wire
from world import KIB, MIB

CHUNK, INDEX = tarsnap.CHUNK, tarsnap.INDEX


def alive(pid):
    """True if there is a process `pid` that has not ended."""
    try:
        with open('/proc/%d/stat' % pid) as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


class Crew(unittest.TestCase):

    def setUp(self):
        self.key = tarsnap.key_make('', 'box')
        self.names = tarsnap.Names(self.key)
        self.opener = tarsnap.Opener(self.key)
        self.seed = world.seed_choose(self.id())
        self.dice = random.Random(self.seed)
        self.back = {}

    def crew(self, **options):
        crew = tarsnap.Crew(self.key, **options)
        crew.put = self.put
        return crew

    def put(self, sealed, name, parts):
        self.assertNotIn(name, self.back)
        self.back[name] = sealed, parts

    def add(self, crew, size, cls=CHUNK):
        parts = (self.dice.randbytes(size),)
        if cls == INDEX:
            parts = (self.dice.randbytes(size // 2), bytes(size))
        name = self.names.chunk(b''.join(parts))
        crew.add(cls, name, parts, name, parts)
        return name, cls, parts

    def check(self, added):
        self.assertEqual(len(self.back), len(added))
        for name, cls, parts in added:
            sealed, _ = self.back[name]
            self.assertEqual(self.opener.open(cls, name, sealed),
                             list(parts))

    def test_every_block_comes_back(self):
        crew = self.crew()
        try:
            sizes = [1, 2] + [100, 80 * KIB, 256 * KIB, 256 * KIB - 1] * 5 + \
                [self.dice.randrange(1, 256 * KIB) for _ in range(60)]
            self.dice.shuffle(sizes)
            added = [self.add(crew, size) for size in sizes]
            added += [self.add(crew, 256 * KIB, INDEX) for _ in range(5)]
            crew.finish()
        finally:
            crew.close()
        self.check(added)

    def test_many_small_ones(self):
        crew = self.crew()
        try:
            added = [self.add(crew, 20) for _ in range(5000)]
            crew.finish()
        finally:
            crew.close()
        self.check(added)

    def test_what_was_dropped_does_not_come_back(self):
        crew = self.crew()
        try:
            for _ in range(40):
                self.add(crew, 100 * KIB)
            crew.drop()
            self.back.clear()
            added = [self.add(crew, 100 * KIB) for _ in range(40)]
            crew.finish()
        finally:
            crew.close()
        self.check(added)

    def test_dense_runs_are_not_deflated(self):
        deflated = []
        real = tarsnap.deflate

        def counted(data, level):
            deflated.append(len(data))
            return real(data, level)

        worker = tarsnap.SealWorker(tarsnap.Sealer(self.key), False,
                                    None, -1, -1)

        def sealed(data):
            deflated.clear()
            block = worker.seal(CHUNK, self.names.chunk(data), [data], None)
            self.assertEqual(self.opener.open(
                CHUNK, self.names.chunk(data), block), [data])
            return len(block)

        noise, text = self.dice.randbytes(64 * KIB), b'so it goes\n' * 6000
        mixed = noise[:KIB] + text + noise[KIB:2 * KIB]
        with mock.patch.object(tarsnap, 'deflate', counted):
            for _ in range(tarsnap.IN_VAIN):
                sealed(noise)
                self.assertIn(len(noise), deflated)
            sealed(noise)
            self.assertNotIn(len(noise), deflated)
            # What shrinks in any of three places is tried whole.
            self.assertLess(sealed(mixed), len(mixed) // 4)
            sealed(noise)
            self.assertIn(len(noise), deflated)

    def test_noise_is_known_by_its_values(self):
        real, deflated = zlib.compressobj, []

        def counted(*args):
            deflated.append(args)
            return real(*args)

        with mock.patch.object(tarsnap.zlib, 'compressobj', counted):
            for _ in range(50):
                self.assertFalse(tarsnap.shrinks(self.dice.randbytes(KIB * 9)))
        self.assertLess(len(deflated), 25)      # 7 on average
        noise = self.dice.randbytes(20 * KIB)
        numbers = [b''.join(bytes([byte & 7]) + noise[at:at + width - 1]
                            for at, byte in enumerate(noise))
                   for width in (2, 3, 4)]
        for data in (*numbers, noise.hex().encode(), bytes(64 * KIB)):
            self.assertTrue(tarsnap.shrinks(data))

    def test_no_process_is_left(self):
        crew = self.crew()
        pids = set(crew.workers)
        self.add(crew, MIB // 4)
        self.assertTrue(all(map(alive, pids)))
        crew.close()
        self.assertFalse(any(map(alive, pids)))

    def test_one_that_is_killed(self):
        crew = self.crew()
        try:
            with self.assertRaisesRegex(tarsnap.Error, 'ended by itself'):
                for pid in crew.workers:
                    os.kill(pid, signal.SIGKILL)
                for _ in range(200):
                    self.add(crew, 256 * KIB)
                crew.finish()
        finally:
            crew.close()

    def test_one_that_seals_wrongly(self):
        real = tarsnap.Sealer.encrypt

        def wrong(sealer, cls, name, parts):
            sealed = bytearray(real(sealer, cls, name, parts))
            sealed[-1] ^= 1
            return bytes(sealed)

        with mock.patch.object(tarsnap.Sealer, 'encrypt', wrong):
            crew = self.crew()
        try:
            self.add(crew, 1000)
            with self.assertRaisesRegex(tarsnap.Error, 'worker process'):
                crew.finish()
        finally:
            crew.close()
        self.assertEqual(self.back, {})


class Openers(unittest.TestCase):

    def test_nothing_is_written_once_closed(self):
        """The number of the pipe may be that of another file by then."""
        key = tarsnap.key_make('', 'box')
        data = bytes(200 * KIB)
        kid = tarsnap.Kid(CHUNK, tarsnap.Names(key).chunk(data), len(data))
        openers = tarsnap.Openers(key)
        self.addCleanup(openers.close)
        for tag in range(2):            # the third does not fit beside them
            openers.add(kid, data, tag)
        openers.stop()
        with tempfile.TemporaryFile() as file:
            self.assertLess(openers.give, 1000)
            if file.fileno() != openers.give:
                os.dup2(file.fileno(), openers.give)
                self.addCleanup(os.close, openers.give)
            with self.assertRaisesRegex(tarsnap.Error, 'have ended'):
                openers.add(kid, data, 2)
            openers.flush()
            self.assertEqual(os.fstat(file.fileno()).st_size, 0)


class Program(unittest.TestCase):
    """The same by the real program."""

    @classmethod
    def setUpClass(cls):
        cls.world = world.World(cls, 'dir')
        cls.world.keygen()
        for number in range(12):
            world.write(cls.world.path('tree', 'f%02d' % number),
                        world.noise(4 * MIB, number))

    def start(self, name):
        """A backup under way: (Popen, its workers)."""
        w = self.world
        running = subprocess.Popen(
            [sys.executable, os.path.join(lab.HERE, '..', 'tarsnap.py'),
             '--no-default-config', '--keyfile', w.path('key'), '--cachedir',
             w.path('cache'), '-c', '-f', name, '-C', w.root, 'tree'],
            stderr=subprocess.PIPE)
        self.addCleanup(running.stderr.close)
        children = '/proc/%d/task/%d/children' % (running.pid, running.pid)
        workers = []
        while running.poll() is None and len(workers) < min(
                tarsnap.WORKERS_MOST, tarsnap.processors()):
            with open(children) as file:
                workers = list(map(int, file.read().split()))
            time.sleep(0.01)
        return running, workers

    def ended(self, pids):
        """Wait for processes that are not ours."""
        until = time.monotonic() + 60
        while any(map(alive, pids)) and time.monotonic() < until:
            time.sleep(0.01)
        self.assertFalse(any(map(alive, pids)))

    def test_parent_killed(self):
        running, workers = self.start('killed')
        running.kill()
        running.wait()
        self.assertTrue(workers)
        self.ended(workers)

    def test_worker_killed(self):
        running, workers = self.start('failed')
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        _, err = running.communicate()
        self.assertEqual(running.returncode, 1, err)
        self.assertIn(b'a worker process ended by itself', err)
        self.assertNotIn(b'Traceback', err)
        self.ended(workers)
        self.assertEqual(self.world.names(), [])
        self.world.ok('-c', '-f', 'whole', '-C', self.world.root, 'tree')
        self.world.ok('-d', '-f', 'whole')


    def test_a_parent_that_ignores_its_children(self):
        """They can be waited for all the same."""
        w = self.world

        def ignore():
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)

        w.ok('-c', '-f', 'ignored', '-C', w.root, 'tree', preexec_fn=ignore)
        for args in ('-r', '-f', 'ignored'), ('--verify',):
            w.ok(*args, preexec_fn=ignore)
        w.ok('-d', '-f', 'ignored')


class Alone(lab.LabTest):
    """A worker is forked before there is any thread whose locks it would
    inherit, held for ever.
    """

    def creates(self, *args, **options):
        self.forks('-c', *args, '-C', self.lab.tree, '.', **options)

    def forks(self, *args, **options):
        """Threads at each fork of a run that must succeed."""
        real, seen = os.fork, []

        def fork():
            seen.append(threading.active_count())
            return real()

        with mock.patch.object(os, 'fork', fork):
            self.host.good(*args, **options)
        self.assertTrue(seen)
        self.assertEqual(seen, [1] * len(seen))

    def test_whatever_else_a_run_does(self):
        self.write('file', b'some')
        self.creates('-f', 'first')
        self.creates('-f', 'merged', '@@first')
        self.creates('--dry-run')
        self.creates('--dry-run', '-f', 'none', '@@first')
        self.creates('--dry-run', cache=False)

    def test_what_reads_an_archive(self):
        self.write('file', b'some')
        self.host.good('-c', '-f', 'a', '-C', self.lab.tree, '.')
        self.forks('-x', '-f', 'a', '-C', self.lab.tree)
        self.forks('-r', '-f', 'a')
        self.forks('--verify')

    def test_where_no_process_can_be_had(self):
        """A backup says so; a restore goes on without.  Of several workers
        one is enough.
        """
        self.write('file', b'some')
        self.host.good('-c', '-f', 'a', '-C', self.lab.tree, '.')
        real, left = os.fork, []

        def fork():
            if not left:
                raise BlockingIOError(11, 'Resource temporarily unavailable')
            return left.pop()()

        with mock.patch.object(os, 'fork', fork):
            for count in range(2):
                left[:] = [real] * count
                self.write('file', b'changed')
                self.host.good('-x', '-f', 'a', '-C', self.lab.tree)
                with open(os.path.join(self.lab.tree, 'file'), 'rb') as file:
                    self.assertEqual(file.read(), b'some')
                self.assertFalse(left)
            left[:] = [real]
            self.host.good('-c', '-f', 'b', '-C', self.lab.tree, '.')
            done = self.host.run('-c', '-f', 'c', '-C', self.lab.tree, '.')
        self.assertEqual(done.status, 1)
        self.assertIn('Resource temporarily unavailable', done.err)
        self.assertEqual(self.host.good('--list-archives').out, 'a\nb\n')

    def test_after_a_run_that_died(self):
        """The server is asked what became of its commit."""
        self.write('file', b'some')
        self.assertEqual(self.lab.crash(self.host, wire(
            lambda kind, body, local: os._exit(7) if kind == tarsnap.COMMIT
            else None), '-c', '-f', 'dead', '-C', self.lab.tree, '.'), 7)
        self.creates('-f', 'next', '--lowmem')

    def test_so_are_the_children_of_tests(self):
        """A thread that was joined is still there for a moment."""
        seen = []

        def fork():
            seen.append(len(os.listdir('/proc/self/task')))
            raise InterruptedError

        with mock.patch.object(os, 'fork', fork):
            for _ in range(100):
                thread = threading.Thread(target=len, args=('',))
                thread.start()
                thread.join()
                with self.assertRaises(InterruptedError):
                    self.lab.crash(self.host, None)
        self.assertEqual(seen, [1] * 100)


if __name__ == '__main__':
    unittest.main()
