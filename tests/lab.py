# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A store, keys, hosts and trees in a temporary directory, for tests that
look inside.

The client runs in this process against an embedded store, so that a test can
replace one function of it, watch every frame that goes over (`Tap`), or end it
at one place as if the power went (`Lab.crash`).  What a tree holds is read by
`snapshot`, which shares no code with the client.
"""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import stat
import struct
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import tarsnap      # noqa: E402
import tarsnapd     # noqa: E402

R, W, D, N = 1, 2, 3, 4
ROOT = os.geteuid() == 0


class Result:
    """What one run of the client said."""

    def __init__(self, status, out, err):
        self.status = status
        self.out = out
        self.err = err

    def __repr__(self):
        return 'status %r\n%s%s' % (self.status, self.out, self.err)


def no_fsync():
    """No power is cut here: what is only for that costs most of the time."""
    real = tarsnap.database
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(os, 'fsync', lambda fd: None))
    stack.enter_context(mock.patch.object(
        tarsnap, 'database', lambda path, script, synchronous: real(
            path, script, 'OFF')))
    return stack


def no_signals():
    """A client that is run in the midst of another's run is in a thread,
    where no signal can be caught.
    """
    if threading.current_thread() is threading.main_thread():
        return contextlib.nullcontext()
    return mock.patch.object(signal, 'signal', lambda *_: None)


def run(argv, main=None):
    """Run the client (or another program's `main`) in this process; its
    Result.  A bug raises.
    """
    status = 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, \
            no_fsync(), no_signals():
        sys.stdout.flush()
        sys.stderr.flush()
        streams, copies = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(
            io.FileIO(fd, 'w', closefd=False), write_through=True)
            for fd in (1, 2))
        try:
            (main or tarsnap.main)(['tarsnap'] + [os.fsdecode(arg)
                                                  for arg in argv])
        except SystemExit as e:
            status = e.code or 0
        finally:
            sys.stdout, sys.stderr = streams
            for fd, copy in zip((1, 2), copies):
                os.dup2(copy, fd)
                os.close(copy)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode('utf-8', 'surrogateescape'))
    return Result(status, *texts)


def alone(seconds=30):
    """Wait until the threads that were joined have left the process.

    One on its way out may hold a lock of a library; a child forked then
    would wait for that lock for ever.
    """
    end = time.monotonic() + seconds
    while threading.active_count() == 1 and \
            len(os.listdir('/proc/self/task')) > 1:
        if time.monotonic() > end:
            raise AssertionError('a thread does not leave the process')
        time.sleep(0.001)


def register(store, roles=(R, W, D, N)):
    """A new machine's full key in the store directory `store`."""
    key = tarsnap.key_make(store, 'box')
    channel = tarsnap.Channel(store)
    try:
        statement = tarsnap.Statement(channel)
        key.pins = [statement.fingerprint()]
        channel.call(tarsnap.REGISTER1, bytes(32), b'\0')
        _, body = channel.call(
            tarsnap.REGISTER2, b'\3box', *[key.sign_pubs[r]
                                           for r in (R, W, D, N)], bytes(32))
        key.machine, key.store = struct.unpack('>Q16s', body)
    finally:
        channel.close()
    return key


class Lab:
    """A temporary directory with a store in it; goes with the test."""

    def __init__(self, test):
        self.root = os.path.realpath(tempfile.mkdtemp(prefix='lab-'))
        test.addCleanup(shutil.rmtree, self.root, True)
        self.test = test
        self.store = self.path('store')
        tarsnapd.server_create(self.store)
        self.key = register(self.store)
        self.tree = self.path('tree')
        os.mkdir(self.tree)
        self.copies = 0

    def path(self, *parts):
        return os.path.join(self.root, *parts)

    def host(self, name='a', roles=(R, W, D, N), key=None):
        """A machine of this lab's key, with a cache directory of its own."""
        return Host(self, name, (key or self.key).subset(set(roles)))

    def fresh(self, what='out'):
        """A path where there is nothing."""
        self.copies += 1
        return self.path('%s-%d' % (what, self.copies))

    def crash(self, host, patch, *args):
        """Run the client in a child that `patch` (a context manager) ends;
        its exit status.
        """
        alone()
        pid = os.fork()
        if not pid:
            status = 99
            try:
                with patch:
                    status = host.run(*args).status
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def save(self, name='saved'):
        """A copy of the store as it stands; swap() puts it in place."""
        shutil.rmtree(self.path(name), True)
        shutil.copytree(self.store, self.path(name), symlinks=True)

    def swap(self, name='saved'):
        """Exchange the store with the copy `name`."""
        for source, target in ((self.store, self.path('swap')),
                               (self.path(name), self.store),
                               (self.path('swap'), self.path(name))):
            os.rename(source, target)

    def live(self):
        """name -> (class, stored length) of all blocks live on the server."""
        server = tarsnapd.Server(self.store)
        try:
            server.run(tarsnapd.catch_up(self.key.machine))
            lines = server.perform(('index', self.key.machine, 'dump'))
        finally:
            server.close()
        rows = [line.split() for line in lines]
        return {bytes.fromhex(row[1]): (bytes.fromhex(row[5]), int(row[4]))
                for row in rows if row[0] == 'blocks'}


class Host:
    """A key file and a cache directory."""

    def __init__(self, lab, name, key):
        self.lab = lab
        self.key = key
        self.keyfile = lab.path(name + '.key')
        self.cache = lab.path(name + '.cache')
        tarsnap.key_write(tarsnap.key_create(self.keyfile), key)

    def run(self, *args, cache=True):
        """Run the client with this key, and the cache directory if asked."""
        where = ['--cachedir', self.cache] if cache else []
        return run(['--no-default-config', '--keyfile', self.keyfile, *where,
                    *args])

    def good(self, *args, status=0, **options):
        """run(), which must end with `status` (and silent if that is 0)."""
        result = self.run(*args, **options)
        self.lab.test.assertEqual(result.status, status, result)
        # A file is never touched again in the tick in which it was read.
        time.sleep(0.02)
        return result

    def create(self, name, *args, tree=None, **options):
        """Store the whole tree, or the operands given."""
        args = args or ('.',)
        flags = [arg for arg in args if arg.startswith('--')]
        operands = [arg for arg in args if not arg.startswith('--')]
        return self.good('-c', '-f', name, *flags, '-C',
                         tree or self.lab.tree, *(operands or ['.']),
                         **options)

    def extract(self, name, *args, **options):
        """Restore without a cache directory; where to."""
        target = self.lab.fresh()
        os.mkdir(target)
        self.good('-x', '-f', name, '-C', target, *args, cache=False,
                  **options)
        return target

    def check(self, name, model, *args):
        """The archive holds exactly what `model`, a snapshot, says."""
        target = self.extract(name, *args)
        found = snapshot(target)
        found[b''] = model[b'']         # of no operand but '.'
        self.lab.test.assertEqual(difference(model, found), [])
        shutil.rmtree(target)

    def seq(self):
        return os.readlink(os.path.join(self.cache, 'cseq'))

    def lose(self, *files):
        """Remove files of the cache directory."""
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.cache, file))

    def database(self, file='directory'):
        import sqlite3
        return contextlib.closing(sqlite3.connect(
            os.path.join(self.cache, file)))

    def meta(self):
        """(n, H_n, the nine totals) of the cache directory."""
        with self.database() as db:
            meta = dict(db.execute('SELECT key, value FROM meta'))
        return (struct.unpack('>Q', meta['n'])[0], meta['head'],
                struct.unpack('>9Q', meta['totals']))


