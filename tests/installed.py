# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Programs that tests run and that come from PyPI or npm.

Each is installed when first asked for, into a folder .venv-NAME beside the
sources, and stays there; `make clean` removes it.  Modules that ask at once
wait for the one that came first.
"""

import contextlib
import fcntl
import os
import pwd
import shutil
import subprocess
import sys
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@contextlib.contextmanager
def folder(name):
    """(.venv-NAME, whether it has to be filled), for this process alone; it
    is not filled again once the block has ended well.
    """
    path = os.path.join(ROOT, '.venv-' + name)
    done = os.path.join(path, 'installed')
    os.makedirs(path, exist_ok=True)
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path, not os.path.exists(done)
        open(done, 'w').close()
    finally:
        os.close(lock)


def run(*argv):
    """A step of an installation; what it said is shown if it fails."""
    # A test that asks may have another home in place, for programs of ours.
    home = pwd.getpwuid(os.getuid()).pw_dir
    done = subprocess.run(argv, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=dict(os.environ, HOME=home))
    if done.returncode:
        raise RuntimeError('%s: %s' % (argv, done.stdout.decode(
            'utf-8', 'replace')))


def pip(name, *packages):
    """The directory of the programs of a virtual environment with these."""
    with folder(name) as (path, empty):
        if empty:
            run(sys.executable, '-m', 'venv', '--clear', path)
            # Compiling all of it takes a third of the time, and most is never
            # imported.
            run(os.path.join(path, 'bin', 'pip'), 'install', '-q',
                '--no-compile', '--disable-pip-version-check', *packages)
    return os.path.join(path, 'bin')


def npm(package):
    """The directory node_modules with a package, as NAME@VERSION."""
    with folder(package.partition('@')[0]) as (path, empty):
        if empty:
            if not shutil.which('npm'):
                raise unittest.SkipTest('no npm (Debian: npm)')
            run('npm', 'install', '--prefix', path, '--no-audit', '--no-fund',
                '--no-save', '--loglevel=error', package)
    return os.path.join(path, 'node_modules')


def emulate():
    """The program of emulate, a server that behaves as services' APIs do."""
    # Other versions of that name are other programs.
    return os.path.join(npm('emulate@0.11.2'), 'emulate', 'dist', 'index.js')
