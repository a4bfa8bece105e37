# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""--progress-bytes, SIGUSR1, --progress and --totals: CLI 3.7 and 3.8."""

import os
import pty
import re
import signal
import sys
import unittest
from unittest import mock

import lab
import tarsnap
import world
from lab import LabTest


class Golden(LabTest):
    """Rows of CLI 3.7 marked golden: dry runs of two files."""

    def setUp(self):
        super().setUp()
        self.write('run-tests.sh', b'x' * 14000)
        self.write('shared_functions.sh', b'y' * 3000)

    def lines(self, *args):
        result = lab.run(['--no-default-config', '-c', '--dry-run', *args,
                          '-C', self.lab.tree, 'run-tests.sh',
                          'shared_functions.sh'])
        self.assertEqual((result.status, result.out), (0, ''))
        return result.err.splitlines()

    def test_two_files_1k(self):
        self.assertEqual(self.lines('--progress-bytes', '1k'), [
            'Processed 1 entries, 14512 bytes',
            'adding shared_functions.sh (0 / 3000 bytes)',
            'Processed 2 entries, 18024 bytes'])

    def test_verbose_lines_come_first(self):
        self.assertEqual(self.lines('--progress-bytes', '1k', '-v'), [
            'a run-tests.sh', 'a shared_functions.sh',
            'Processed 1 entries, 14512 bytes',
            'adding shared_functions.sh (0 / 3000 bytes)',
            'Processed 2 entries, 18024 bytes'])

    def test_verbose_20k(self):
        self.assertEqual(self.lines('--progress-bytes', '20k', '-v'), [
            'a run-tests.sh', 'a shared_functions.sh',
            'Processed 2 entries, 18024 bytes'])

    def test_humanized(self):
        self.assertEqual(
            self.lines('--progress-bytes', '1k', '--humanize-numbers'), [
                'Processed 1 entries, 14 kB',
                'adding shared_functions.sh (0 B / 3.0 kB bytes)',
                'Processed 2 entries, 18 kB'])

    def test_totals(self):
        self.assertEqual(self.lines('--totals'),
                         ['Total bytes written: 18024'])
        self.assertEqual(self.lines('--no-totals'), [])
        os.unlink(os.path.join(self.lab.tree, 'run-tests.sh'))
        result = lab.run(['--no-default-config', '-c', '--dry-run',
                          '--totals', '-C', self.lab.tree, 'run-tests.sh',
                          'shared_functions.sh'])
        self.assertEqual(result.status, 1)
        self.assertNotIn('Total', result.err)

    def test_sizes(self):
        for size in ('999', '1K', 'x'):
            result = lab.run(['--no-default-config', '-c', '--dry-run',
                              '--progress-bytes', size, self.lab.tree])
            self.assertEqual(result.status, 1, size)
        result = lab.run(['--no-default-config', '-t', '-f', 'x',
                          '--progress-bytes', '1k'])
        self.assertEqual(result.status, 1)
        self.assertIn('--progress-bytes', result.err)


class Reports(LabTest):
    """Real runs, and signals this process sends itself."""

    def setUp(self):
        super().setUp()
        for name in ('SIGUSR1', 'SIGUSR2', 'SIGQUIT'):
            number = getattr(signal, name)
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        self.write('large', os.urandom(3 * world.MIB))
        self.write('small', b'small')

    def signalled(self, owner, name, *args):
        """Run with SIGUSR1 before each call of a method; lines of stderr."""
        real = getattr(owner, name)

        def call(*args, **options):
            os.kill(os.getpid(), signal.SIGUSR1)
            return real(*args, **options)

        with mock.patch.object(owner, name, call):
            return self.host.good(*args).err.splitlines()

    def test_sigusr1_within_a_large_file(self):
        self.host.good('--initialize-cachedir')
        lines = self.signalled(tarsnap.Writer, 'step', '-c', '-f', 'one',
                               '-C', self.lab.tree, '.')
        self.assertEqual(lines, [
            line for part in (1, 2, 3) for line in (
                'Processed 1 entries, %d bytes' % (512 + part * world.MIB),
                'adding ./large (%d / %d bytes)' % (part * world.MIB,
                                                    3 * world.MIB))])

    def test_sigusr1_extracting(self):
        self.write('tiny', b'')
        self.host.create('one')
        lines = self.signalled(
            tarsnap.Extractor, 'extract', '-x', '-f', 'one', '-C',
            self.lab.root)
        self.assertEqual(lines[-2:], [
            'Processed 3 entries, %d bytes' % (1541 + 3 * world.MIB),
            'extracting ./tiny'])
        self.assertIn('extracting ./large', lines)

    def test_copying(self):
        self.host.create('one')
        lines = self.host.good('-c', '-f', 'two', '--progress-bytes', '1k',
                               '@@one').err.splitlines()
        self.assertEqual(lines[-1], 'Processed 3 entries, %d bytes'
                         % (3 * 512 + 3 * world.MIB + 5))
        self.assertEqual(lines[-2], 'copying ./small (0 / 5 bytes)')

    def test_unchanged_runs_say_the_same(self):
        args = ('-C', self.lab.tree, '--progress-bytes', '1k', '--totals',
                '.')
        self.host.good('--initialize-cachedir')
        first = self.host.good('-c', '-f', 'one', *args).err
        self.assertEqual(self.host.good('-c', '-f', 'two', *args).err, first)
        self.assertIn('Total bytes written: %d\n'
                      % (3 * 512 + 3 * world.MIB + 5), first)

    def test_extracting_with_progress_bytes(self):
        self.host.create('one')
        lines = self.host.good(
            '-x', '-f', 'one', '-C', self.lab.root, '--progress-bytes',
            '1MB').err.splitlines()
        self.assertEqual(lines, [
            'Processed 2 entries, %d bytes' % (1024 + 3 * world.MIB),
            'extracting ./small',
            'Processed 3 entries, %d bytes' % (1541 + 3 * world.MIB)])

    def test_other_modes_ignore_it(self):
        self.host.create('one')
        for field in ('mode_list', 'mode_list_archives', 'mode_tar'):
            real = getattr(tarsnap, field)

            def mode(*args, real=real):
                for number in (signal.SIGUSR1, signal.SIGUSR2):
                    os.kill(os.getpid(), number)
                return real(*args)

            with mock.patch.object(tarsnap, field, mode):
                args = {'mode_list': ('-t', '-f', 'one'),
                        'mode_list_archives': ('--list-archives',),
                        'mode_tar': ('-r', '-f', 'one')}[field]
                self.host.good(*args)


