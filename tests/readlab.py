# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""One store with archives of a small tree of every kind, for the modules
that test what reads; made once for a module, never changed by a test.
"""

import os
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import lab
import tarsnap
import world

OLD = 1566844246                # 2019-08-26 18:30:46 UTC
NAMES = [b'caf\xc3\xa9', b'bad\xff', b'new\nline', b'tab\tback\\slash']


class Module:
    """What Lab wants of a test, for a whole module."""

    addCleanup = staticmethod(unittest.addModuleCleanup)
    assertEqual = unittest.TestCase().assertEqual


def tree_make(top):
    """Files, directories, links, fifos and odd names below `top`."""
    top = os.fsencode(top)
    for path, data, mode in (
            (b'docs/a', b'alpha\n', 0o644), (b'docs/b', b'x' * 26628, 0o600),
            (b'docs/deep/c', b'gamma\n', 0o755), (b'empty', b'', 0o444),
            (b'set', b'setuid', 0o4755)):
        file_make(os.path.join(top, path), data, mode)
    for name in NAMES:
        file_make(os.path.join(top, b'names', name), name, 0o640)
    os.link(os.path.join(top, b'docs/a'), os.path.join(top, b'docs/hard'))
    os.symlink(b'docs/b', os.path.join(top, b'soft'))
    os.mkfifo(os.path.join(top, b'pipe'))
    os.chmod(os.path.join(top, b'pipe'), 0o622)
    os.mkdir(os.path.join(top, b'sticky'))
    os.chmod(os.path.join(top, b'sticky'), 0o1777)
    for above, below, files in os.walk(top, topdown=False):
        for name in below + files:
            times_set(os.path.join(above, name))
    times_set(top)


def file_make(path, data, mode):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
        file.write(data)
    os.chmod(path, mode)


def times_set(path, seconds=OLD):
    os.utime(path, ns=(seconds * 10 ** 9,) * 2, follow_symlinks=False)


def shared(*archives):
    """(Lab, Host) with the tree stored once under each of `archives`."""
    with mock.patch.object(tarsnap, 'RACY', 0):
        laboratory = lab.Lab(Module)
        host = laboratory.host()
        tree_make(laboratory.tree)
        for number, name in enumerate(archives):
            host.create(name, '--creationtime=%d' % (OLD + number))
    return laboratory, host


class Program:
    """The client with a host's key, and no cache directory."""

    def __init__(self, host):
        self.host = host

    def argv(self, *args):
        """The command line of the real program."""
        return [sys.executable, world.Programs.path('tarsnap'),
                '--no-default-config', '--keyfile', self.host.keyfile, *args]

    def run(self, *args, zone='UTC'):
        """(status, stdout, stderr), the streams as bytes; in this process,
        which is ten times as fast as the real program.
        """
        with mock.patch.dict(os.environ, {'TZ': zone}):
            time.tzset()
            done = self.host.run(*args, cache=False)
        time.tzset()
        return (done.status, *(text.encode('utf-8', 'surrogateescape')
                               for text in (done.out, done.err)))

    def real(self, *args, env=None, **options):
        """The same of the real program, as its users run it."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            status = subprocess.run(
                self.argv(*args), stdout=out, stderr=err, check=False,
                env=dict(os.environ, TZ='UTC', **(env or {})),
                stdin=subprocess.DEVNULL, **options).returncode
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
        return (status, *texts)
