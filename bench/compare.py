#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Times the main job beside restic and borg, on one tree, in turns.

usage: bench/compare.py TREE [RUNS]

Each work (first backup, unchanged backup, list, restore, delete) is done by
every program in turn before the next work begins, all of it RUNS times over
with new repositories.  The tree is read once before, so that the page cache is
warm for all.  Peers run with their defaults: restic and borg on a local
repository with encryption; ours on a directory ("embedded") and over TLS on
loopback ("tls").  Prints medians with the least and the most, CPU seconds of
the program itself, its peak memory, bytes stored, and the ratio to the faster
peer.  What is not installed is left out and said.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORKS = ('first', 'unchanged', 'list', 'restore', 'delete')
DIRS = ('C', 'store', 'restic', 'borg', 'out', 'NC', 'NS', 'cache')


def script(name, *words):
    return [sys.executable, os.path.join(HERE, name), *words]


class Bench:
    """One work directory, its repositories and what was measured."""

    def __init__(self, tree):
        self.tree = tree
        self.work = tempfile.mkdtemp(prefix='tarsnap-bench-')
        self.env = dict(os.environ, RESTIC_PASSWORD='x', BORG_PASSPHRASE='x',
                        HOME=self.work,
                        RESTIC_CACHE_DIR=self.path('cache'))
        self.figures = {}           # (work, program) -> [(wall, cpu, peak)]
        self.stored = {}            # program -> bytes
        self.server = None          # Popen of tarsnapd

    def path(self, name):
        return os.path.join(self.work, name)

    def quiet(self, command, **options):
        """Run something that is not measured; its standard output."""
        return subprocess.run(command, env=self.env, check=True,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, **options).stdout

    def measure(self, work, program, command):
        """Run and note wall seconds, CPU seconds, peak memory in bytes."""
        if work == 'restore':
            shutil.rmtree(self.path('out'), ignore_errors=True)
            os.mkdir(self.path('out'))
        os.sync()
        start = time.monotonic()
        child = subprocess.Popen(
            command, env=self.env, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.path('out') if work == 'restore' else self.work)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            sys.exit('%s %s: exit %d: %s' % (program, work, child.returncode,
                                             ' '.join(command)))
        self.figures.setdefault((work, program), []).append((
            time.monotonic() - start, usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss * 1024))

    def prepare(self):
        """New repositories, keys and a server; commands by program."""
        for name in DIRS:
            shutil.rmtree(self.path(name), ignore_errors=True)
        for name in ('K', 'NK'):
            if os.path.exists(self.path(name)):
                os.unlink(self.path(name))
        self.quiet(script('keygen.py', '--keyfile', self.path('K'),
                          '--machine', 'bench', '--server',
                          self.path('store')))
        pin = self.quiet(script('tarsnapd.py', 'init', self.path('NS'),
                                '--listen', '127.0.0.1:0')).decode().strip()
        self.quiet(script('tarsnapd.py', 'user', self.path('NS'), 'add',
                          'bench'), input=b'password\n')
        self.server = subprocess.Popen(
            script('tarsnapd.py', 'serve', self.path('NS')),
            stderr=subprocess.PIPE)
        address = self.server.stderr.readline().decode().split()[-1]
        self.quiet(script('keygen.py', '--keyfile', self.path('NK'),
                          '--machine', 'bench', '--server', address,
                          '--user', 'bench', '--fingerprint', pin),
                   input=b'password\n')
        programs = {'embedded': self.ours('K', 'C'),
                    'tls': self.ours('NK', 'NC')}
        if shutil.which('restic'):
            self.quiet(['restic', 'init', '-r', self.path('restic')])
            programs['restic'] = self.restic()
        if shutil.which('borg'):
            self.quiet(['borg', 'init', '-e', 'repokey', self.path('borg')])
            programs['borg'] = self.borg()
        return programs

    def ours(self, key, cache):
        base = script('tarsnap.py', '--no-default-config', '--keyfile',
                      self.path(key), '--cachedir', self.path(cache))
        return {'first': base + ['-c', '-f', 'a', '-C', self.tree, '.'],
                'unchanged': base + ['-c', '-f', 'b', '-C', self.tree, '.'],
                'list': base + ['-t', '-f', 'a'],
                'restore': base + ['-x', '-f', 'a', '-C', self.path('out')],
                'delete': base + ['-d', '-f', 'a']}

    def restic(self):
        base = ['restic', '-q', '-r', self.path('restic')]
        return {'first': base + ['backup', self.tree],
                'unchanged': base + ['backup', self.tree],
                'list': base + ['ls', 'latest'],
                'restore': base + ['restore', 'latest', '-t',
                                   self.path('out')],
                'delete': base + ['forget', 'latest', '--prune']}

    def borg(self):
        repository = self.path('borg')
        return {'first': ['borg', 'create', repository + '::a', self.tree],
                'unchanged': ['borg', 'create', repository + '::b',
                              self.tree],
                'list': ['borg', 'list', repository + '::a'],
                'restore': ['borg', 'extract', repository + '::a'],
                'delete': ['borg', 'delete', repository + '::a']}

    def run(self):
        """All works once, by all programs in turn."""
        programs = self.prepare()
        try:
            for work in WORKS:
                for program, commands in programs.items():
                    self.measure(work, program, commands[work])
                if work == 'first':
                    self.sizes(programs)
        finally:
            self.server.terminate()
            self.server.communicate()

    def sizes(self, programs):
        """Bytes in each repository, the sum of st_size."""
        for program, name in (('embedded', 'store'), ('tls', 'NS'),
                              ('restic', 'restic'), ('borg', 'borg')):
            if program in programs:
                self.stored[program] = sum(
                    os.lstat(os.path.join(folder, file)).st_size
                    for folder, _, files in os.walk(self.path(name))
                    for file in files)

    def report(self):
        """The table, medians and ratios to the faster peer."""
        print('%-10s %-9s %22s %8s %8s %8s' % (
            'work', 'program', 'seconds (least-most)', 'CPU s', 'peak MB',
            'ratio'))
        for work in WORKS:
            rows = {program: values for (found, program), values in
                    self.figures.items() if found == work}
            medians = {program: statistics.median(row[0] for row in values)
                       for program, values in rows.items()}
            peers = [medians[name] for name in ('restic', 'borg')
                     if name in medians]
            for program, values in rows.items():
                print('%-10s %-9s %9.2f (%.2f-%.2f) %8.2f %8d %8s' % (
                    work, program, medians[program],
                    min(row[0] for row in values),
                    max(row[0] for row in values),
                    statistics.median(row[1] for row in values),
                    max(row[2] for row in values) // 10 ** 6,
                    '%.2f' % (medians[program] / min(peers))
                    if peers else '-'))
        for program, size in self.stored.items():
            print('stored     %-9s %d bytes' % (program, size))