class Memory(LabTest):
    """--lowmem, --verylowmem, --normalmem: what they limit is limited."""

    def test_limits(self):
        for number in range(300):
            self.write('f%d' % number, os.urandom(3000))
        crews, seen = [], []
        real, drain = tarsnap.Crew.__init__, tarsnap.Transaction.drain

        def made(crew, *args):
            real(crew, *args)
            crews.append(len(crew.workers))

        def drained(txn, most):
            drain(txn, most)
            pages = {db.execute('PRAGMA cache_size').fetchone()[0]
                     for db in (txn.pending.db, txn.cache.db)}
            seen.append((most, pages, len(txn.smalls)))

        with mock.patch.object(tarsnap, 'processors', lambda: 3), \
                mock.patch.object(tarsnap.Crew, '__init__', made), \
                mock.patch.object(tarsnap.Transaction, 'drain', drained):
            for name, window, pages in (
                    ('normalmem', 8, 2048), ('lowmem', 2, 1024),
                    ('verylowmem', 1, 512)):
                self.write('new', os.urandom(3000))
                self.host.create(name, '--' + name)
                self.assertEqual(
                    {row[0] for row in seen} - {0}, {window * world.MIB})
                self.assertEqual([row[1] for row in seen],
                                 [{-pages}] * len(seen))
                seen.clear()
        self.assertEqual(crews, [3, 3, 1])

    def test_one_of_them(self):
        result = self.host.run('-c', '-f', 'one', '--lowmem', '--verylowmem',
                               self.lab.tree)
        self.assertEqual(result.status, 1)
        self.assertIn('--lowmem', result.err)
        self.assertIn('usage:', result.err)


class Terminal(unittest.TestCase):
    """--progress, where there is a terminal and where there is none."""

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls)
        w.keygen()
        for number in range(40):
            world.write(w.path('tree', 'f%d' % number),
                        world.noise(100000, number))
        cls.args = ['-c', '-v', '--progress', '-C', w.root]

    def on_terminal(self, *args, term='xterm'):
        """What a run writes to a terminal, raw."""
        w = self.world
        argv = w.argv(args)
        pid, master = pty.fork()
        if not pid:
            os.execvpe(sys.executable, argv, dict(w.environment, TERM=term))
        out = b''
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:             # the other end is closed
                break
            if not data:
                break
            out += data
        os.close(master)
        self.assertEqual(os.waitpid(pid, 0)[1], 0, out)
        return out.decode()

    def shown(self, text):
        """(lines that stay, states of the bar)."""
        bars = re.findall('\r([^\r\n]*)\x1b\\[K', text)
        rest = re.sub('\r[^\r\n]*\x1b\\[K', '', text)
        return rest.splitlines(), [bar for bar in bars if bar]

    def test_on_a_terminal(self):
        lines, bars = self.shown(self.on_terminal('-f', 'one', *self.args,
                                                  'tree'))
        self.assertEqual(lines[0], 'a tree')
        self.assertEqual(len(lines), 41)
        self.assertTrue(bars)
        for bar in bars:                # nothing is known of the whole
            self.assertRegex(bar, r'\A\d+ entries, [\d.]+ k?M?B'
                                  r'(, [\d.]+ k?M?G?B/s)?\Z')
        world.write(self.world.path('tree', 'f0'), b'changed')
        lines, bars = self.shown(self.on_terminal('-f', 'two', *self.args,
                                                  'tree'))
        self.assertRegex(bars[0], r'\A0 entries, 0 B of 4\.0 MB, 0 %')
        os.mkdir(self.world.path('out'))
        lines, bars = self.shown(self.on_terminal(
            '-x', '-f', 'two', '--progress', '-C', self.world.path('out')))
        self.assertEqual(lines, [])
        self.assertRegex(bars[0], r'\A0 entries, 0 B of 3\.9 MB, 0 %')

    def test_elsewhere(self):
        done = self.world.ok('-f', 'three', *self.args, './tree')
        self.assertEqual(len(done.lines), 41)
        self.assertNotIn('\x1b', done.err)
        text = self.on_terminal('-f', 'four', *self.args, './tree',
                                term='dumb')
        self.assertNotIn('\x1b', text)


if __name__ == '__main__':
    unittest.main()