class LabTest(unittest.TestCase):
    """One lab and one host for each test."""

    def setUp(self):
        self.lab = Lab(self)
        self.host = self.lab.host()
        # Trees are made and stored at once; what two seconds are for has a
        # test of its own.
        patch = mock.patch.object(tarsnap, 'RACY', 0)
        patch.start()
        self.addCleanup(patch.stop)

    def write(self, name, data=b'', mtime=None):
        """Make or rewrite a file of the tree; its path."""
        path = os.path.join(self.lab.tree, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(data)
        if mtime is not None:
            os.utime(path, ns=(mtime, mtime))
        return path

    def store(self, name, *args, status=0):
        """Store the tree, restore it, and compare."""
        model = snapshot(self.lab.tree)
        result = self.host.create(name, *args, status=status)
        if not status:
            self.host.check(name, model)
        return result


def fine():
    """Small pages, chunks and lists, so that a small tree has many."""
    def page_ends(writer, member):
        return hashlib.sha256(member).digest()[0] < 48

    def size(small):
        return mock.patch.multiple(tarsnap, **small)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(tarsnap.Writer, 'page_ends',
                                          page_ends))
    stack.enter_context(size({
        'SHARED_BELOW': 2048, 'CHUNK_MIN': 512, 'CHUNK_MAX': 4096,
        'MOST_EXTENTS': 4, 'LIST_MOST': 5, 'READ': 8192, 'JOB': 10000}))
    return stack


