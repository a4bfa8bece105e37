# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""How a server ends, is replaced by the next one, and is many processes: what
was begun is finished, no client is turned away, and limits hold for all
processes together.
"""

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import world
from rawclient import (
    COMPLETE, HERE, PROGRAM, Client, Closed, Embedded, Error, Host, R, W,
    Serve, Wire, block, put, server_directory, sha, tarsnapd)

# The program, with commits that take long and say that they have begun.
SLOW = '''\
import os, sys, time
sys.path.insert(0, %r)
import tarsnapd
real = tarsnapd.FileStore.put
def put(store, key, data):
    if key.startswith('log/'):
        open(os.environ['MARK'], 'w').close()
        time.sleep(1.5)
    return real(store, key, data)
tarsnapd.FileStore.put = put
sys.exit(tarsnapd.main())
''' % os.path.dirname(HERE)


def until(what, seconds=30):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def children(pid):
    with open('/proc/%d/task/%d/children' % (pid, pid)) as file:
        return [int(x) for x in file.read().split()]


class Ending(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)
        self.mark = os.path.join(self.path, 'tmp', 'mark')
        self.script = os.path.join(self.path, 'tmp', 'slow.py')
        with open(self.script, 'w') as file:
            file.write(SLOW)

    def serve(self, workers):
        """(process, port) of a server that commits slowly."""
        child = subprocess.Popen(
            [sys.executable, self.script, 'serve', self.path, '--listen',
             '127.0.0.1:0', '--workers', workers, '--journal', 'journal'],
            stderr=subprocess.PIPE, env=dict(os.environ, MARK=self.mark))
        self.addCleanup(child.stderr.close)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        return child, int(child.stderr.readline().rpartition(b':')[2])

    def test_a_commit_in_flight_is_finished_and_answered(self):
        for workers in ('1', '2'):
            with self.subTest(workers):
                child, port = self.serve(workers)
                client = Client(Wire(port))
                self.addCleanup(client.close)
                host = Host(client, user='joe', password=b'pw')
                client.auth(host.machine, host.keys, R, W)
                tid = os.urandom(16)
                host.begin(client, tid)
                record = put(client, block('a', workers))
                linked = [(sha(b'x'), record, bytes(16), COMPLETE)]
                answer = []
                commit = threading.Thread(target=lambda: answer.append(
                    host.commit(client, tid, puts=[record], linked=linked)))
                commit.start()
                until(lambda: os.path.exists(self.mark))
                child.send_signal(signal.SIGTERM)
                commit.join(30)
                self.assertEqual(len(answer), 1)
                with self.assertRaises(Closed):
                    client.call('STAT')
                self.assertEqual(child.wait(30), 0)
                with self.assertRaises(OSError):
                    socket.create_connection(('127.0.0.1', port))
                again = Client(Embedded(self.path))
                self.assertEqual(
                    again.auth(host.machine, host.keys, R)[:2],
                    (1, sha(answer[0])))
                again.close()
                os.unlink(self.mark)


class Manager:
    """What systemd is to a server: has its socket, is told when it is ready,
    and starts it with both.
    """

    def __init__(self, case, path, *options):
        self.case, self.path, self.options = case, path, options
        base = tempfile.mkdtemp(prefix='manager-')
        case.addCleanup(shutil.rmtree, base, True)
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.port = self.listener.getsockname()[1]
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(os.path.join(base, 'notify'))
        self.notify.settimeout(30)
        self.files, self.child = [], None
        case.addCleanup(self.close)

    def start(self):
        """Returns when the server says that it is ready."""
        fd = self.listener.fileno()
        self.files.append(tempfile.TemporaryFile())
        self.child = subprocess.Popen(
            ['/bin/sh', '-c', 'LISTEN_PID=$$ exec "$@"', 'sh',
             sys.executable, PROGRAM, 'serve', self.path, *self.options],
            stderr=self.files[-1], pass_fds=(3,),
            preexec_fn=lambda: os.dup2(fd, 3),
            env=dict(os.environ, LISTEN_FDS='1', NOTIFY_SOCKET=os.path.join(
                self.notify.getsockname())))
        self.case.assertEqual(self.notify.recv(100), b'READY=1')

    def stop(self):
        """Ends it as systemd does."""
        self.child.send_signal(signal.SIGTERM)
        self.case.assertEqual(self.notify.recv(100), b'STOPPING=1')
        self.case.assertEqual(self.child.wait(60), 0)

    def close(self):
        if self.child and self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        for thing in (self.listener, self.notify, *self.files):
            thing.close()


class Upgrade(unittest.TestCase):

    def backup(self, workers):
        """A backup that goes on while the server is replaced three times."""
        w = world.World(self, 'tls')
        w.server.kill(signal.SIGTERM)
        manager = Manager(self, w.server.path, '--workers', workers,
                          '--journal', 'journal')
        w.server.port = manager.port
        w.address = '127.0.0.1:%d' % manager.port
        manager.start()
        w.keygen()
        world.tree_noise(w.path('tree'), 1, 12)
        store = w.path('server')
        running = w.start('-c', '-f', 'one', '--maxbw-rate-up', '5000000',
                          '--noisy-warnings', '-C', w.root, 'tree')
        before = 0
        for _ in range(3):
            until(lambda: held(store) > before + world.MIB
                  or running.process.poll() is not None)
            if before and running.process.poll() is not None:
                break               # on a machine that is busy elsewhere
            manager.stop()
            # Nobody serves, and whoever comes now waits.
            waiting = socket.create_connection(('127.0.0.1', manager.port))
            before = held(store)
            manager.start()
            waiting.close()
        done = running.wait()
        self.assertEqual(done.code, 0, done)
        self.assertNotIn('refused', done.err)
        world.tree_equal(self, w.path('tree'),
                         os.path.join(w.extract('one'), 'tree'))
        manager.stop()
        # What was received before each end was not sent again.
        with open(os.path.join(store, 'journal')) as file:
            came = sum(int(line.rpartition(' in=')[2].split()[0])
                       for line in file if ' event=close ' in line)
        self.assertLess(came, 12 * world.MIB + 3 * 9 * world.MIB)
        self.assertLess(tree_size(os.path.join(store, 'store', 'seg')),
                        13 * world.MIB)

    def test_under_a_backup(self):
        self.backup('1')

    def test_under_a_backup_with_workers(self):
        self.backup('2')

    def test_the_real_manager(self):
        # Where there is systemd; it starts the server at the first client.
        program = shutil.which('systemd-socket-activate')
        if not program:
            self.skipTest('no systemd-socket-activate (Debian: systemd)')
        path = server_directory(self)
        with contextlib.closing(socket.create_server(
                ('127.0.0.1', 0))) as sock:
            port = sock.getsockname()[1]
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(
                [program, '-l', '127.0.0.1:%d' % port, sys.executable,
                 PROGRAM, 'serve', path], stderr=said,
                stdout=subprocess.DEVNULL)
            try:
                client = None
                while client is None:
                    with contextlib.suppress(OSError):
                        client = Client(Wire(port))
                host = Host(client, user='joe', password=b'pw')
                client.auth(host.machine, host.keys, R, W)
                host.backup(client, 'one')
                client.close()
            finally:
                child.terminate()
                self.assertEqual(child.wait(30), 0)

    def test_what_is_passed_and_is_no_socket(self):
        path = server_directory(self)
        pair = socket.socketpair()
        self.addCleanup(pair[0].close)
        self.addCleanup(pair[1].close)
        for count, fd, says in (
                ('2', pair[0].fileno(), '2 sockets were passed'),
                ('1', pair[0].fileno(), 'is no listening TCP socket'),
                ('1', 0, 'descriptor 3')):
            with open(os.devnull) as null, self.subTest(count + says):
                source = fd or null.fileno()
                done = subprocess.run(
                    ['/bin/sh', '-c', 'LISTEN_PID=$$ exec "$@"', 'sh',
                     sys.executable, PROGRAM, 'serve', path], pass_fds=(3,),
                    preexec_fn=lambda: os.dup2(source, 3),
                    env=dict(os.environ, LISTEN_FDS=count),
                    capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stderr.count('\n')),
                                 (1, 1), done)
                self.assertIn(says, done.stderr)


def held(path):
    """Bytes a server holds, committed or not."""
    return tree_size(os.path.join(path, 'spool')) + tree_size(
        os.path.join(path, 'store', 'seg'))


def tree_size(path):
    size = 0
    for top, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(top, name)).st_size
    return size


class Workers(unittest.TestCase):

    def setUp(self):
        self.path = server_directory(self)

    def serve(self):
        serve = Serve(self.path, '--workers', '3', '--journal', 'journal')
        self.addCleanup(serve.kill)
        until(lambda: len(children(serve.child.pid)) == 3)
        return serve

    def strangers(self, serve, before=()):
        """Many come without a name; those that are still let in then."""
        clients = list(before)
        for _ in range(20):
            with contextlib.suppress(Closed, OSError, struct.error):
                clients.append(serve.client())
                self.addCleanup(clients[-1].close)
        return list(filter(self.welcome, clients))

    def welcome(self, client):
        """True if the server has not hung up on it."""
        sock = client.link.sock
        sock.settimeout(0.05)
        try:
            return bool(sock.recv(1))
        except socket.timeout:
            return True
        except OSError:
            return False

    def test_connections_of_strangers_are_counted_over_all(self):
        serve = self.serve()
        most = tarsnapd.LIMIT['unauthenticated per address']
        clients = self.strangers(serve)
        self.assertEqual(len(clients), most)
        for client in clients[:3]:
            client.close()
        until(lambda: len(self.strangers(serve, clients[3:])) == most)
        # Also those of a worker that is killed are given back.
        victims = set(children(serve.child.pid))
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        until(lambda: len(victims | set(children(serve.child.pid))) == 6)
        until(lambda: len(self.strangers(serve)) == most)
        self.assertEqual(serve.stop()[0], 0)

    def test_open_transactions_are_counted_over_all(self):
        serve = self.serve()
        one = serve.client()
        host = Host(one, user='joe', password=b'pw')
        most = tarsnapd.LIMIT['transactions']
        clients = [one] + [serve.client() for _ in range(most)]
        for client in clients:
            self.addCleanup(client.close)
            client.auth(host.machine, host.keys, R, W)
        for client in clients[:most]:
            host.begin(client, os.urandom(16))
        with self.assertRaises(Error) as caught:
            host.begin(clients[most], os.urandom(16))
        self.assertEqual(caught.exception.code, 'BUSY')
        self.assertEqual(serve.stop()[0], 0)

    def test_all_of_them_serve_and_the_killed_are_missed_by_nobody(self):
        serve = self.serve()
        client = serve.client()
        host = Host(client, user='joe', password=b'pw')
        client.close()
        before = children(serve.child.pid)
        for n in range(9):
            client = serve.client()
            client.auth(host.machine, host.keys, R, W)
            host.backup(client, str(n))
            client.close()
            victim = children(serve.child.pid)[n % 3]
            os.kill(victim, signal.SIGKILL)
            until(lambda: len({*children(serve.child.pid), victim}) == 4)
        self.assertEqual(host.n, 9)
        self.assertFalse(set(before) & set(children(serve.child.pid)))
        self.assertEqual(serve.stop()[0], 0)
        with open(os.path.join(self.path, 'journal')) as file:
            text = file.read()
        self.assertEqual(text.count('ended by itself, status 9'), 9)

    def test_accepted_by_more_than_one(self):
        serve = Serve(self.path, '--workers', '3', '--journal', 'journal',
                      '--journal-level', 'requests')
        self.addCleanup(serve.kill)
        until(lambda: len(children(serve.child.pid)) == 3)

        def pids():
            serve.client().close()
            with open(os.path.join(self.path, 'journal')) as file:
                return {line.split()[1] for line in file
                        if ' event=connect ' in line}

        until(lambda: len(pids()) > 1)
        self.assertEqual(serve.stop()[0], 0)


if __name__ == '__main__':
    unittest.main()
