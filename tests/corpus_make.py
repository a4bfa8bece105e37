#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Writes tests/corpus/VERSION: what this version of the programs leaves on
disks, for later ones to read (test_corpus.py).

    server.tar.xz   a server directory: archives of small and of usual pages,
                    one cut short, one that was deleted and can come back,
                    segments the cleaner has made, an account, a canary
    cache.tar.xz    the cache directory of the host that wrote it
    keys.tar.xz     its key in every subset of roles, each also with a
                    passphrase
    expected.json   what must be found in them

Run it once for each release that changes a format, before that is released;
what earlier versions wrote is never written again.
"""

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import unittest
from unittest import mock

import lab
import tarsnap
import tarsnapd

HERE = os.path.dirname(os.path.abspath(__file__))
CORPUS = os.path.join(HERE, 'corpus')
ROLES = {'r': '-r', 'w': '-w', 'd': '--prune', 'n': '--nuke'}
PASSPHRASE, PASSWORD, USER = 'corpus phrase', b'corpus word', 'joe@example.org'
PLACE = '/srv/tarsnap'          # where the key file says its server is


def operator(*args):
    """Run a server command in this process; its output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert tarsnapd.main(list(args)) == 0, args
    return out.getvalue()


def tree_make(path):
    """A tree of some 25 kB that has one of everything."""
    def write(name, data, mtime=1700000000123456789):
        full = os.path.join(path, name)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, 'wb') as file:
            file.write(data)
        os.utime(full, ns=(mtime, mtime))
        return full

    for number in range(12):
        write('small/%d/f%02d' % (number % 3, number), b'%d ' % number * 90)
    write('names/with blank \u00fc\n', b'odd')
    write('large', b''.join(b'%06d is a line of a file that deflates well\n'
                            % (i // 8) for i in range(15000)))
    write('old', b'before 1970', -987654321)
    sparse = write('sparse', b'begin')
    with open(sparse, 'r+b') as file:
        file.truncate(10 ** 7)
        file.seek(5 * 10 ** 6)
        file.write(b'middle')
    os.link(os.path.join(path, 'large'), os.path.join(path, 'names', 'hard'))
    os.symlink('../large', os.path.join(path, 'names', 'symbolic'))
    os.mkfifo(os.path.join(path, 'names', 'fifo'), 0o600)
    os.makedirs(os.path.join(path, 'empty', 'empty'))
    os.chmod(os.path.join(path, 'empty'), 0o1750)
    with contextlib.suppress(OSError):
        os.setxattr(os.path.join(path, 'old'), 'user.corpus', b'value')


def portable(snapshot):
    """A snapshot as JSON has it; owners are whoever makes the corpus."""
    rows = {}
    for path, row in snapshot.items():
        row = {name: value for name, value in row.items()
               if name not in ('owner', 'names')}
        row['names'] = [name.decode('latin-1')
                        for name in snapshot[path]['names']]
        for name in ('target', ):
            if name in row:
                row[name] = row[name].decode('latin-1')
        row['content'] = list(row.get('content', ()))
        row['xattrs'] = {name: value.hex() for name, value
                         in row.get('xattrs', {}).items()}
        if path == b'':
            row['mtime'] = 0        # extracting into it changes that
        rows[path.decode('latin-1')] = row
    return rows


class Maker:
    """Writes one corpus into `target`, working in a Lab."""

    def __init__(self, case, target):
        self.case = case
        self.target = target
        self.lab = lab.Lab(case)
        os.rename(self.lab.store, self.lab.path('srv'))
        self.lab.store = self.lab.path('srv')
        self.lab.key.server = PLACE
        self.host = self.lab.host('full')
        self.machine = '%016x' % self.lab.key.machine
        self.expected = {'archives': {}}

    def run(self, *args):
        """The client, by paths that mean nothing elsewhere."""
        result = self.host.run('--server', self.lab.store, *args)
        assert result.status == 0, result
        return result

    def store(self, name, *args):
        self.run('-c', '-f', name, *args, '-C', 'tree', '.')
        self.expected['archives'][name] = portable(
            lab.snapshot(self.lab.tree))

    def archives(self):
        """Write the archives, and take some back."""
        tree_make(self.lab.tree)
        operator('machine', self.lab.store, 'delete-delay', self.machine,
                 '3650')
        with lab.fine():
            self.store('first')
            self.store('gone')
            os.unlink(os.path.join(self.lab.tree, 'small', '1', 'f04'))
            os.chmod(os.path.join(self.lab.tree, 'large'), 0o640)
            self.store('second')
            self.run('-d', '-f', 'gone')
        self.store('usual')
        self.run('-c', '-f', 'cut', '--maxbw', '6000', '--exclude', './large',
                 '-C', 'tree', '.')
        self.run('-d', '-f', 'first')
        self.run('--undelete', '-f', 'first')

    def server(self):
        """What only the operator does."""
        tarsnapd.certificate_renew(self.lab.store)
        server = tarsnapd.Server(self.lab.store)
        try:
            server.run(tarsnapd.account_create(USER, PASSWORD))
            tarsnapd.canary_make(server, os.path.join(
                self.lab.store, 'canary.key'))
            policy = tarsnapd.Policy()
            policy.used, policy.gain, policy.merge = 100, 1, 2
            server.run(tarsnapd.clean(self.lab.key.machine, policy,
                                      tarsnapd.Cleaned()))
        finally:
            server.close()
        operator('user', self.lab.store, 'move-machine', self.machine, USER)
        operator('scrub', self.lab.store)
        self.expected['fingerprint'] = operator(
            'fingerprint', self.lab.store).strip()

    def figures(self):
        """What programs say of it."""
        self.run('--print-stats')
        self.expected.update(
            machine=self.machine,
            stats=self.run('--print-stats').out,
            list=self.run('--list-archives', '-v').out,
            dump=operator('index-dump', self.lab.store, self.machine))

    def keys(self):
        """Key files by the program that splits them."""
        os.mkdir(self.lab.path('keys'))
        program = os.path.join(os.path.dirname(HERE), 'keygen.py')
        for count in range(1, 5):
            for roles in itertools.combinations('rwdn', count):
                for more in ([], ['--passphrased', '--passphrase-mem', '1M',
                                  '--passphrase-time', '0.05',
                                  '--new-passphrase', 'env:PHRASE']):
                    name = ''.join(roles) + ('.phrase' if more else '')
                    subprocess.run(
                        [sys.executable, program, 'keymgmt', '--outkeyfile',
                         self.lab.path('keys', name), *[ROLES[x] for x in
                                                        roles], *more,
                         self.host.keyfile], check=True,
                        env=dict(os.environ, PHRASE=PASSPHRASE))

    def pack(self, name, source):
        """DIRECTORY of the lab as a compressed tar file."""
        def plain(member):
            member.uid = member.gid = 0
            member.uname = member.gname = ''
            return member

        with tarfile.open(os.path.join(self.target, name + '.tar.xz'),
                          'w:xz', format=tarfile.PAX_FORMAT) as file:
            file.add(source, name, filter=plain)

    def make(self):
        os.mkdir(self.target)
        os.chdir(self.lab.root)
        uname = os.uname()
        with mock.patch.object(tarsnap.os, 'uname', lambda: type(uname)((
                uname[0], 'box', *uname[2:]))):
            self.archives()
            self.server()
            self.figures()
        self.keys()
        self.pack('server', self.lab.store)
        self.pack('cache', self.host.cache)
        self.pack('keys', self.lab.path('keys'))
        with open(os.path.join(self.target, 'expected.json'), 'w') as file:
            json.dump(self.expected, file, indent=0, sort_keys=True)
            file.write('\n')


def main():
    case = unittest.TestCase()
    try:
        Maker(case, os.path.join(CORPUS, sys.argv[1] if sys.argv[1:]
                                 else tarsnapd.VERSION)).make()
    finally:
        os.chdir('/')
        case.doCleanups()


if __name__ == '__main__':
    main()