# Trees.

def snapshot(top):
    """What is below `top`: path -> everything an archive must keep."""
    top, rows, inodes = os.fsencode(top), {}, {}
    stack = [b'']
    while stack:
        path = stack.pop()
        full = os.path.join(top, path)
        st = os.lstat(full)
        kind = stat.S_IFMT(st.st_mode)
        row = {'type': kind, 'mode': stat.S_IMODE(st.st_mode),
               'owner': (st.st_uid, st.st_gid), 'mtime': st.st_mtime_ns}
        if kind == stat.S_IFDIR:
            stack += [os.path.join(path, name) for name in os.listdir(full)]
        else:
            inodes.setdefault((st.st_dev, st.st_ino), []).append(path)
            row['inode'] = (st.st_dev, st.st_ino)
        if kind == stat.S_IFREG:
            with open(full, 'rb') as file:
                data = file.read()
            row['content'] = (len(data), hashlib.sha256(data).hexdigest())
        elif kind == stat.S_IFLNK:
            row['target'] = os.readlink(full)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            row['device'] = st.st_rdev
        if hasattr(os, 'listxattr'):
            row['xattrs'] = {
                name: os.getxattr(full, name, follow_symlinks=False)
                for name in os.listxattr(full, follow_symlinks=False)}
        rows[path] = row
    for row in rows.values():
        row['names'] = sorted(inodes[row.pop('inode')]) \
            if 'inode' in row else []
    return rows


def difference(wanted, found):
    """Lines that say how two snapshots differ."""
    lines = []
    for path in sorted(set(wanted) | set(found)):
        a, b = wanted.get(path), found.get(path)
        if a is None or b is None:
            lines.append('%r: %s' % (path, 'too much' if a is None
                                     else 'missing'))
        elif a != b:
            lines.append('%r: %s' % (path, {
                key: (a.get(key), b.get(key)) for key in set(a) | set(b)
                if a.get(key) != b.get(key)}))
    return lines


# Frames.

class Tap:
    """Stands between the client and an embedded session.

    `lie(kind, rid, body, answers)` may give other answers to a request;
    `statement` may be replaced before the client sees it.
    """

    def __init__(self, local, log, lie=None, statement=None):
        self.local = local
        self.log = log
        self.lie = lie
        self.statement = (statement or (lambda body: body))(local.statement)

    def receive(self, kind, rid, body):
        self.log.append((kind, body))
        answers = list(self.local.receive(kind, rid, body))
        if self.lie:
            answers = self.lie(kind, rid, body, answers)
            if isinstance(answers, (list, tuple)):
                answers = list(answers)
        return answers

    def idle(self):
        answers = self.local.idle()
        if self.lie:
            answers = list(self.lie(0, 0, b'', answers))
        return answers

    def close(self):
        self.local.close()


class Log(list):
    """The requests a client sent, as (type, body)."""

    def puts(self, cls=None):
        """[(name, class, stored length)] of blocks sent."""
        return [(body[:32], body[32:33], len(body) - 33)
                for kind, body in self
                if kind == tarsnap.PUT and cls in (None, body[32:33])]

    def kinds(self):
        return [kind for kind, _ in self]


@contextlib.contextmanager
def tapped(lie=None, statement=None):
    """Watch (and bend) all sessions in the block; gives a Log."""
    log, real = Log(), tarsnapd.open_local

    def open_local(path, *args, **options):
        return Tap(real(path, *args, **options), log, lie, statement)

    with mock.patch.object(tarsnapd, 'open_local', open_local):
        yield log
