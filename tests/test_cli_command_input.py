# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""--command: what a command prints becomes a file of the archive."""

import os
import signal
import stat
import subprocess
import sys
import time
import unittest
from unittest import mock

import lab
import tarsnap

SIZES = (0, 1, tarsnap.SHARED_BELOW - 1, tarsnap.SHARED_BELOW,
         tarsnap.CHUNK_MAX, tarsnap.CHUNK_MAX + 1, 3000000)


def noise(size):
    """Bytes that neither deflate nor repeat, the same each time."""
    import random
    return random.Random(size).getrandbits(8 * size + 1).to_bytes(
        size + 1, 'big')[:size]


class CommandTest(lab.LabTest):

    def setUp(self):
        super().setUp()
        self.write('f', b'a file')
        self.host.create('first')

    def source(self, data):
        """A command that prints `data`."""
        path = self.lab.fresh('source')
        with open(path, 'wb') as file:
            file.write(data)
        return 'cat ' + path

    def archives(self):
        return set(self.host.good('--list-archives',
                                  cache=False).out.split())

    def store(self, name, *commands, args=(), status=0):
        words = [word for command in commands
                 for word in ('--command', command)]
        return self.host.good('-c', '-f', name, *args, *words, '-C',
                              self.lab.tree, '.', status=status)

    def restored(self, name, path):
        with open(os.path.join(self.host.extract(name), path), 'rb') as file:
            return file.read()

    def test_all_lengths_come_back(self):
        self.store('a', *['dump/%d=%s' % (size, self.source(noise(size)))
                          for size in SIZES])
        where = self.host.extract('a')
        for size in SIZES:
            with self.subTest(size), open(os.path.join(
                    where, 'dump', str(size)), 'rb') as file:
                self.assertEqual(file.read(), noise(size))

    def test_it_is_a_private_file_of_now(self):
        before = time.time_ns()
        self.store('a', 'x=echo text')
        st = os.lstat(os.path.join(self.host.extract('a'), 'x'))
        self.assertTrue(stat.S_ISREG(st.st_mode))
        self.assertEqual(stat.S_IMODE(st.st_mode), 0o600)
        self.assertEqual((st.st_uid, st.st_size), (os.geteuid(), 5))
        self.assertTrue(before <= st.st_mtime_ns <= time.time_ns())
        line, = self.host.good('-tv', '-f', 'a', 'x',
                               cache=False).out.splitlines()
        self.assertTrue(line.startswith('-rw-------'), line)

    def test_alone_and_beside_operands(self):
        result = self.host.good('-c', '-v', '-f', 'alone', '--command',
                                '/abs/x=echo 1')
        self.assertEqual(result.err, 'a abs/x\n')
        self.assertEqual(self.restored('alone', 'abs/x'), b'1\n')
        result = self.store('both', 'x=echo 2', args=('-v',))
        self.assertEqual(result.err, 'a x\na .\na ./f\n')
        self.assertEqual(self.restored('both', 'f'), b'a file')

    def test_the_same_bytes_are_not_stored_again(self):
        data = noise(3000000)
        self.write('g', data)
        self.host.create('file')
        with lab.tapped() as log:
            self.store('command', 'x=' + self.source(data))
        self.assertEqual([put for put in log.puts() if put[2] > 100000], [])
        self.assertEqual(self.restored('command', 'x'), data)

    def test_what_it_is_read_from_and_through(self):
        self.store('a', 'pipe=printf "a\\nb\\n" | sort -r', 'stdin=cat',
                   'equals=echo a=b')
        where = self.host.extract('a')
        for name, data in (('pipe', b'b\na\n'), ('stdin', b''),
                           ('equals', b'a=b\n')):
            with open(os.path.join(where, name), 'rb') as file:
                self.assertEqual(file.read(), data)

    def test_files_around_it_are_not_read_again(self):
        with lab.fine():
            for number in range(40):
                self.write('d/%d' % number, b'%d' % number)
            self.store('one', 'x=echo 1')
            with mock.patch.object(tarsnap.FileReader, 'read', self.fail):
                self.store('two', 'x=echo 2')
                self.host.create('without')
        self.assertEqual(self.restored('two', 'x'), b'2\n')

    def test_a_failing_command_fails_the_archive(self):
        for text, how in (('exit 3', 'exit status 3'),
                          ('head -c 2000000 /dev/zero; exit 4',
                           'exit status 4'),
                          ('kill -9 $$', 'killed by signal 9'),
                          ('exec 2>/dev/null; no-such-command',
                           'exit status 127')):
            with self.subTest(text):
                result = self.store('a', 'x=' + text, status=1)
                self.assertEqual(result.err.splitlines()[0],
                                 'tarsnap: Command "%s" failed: %s'
                                 % (text, how))
                self.assertEqual(self.archives(), {'first'})
        self.store('a', 'x=echo fine')

    def test_what_is_no_command(self):
        for text in ('x', 'x=', '=echo', 'x/=echo', '../x=echo', '/=echo'):
            with self.subTest(text):
                result = self.store('a', text, status=1)
                self.assertTrue(result.err.startswith(
                    'tarsnap: --command: Not PATH=COMMAND: ' + text), result)

    def test_dry_runs(self):
        mark = self.lab.path('mark')
        for option, runs in (('--dry-run', True),
                             ('--dry-run-metadata', False)):
            result = self.store('a', 'x=echo >> ' + mark,
                                args=(option, '-v'))
            self.assertEqual(result.err, 'a x\na .\na ./f\n')
            self.assertEqual(os.path.exists(mark), runs)
            if runs:
                os.unlink(mark)


class ProcessTest(lab.LabTest):
    """The program as a process of its own."""

    def start(self, command, *args):
        process = subprocess.Popen(
            [sys.executable, tarsnap.__file__, '--no-default-config', '-c',
             *args, '--command', 'x=' + command],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def wait_for(self, condition):
        end = time.monotonic() + 60
        while not condition():
            self.assertLess(time.monotonic(), end, 'never')
            time.sleep(0.01)

    def test_an_interrupted_run_leaves_no_process(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            for kind, text in (('one', 'exec sleep 1000'),
                               ('pipe', 'sleep 1000 | cat')):
                with self.subTest(kind, signal=number):
                    mark = self.lab.fresh('pid')
                    process = self.start('echo $$ > %s.new; mv %s.new %s; %s'
                                         % (mark, mark, mark, text),
                                         '--dry-run')
                    self.wait_for(lambda: os.path.exists(mark))
                    with open(mark) as file:
                        group = os.getpgid(int(file.read()))
                    self.assertNotEqual(group, os.getpgid(0))
                    process.send_signal(number)
                    self.assertEqual(process.wait(), -number)
                    self.wait_for(lambda: group_gone(group))

    def test_memory_does_not_grow_with_the_output(self):
        peaks = []
        for size in (30, 230):
            process = self.start('head -c %d000000 /dev/zero' % size,
                                 '--dry-run')
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status
            self.assertEqual(status, 0)
            peaks.append(usage.ru_maxrss)
        self.assertLess(peaks[1], 1.3 * peaks[0])


def group_gone(group):
    """True if no process of the group runs; what nobody has waited for yet
    does not.
    """
    rows = subprocess.run(['ps', '-A', '-o', 'pgid=', '-o', 'stat='],
                          stdout=subprocess.PIPE, text=True).stdout
    return not any(int(row.split()[0]) == group
                   and not row.split()[1].startswith('Z')
                   for row in rows.splitlines())


if __name__ == '__main__':
    unittest.main()
