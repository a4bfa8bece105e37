# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Checkpoints and archives cut short: CLI 5.1 and the V lines of 3.8.

Signals are real ones, sent by this process to itself at a known place: the
client runs in it.  Every state of the cache directory that is left behind is
compared with the store by the accountant of test_counts.
"""

import os
import signal
import unittest
from unittest import mock

import lab
import tarsnap
from lab import D, W, snapshot
from test_counts import CountTest

CUT = 'tarsnap: Archive truncated\n'
DELAYED = 'tarsnap: Error exit delayed from previous errors.\n'
CHANGED = DELAYED + \
    'tarsnap: The server has changed what it stores nevertheless.\n'


def signal_at(step, *numbers):
    """Send this process signals at that step within large files."""
    real, count = tarsnap.Writer.step, [0]

    def steps(writer, size):
        count[0] += 1
        if count[0] == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        real(writer, size)

    return mock.patch.object(tarsnap.Writer, 'step', steps)


class TruncateTest(CountTest):
    def setUp(self):
        super().setUp()
        for name in ('SIGQUIT', 'SIGUSR1', 'SIGUSR2'):
            number = getattr(signal, name)
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        for number in range(6):
            self.write('big/f%d' % number, self.rng.randbytes(400000))
        self.model = snapshot(self.lab.tree)
        self.args = '-C', self.lab.tree, '.'
        self.host.good('--initialize-cachedir')

    def names(self):
        return self.host.good('--list-archives', cache=False
                              ).out.splitlines()

    def whole(self, name):
        """-x of a part: all its entries are whole; their paths."""
        target = self.lab.fresh()
        os.mkdir(target)
        result = self.host.run('-x', '-f', name, '-C', target, cache=False)
        self.assertEqual(result.status, 1)
        lines = result.err.splitlines(True)
        self.assertEqual(lines[0], 'tarsnap: Truncated input file\n')
        self.assertEqual(lines[-1], DELAYED)
        found = snapshot(target)
        for path, row in found.items():
            if 'content' in row:
                self.assertEqual(row, self.model[path])
        return set(found) - {b''}

    def sent(self, name, *args, status=0):
        """Bytes of blocks that -c sent, and its Result."""
        with lab.tapped() as log:
            result = self.host.good('-c', '-f', name, *args, *self.args,
                                    status=status)
        return sum(row[2] for row in log.puts()), result


class Truncation(TruncateTest):

    def test_maxbw(self):
        sent, result = self.sent('one', '--maxbw', '1MB', '--print-stats',
                                 status=2)
        self.assertTrue(result.err.startswith(CUT), result)
        self.assertIn('\nThis archive ', result.err)
        self.assertTrue(result.err.endswith(CHANGED))
        self.assertEqual(self.names(), ['one.part'])
        # A step of a file, and the index, come on top.
        self.assertGreaterEqual(sent, 10 ** 6)
        self.assertLess(sent, 10 ** 6 + 700000)
        self.audit(self.host)
        self.assertIn(b'big/f0', self.whole('one.part'))
        self.assertNotIn(b'big/f5', self.whole('one.part'))

    def test_maxbw_not_reached(self):
        self.sent('one', '--maxbw', '1GB')
        self.assertEqual(self.names(), ['one'])
        # Nothing is uploaded, so nothing can be too much.
        self.sent('two', '--maxbw', '100k')
        self.assertEqual(self.names(), ['one', 'two'])
        sent, result = self.sent('three', '--maxbw', '0', '--dry-run')
        self.assertEqual((sent, result.err), (0, ''))

    def test_sigquit(self):
        """In the midst of a file, which is left out."""
        with signal_at(70, signal.SIGQUIT):
            sent, result = self.sent('one', status=2)
        self.assertEqual(result.err, CUT + CHANGED)
        self.assertEqual(self.names(), ['one.part'])
        found = self.whole('one.part')
        self.assertTrue({b'big'} < found < set(self.model))
        self.audit(self.host)

    def test_sigquit_after_a_checkpoint(self):
        with signal_at(40, signal.SIGQUIT):
            self.sent('one', '--checkpoint-bytes=1MB', status=2)
        self.assertEqual(self.names(), ['one.part'])
        self.audit(self.host, garbage=True)
        self.whole('one.part')

    def test_sigquit_in_a_dry_run(self):
        with signal_at(30, signal.SIGQUIT):
            sent, result = self.sent('one', '--dry-run', status=1)
        self.assertEqual((sent, result.err), (0, CUT + DELAYED))
        self.assertEqual(self.lab.live(), {})

    def test_stop_then_conflict(self):
        """Done over from the start, it stops where it stopped before."""
        self.host.create('base')
        other = self.lab.host('b')
        other.good('--fsck')
        self.write('big/f9', self.rng.randbytes(400000))
        self.model = snapshot(self.lab.tree)
        real, done = tarsnap.Transaction.commit_object, []

        def commit_object(txn, *args):
            if not done:
                done.append(self.lab.crash(other, mock.patch.object(
                    tarsnap.Transaction, 'commit_object', real),
                    '-d', '-f', 'base'))
            return real(txn, *args)

        with mock.patch.object(tarsnap.Transaction, 'commit_object',
                               commit_object), signal_at(
                                   3, signal.SIGQUIT):
            result = self.host.run('-c', '-f', 'one', *self.args)
        self.assertEqual((result.status, result.err), (2, CUT + CHANGED))
        found = self.whole('one.part')
        self.assertIn(b'big/f5', found)
        self.assertNotIn(b'big/f9', found)
        self.audit(self.host, garbage=True)

    def test_benefit(self):
        """What was sent stays deduplicated for the next try."""
        first, _ = self.sent('one', '--maxbw', '1MB', status=2)
        second, _ = self.sent('other')
        whole = sum(row['content'][0] for row in self.model.values()
                    if 'content' in row)
        self.assertLess(first + second, 1.3 * whole)
        self.host.check('other', self.model)

    def test_name_clash(self):
        self.sent('one', '--maxbw', '1MB', status=2)
        result = self.host.run('-c', '-f', 'one', *self.args)
        self.assertEqual((result.status, result.err.splitlines()[0]), (
            1, 'tarsnap: An archive already exists with the name "one"'))
        self.host.good('-d', '-f', 'one.part')
        self.audit(self.host)
        self.sent('one')
        self.assertEqual(self.names(), ['one'])

    def test_a_name_of_1023_bytes(self):
        name = 'n' * 1023
        self.sent(name, '--maxbw', '1MB', status=2)
        self.assertEqual(self.names(), [name + '.part'])

    def test_as_a_source(self):
        """@@NAME.part gives the entries it has."""
        self.sent('one', '--maxbw', '1MB', status=2)
        result = self.host.good('-c', '-f', 'copy', '@@one.part')
        self.assertIn('one.part was cut short', result.err)
        self.assertEqual(self.host.good(
            '-c', '-f', 'copy2', '--quiet', '@@one.part').err, '')
        self.audit(self.host, garbage=True)
        self.host.good('-d', '-f', 'one.part')
        self.audit(self.host)
        found = snapshot(self.host.extract('copy'))
        self.assertEqual(set(found) - {b''}, self.whole_names('copy'))

    def whole_names(self, name):
        lines = self.host.good('-t', '-f', name).out.splitlines()
        return {os.fsencode(line.rstrip('/'))[2:] for line in lines} - {b''}


class Checkpoints(TruncateTest):

    def test_sigusr2(self):
        with signal_at(20, signal.SIGUSR2), lab.tapped() as log:
            result = self.host.good('-c', '-v', '-f', 'one', *self.args)
        self.assertEqual(log.kinds().count(tarsnap.CHECKPOINT), 1)
        self.assertIn('\ntarsnap: Creating checkpoint... done.\n',
                      result.err)
        self.assertEqual(self.names(), ['one'])
        self.host.check('one', self.model)
        self.audit(self.host, garbage=True)

    def test_within_one_file(self):
        """Each part of a file is borrowed from then on: another host that
        deletes what nothing refers to yet makes it be sent again.
        """
        self.write('huge', self.rng.randbytes(4000000))
        self.model = snapshot(self.lab.tree)
        other = self.lab.host('b')
        other.good('--fsck')
        real = tarsnap.Writer.checkpointed
        seen = []

        def checkpointed(writer):
            real(writer)
            if writer.reader.open and writer.progress.path == b'./huge':
                seen.append(len(writer.pages))
                if len(seen) == 2:      # its first parts go
                    self.lab.crash(other, mock.patch.object(
                        tarsnap.Writer, 'checkpointed', real),
                        '-d', '-f', 'base')

        self.host.create('base', 'd1')
        with mock.patch.object(tarsnap.Writer, 'checkpointed', checkpointed):
            self.host.create('one', '--checkpoint-bytes=1MB')
        self.assertGreater(len(seen), 2)
        self.assertEqual(self.names(), ['one'])
        self.host.check('one', self.model)
        self.audit(self.host, garbage=True)
        self.host.good('-d', '-f', 'one')
        self.audit(self.host)

    def dies(self, name):
        """A run that ends after a checkpoint as if the power went."""
        def checkpointed(writer):
            os._exit(7)

        self.write('big/new', self.rng.randbytes(1500000))
        self.model = snapshot(self.lab.tree)
        self.assertEqual(self.lab.crash(self.host, mock.patch.object(
            tarsnap.Writer, 'checkpointed', checkpointed), '-c', '-f', name,
            '--checkpoint-bytes=1MB', *self.args), 7)

    def test_a_dead_run(self):
        """The next c or d, --recover or --fsck keeps its checkpoint."""
        self.host.create('base', 'd1')
        for number, step in enumerate((
                ('-c', '-f', 'next', *self.args), ('-d', '-f', 'base'),
                ('--recover',), ('--fsck',))):
            with self.subTest(step[0]):
                name = 'dead-%d' % number
                self.dies(name)
                self.host.good(*step)
                self.assertIn(name + '.part', self.names())
                self.assertIn(b'big', self.whole(name + '.part'))
                self.audit(self.host, garbage=True)
                result = self.host.run('-c', '-f', name, *self.args)
                self.assertEqual(result.status, 1)
                self.assertIn('An archive already exists', result.err)
                self.host.good('-d', '-f', name + '.part')
                self.audit(self.host)

    def test_recover_with_nothing_to_do(self):
        self.host.create('base', 'd1')
        for roles in ((W,), (D,)):
            other = self.lab.host('r%d' % roles[0], roles)
            other.good('--fsck')
            result = other.good('--recover')
            self.assertEqual((result.out, result.err), ('', ''))


if __name__ == '__main__':
    unittest.main()
