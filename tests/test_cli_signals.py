# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Signals and the terminal's Ctrl-Q, on real processes: CLI 5.1, 6.3.

Each run reads a tar file from a pipe this test holds, so that it is known to
be in the midst of it when the signal comes.
"""

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import tarfile
import termios
import threading
import time
import unittest

import world


def stream(sizes):
    """A tar file with members of these sizes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        for number, size in enumerate(sizes):
            info = tarfile.TarInfo('f%d' % number)
            info.size = size
            tar.addfile(info, io.BytesIO(world.noise(size, str(number))))
    return out.getvalue()


class Signals(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls)
        w.keygen()
        w.ok('--initialize-cachedir')
        cls.data = stream((3000, 2000000))

    def begun(self, name, *args, **options):
        """A -c that has read one whole file and part of another; the pipe
        to it.
        """
        read, write = os.pipe()
        write = open(write, 'wb', 0)
        self.addCleanup(write.close)
        running = self.world.start('-c', '-v', '-f', name, *args, '@-',
                                   stdin=read, **options)
        os.close(read)
        view = memoryview(self.data)[:900000]
        while view:                     # more than a pipe holds
            view = view[write.write(view):]
        self.until(lambda: b'a f1\n' in running.text())
        return running, write

    def until(self, true):
        end = time.monotonic() + world.SECONDS
        while not true():
            self.assertLess(time.monotonic(), end, 'does not happen')
            time.sleep(0.02)

    def test_plain_deaths(self):
        """TERM, INT and HUP: 128+n, and nothing is stored."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number):
                running, _ = self.begun('dead')
                running.send(number)
                done = running.wait()
                self.assertEqual(done.code, -number, done)
                self.assertNotIn('Traceback', done.err)
                self.assertEqual(self.world.names(), [])

    def test_sigquit(self):
        running, write = self.begun('quit', '--print-stats')
        running.send(signal.SIGQUIT)
        with self.pump(write):
            done = running.wait()
        self.assertEqual(done.code, 2, done)
        self.assertIn('tarsnap: Archive truncated\n', done.err)
        self.assertGreater(done.numbers('This archive')[0], 0)
        self.assertEqual(self.world.names(), ['quit.part'])
        self.assertEqual(self.world.tarsnap('-t', '-f', 'quit.part').out,
                         'f0\n')
        self.world.ok('-d', '-f', 'quit.part')

    @contextlib.contextmanager
    def pump(self, write):
        """The input goes on: a signal is seen at the next step."""
        def go():
            with contextlib.suppress(BrokenPipeError), write:
                view = memoryview(self.data)[900000:]
                while view:
                    view = view[write.write(view):]

        thread = threading.Thread(target=go)
        thread.start()
        yield
        thread.join()

    def test_sigusr1_and_sigusr2(self):
        running, write = self.begun('usr')
        running.send(signal.SIGUSR1)
        running.send(signal.SIGUSR2)
        with self.pump(write):
            done = running.wait()
        self.assertEqual(done.code, 0, done)
        self.assertRegex(done.err, r'\nProcessed 1 entries, \d+ bytes\n'
                                   r'copying f1 \(\d+ / 2000000 bytes\)\n')
        self.assertIn('\ntarsnap: Creating checkpoint... done.\n', done.err)
        self.assertEqual(self.world.names(), ['usr'])
        self.world.ok('-d', '-f', 'usr')

    def test_other_modes(self):
        """SIGUSR1 and SIGUSR2 do no harm to -r, which waits for its reader.
        """
        w = self.world
        world.write(w.path('big'), world.noise(3000000, 'big'))
        w.ok('-c', '-f', 'big', '-C', w.root, 'big')
        read, write = os.pipe()
        with subprocess.Popen(w.argv(['-r', '-f', 'big']), stdout=write,
                              env=w.environment) as process:
            os.close(write)
            self.assertTrue(select.select([read], [], [], world.SECONDS)[0])
            for number in (signal.SIGUSR1, signal.SIGUSR2):
                os.kill(process.pid, number)
            with open(read, 'rb') as file:
                self.assertGreater(len(file.read()), 3000000)
            self.assertEqual(process.wait(), 0)
        w.ok('-d', '-f', 'big')


class Terminal(unittest.TestCase):
    """Ctrl-Q on a terminal is SIGQUIT; the terminal is given back."""

    @classmethod
    def setUpClass(cls):
        cls.world = w = world.World(cls)
        w.keygen()
        w.ok('--initialize-cachedir')
        cls.data = stream((3000, 2000000))

    def start(self, name):
        """(pid, terminal, pipe) of a -c in the midst of its input."""
        argv = self.world.argv(['-c', '-v', '-f', name, '@-'])
        read, write = os.pipe()
        os.set_inheritable(read, True)
        pid, master = pty.fork()
        if not pid:
            os.dup2(read, 0)
            os.close(write)
            os.execve(sys.executable, argv, self.world.environment)
        os.close(read)
        self.addCleanup(os.close, master)
        self.modes = termios.tcgetattr(master)
        view = memoryview(self.data)[:900000]
        while view:
            view = view[os.write(write, view):]
        text = b''
        while b'a f1' not in text:
            text += self.read(master)
        return pid, master, write

    def read(self, master):
        self.assertTrue(select.select([master], [], [], world.SECONDS)[0])
        return os.read(master, 4096)

    def end(self, pid, master, write, more, number=0):
        """(wait status, what it said), once it has ended.

        Signal `number` is sent again after a while, as by a user: one that
        comes just before a read of a pipe that is silent ends nothing until
        that read ends.
        """
        text, view = b'', memoryview(self.data)[900000:]
        os.set_blocking(write, False)
        again = time.monotonic() + 5
        while True:
            if number and time.monotonic() > again:
                os.kill(pid, number)
                again += 5
            if more and view:
                try:
                    view = view[os.write(write, view[:65536]):]
                except (BlockingIOError, BrokenPipeError):
                    pass
            if select.select([master], [], [], 0.02)[0]:
                try:
                    text += os.read(master, 4096)
                except OSError:
                    break
            if not view and write is not None:
                os.close(write)
                write, more = None, False
        if write is not None:
            os.close(write)
        return os.waitpid(pid, 0)[1], text.decode()

    def test_ctrl_q(self):
        pid, master, write = self.start('one')
        changed = termios.tcgetattr(master)
        self.assertEqual(changed[6][termios.VQUIT], b'\x11')
        os.write(master, b'\x11')
        status, text = self.end(pid, master, write, True)
        self.assertEqual(os.waitstatus_to_exitcode(status), 2, text)
        self.assertIn('tarsnap: Archive truncated\r\n', text)
        self.assertEqual(self.world.names(), ['one.part'])
        self.assertEqual(termios.tcgetattr(master), self.modes)
        self.world.ok('-d', '-f', 'one.part')

    def test_the_terminal_survives_a_death(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                pid, master, write = self.start('two')
                os.kill(pid, number)
                status, text = self.end(pid, master, write, False,
                                        number)
                self.assertEqual(os.waitstatus_to_exitcode(status), -number,
                                 text)
                self.assertEqual(termios.tcgetattr(master), self.modes)
        self.assertEqual(self.world.names(), [])


if __name__ == '__main__':
    unittest.main()