def versions():
    """What is compared, and on what."""
    print('%d processors, Python %s' % (os.cpu_count(),
                                        sys.version.split()[0]))
    for name in ('restic', 'borg'):
        if shutil.which(name):
            word = 'version' if name == 'restic' else '--version'
            out = subprocess.run([name, word], stdout=subprocess.PIPE)
            print(out.stdout.decode().strip())
        else:
            print('%s: not installed, left out' % name)


def warm(path):
    """Read a file into the page cache; its length.  In small pieces, so
    that this process stays small: a child's peak memory begins with ours.
    """
    size = 0
    with open(path, 'rb', buffering=0) as file:
        while True:
            data = file.read(65536)
            if not data:
                return size
            size += len(data)


def main():
    if len(sys.argv) not in (2, 3) or not os.path.isdir(sys.argv[1]):
        sys.exit(__doc__.split('\n\n')[1])
    bench = Bench(os.path.abspath(sys.argv[1]))
    try:
        versions()
        files = size = 0
        for folder, _, names in os.walk(bench.tree):
            for name in names:
                path = os.path.join(folder, name)
                files += 1
                if os.path.isfile(path) and not os.path.islink(path):
                    size += warm(path)
        print('%d files, %d bytes' % (files, size))
        for _ in range(int(sys.argv[2]) if len(sys.argv) == 3 else 5):
            bench.run()
        bench.report()
    finally:
        shutil.rmtree(bench.work, ignore_errors=True)


if __name__ == '__main__':
    main()
