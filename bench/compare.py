#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Times the main job beside restic and borg, on the same trees, in turns.

Each work is done by every program before the next work begins, all of it RUNS
times over with new repositories, another program being first each time.  The
tree is read before each backup, so that the page cache is warm for all, and
sync(1) runs before each measurement.  All programs encrypt, and run with their
defaults.

On this machine: `embedded`, ours in a directory; `restic` and `borg` on a
local repository.  Over the loopback, as over a network: `tls`, ours at its
server; `restic-rest`, restic over TLS at `rclone serve restic`; `borg-serve`,
borg at `borg serve` over a pipe.  Ratios are to the faster peer of the same
half.  What is not installed is left out and said.

Works: start (--version), first, unchanged, shifted (of a tree `file`: one
byte more in front), list, restore, delete (one of two near-equal archives; as
the programs do it: restic also frees the space, borg leaves that to `borg
compact`).  CPU and memory are those of the program and its children; a
server's stand apart, except that borg's is a child.

The floor is what one thread of Python needs to read the tree (first), look at
its inodes (unchanged), make its files (restore).  `packing` is what a process
for each processor needs to read what is different in the tree and to hash,
deflate and encrypt it with the libraries that Python has, and no more: nothing
that deflates with these can be faster.  `isal` is ours again, with the deflate
of ISA-L (isal from PyPI, level 3) in the place of zlib's: what is left where
deflate costs little.
"""

import collections
import os
import shutil
import socket
import subprocess
import sys
import time

import common
import trees

sys.path.insert(0, os.path.join(common.HERE, 'tests'))
import installed    # noqa: E402

FLOOR = os.path.join(common.HERE, 'bench', 'floor.py')
ISAL = '''\
import sys
sys.path[:1] = [%r, %r]
from isal import isal_zlib
sys.modules['zlib'] = isal_zlib
import tarsnap
tarsnap.Sealer.__init__.__defaults__ = (3, True)
sys.exit(tarsnap.main())
'''
WORKS = ('start', 'first', 'unchanged', 'shifted', 'list', 'restore',
         'delete')
NEEDS = {'unchanged': ['first'], 'shifted': ['first'], 'list': ['first'],
         'restore': ['first'], 'delete': ['first', 'unchanged']}
REPOSITORIES = ('store', 'isal', 'server', 'restic', 'borg', 'rest',
                'borg-served')
CACHES = ('embedded-cache', 'isal-cache', 'tls-cache', '.cache', '.config',
          '.local')

# A program ready to run: a row of `half` of the table; `commands`, work ->
# command line; `store`, where its bytes are; `server`, a process or None.
Program = collections.namedtuple('Program', 'half commands store server',
                                 defaults=('', None))

##############################################################################
# The programs.  Each function makes a new repository and returns a Program,
# or None if something is not installed.
##############################################################################


def ours(place, name, tree, shifted):
    base = place.client(name + '-key', name + '-cache')
    create = [base + ['-c', '-f', archive, '-C', which, '.']
              for archive, which in (('a', tree), ('b', tree),
                                     ('s', shifted))]
    return dict(
        start=place.script('tarsnap', '--version'), first=create[0],
        unchanged=create[1], shifted=create[2],
        list=base + ['-t', '-f', 'a'],
        restore=base + ['-x', '-f', 'a', '-C', place.path('out')],
        delete=base + ['-d', '-f', 'a'])


def embedded(place, tree, shifted):
    place.key('embedded-key', place.path('store'))
    return Program('local', ours(place, 'embedded', tree, shifted),
                   place.path('store'))


def tls(place, tree, shifted):
    child, address, pin = place.serve('server')
    place.key('tls-key', address, pin)
    return Program('network', ours(place, 'tls', tree, shifted),
                   place.path('server'), child.pid)


def restic_at(place, base, tree, shifted):
    place.quiet(base + ['init'])
    return dict(
        start=['restic', 'version'], first=base + ['backup', tree],
        unchanged=base + ['backup', tree],
        shifted=base + ['backup', shifted], list=base + ['ls', 'latest'],
        restore=base + ['restore', 'latest', '-t', place.path('out')],
        delete=base + ['forget', 'latest', '--prune'])


def restic(place, tree, shifted):
    if not shutil.which('restic'):
        return None
    base = ['restic', '-q', '-r', place.path('restic')]
    return Program('local', restic_at(place, base, tree, shifted),
                   place.path('restic'))


def restic_rest(place, tree, shifted):
    if not all(map(shutil.which, ('restic', 'rclone', 'openssl'))):
        return None
    key, cert = place.path('rest.key'), place.path('rest.pem')
    place.quiet(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                 'ec_paramgen_curve:P-256', '-nodes', '-days', '2', '-subj',
                 '/CN=rest', '-addext', 'subjectAltName=IP:127.0.0.1',
                 '-keyout', key, '-out', cert])
    port = common.free_port()
    os.mkdir(place.path('rest'))
    child = place.start(
        ['rclone', 'serve', 'restic', '--addr', '127.0.0.1:%d' % port,
         '--key', key, '--cert', cert, place.path('rest')],
        stderr=subprocess.DEVNULL)
    await_port(port)
    base = ['restic', '-q', '--cacert', cert, '-r',
            'rest:https://127.0.0.1:%d/' % port]
    return Program('network', restic_at(place, base, tree, shifted),
                   place.path('rest'), child.pid)


def await_port(port):
    """Until somebody listens there."""
    for _ in range(200):
        try:
            return socket.create_connection(('127.0.0.1', port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
    sys.exit('nothing listens on port %d' % port)


def borg_at(place, repository, tree, shifted):
    place.quiet(['borg', 'init', '-e', 'repokey', repository])
    create = [['borg', 'create', '%s::%s' % (repository, archive), which]
              for archive, which in (('a', tree), ('b', tree),
                                     ('s', shifted))]
    return dict(
        start=['borg', '--version'], first=create[0], unchanged=create[1],
        shifted=create[2], list=['borg', 'list', repository + '::a'],
        restore=['borg', 'extract', repository + '::a'],
        delete=['borg', 'delete', repository + '::a'])


def borg(place, tree, shifted):
    if not shutil.which('borg'):
        return None
    return Program('local', borg_at(place, place.path('borg'), tree, shifted),
                   place.path('borg'))


def borg_serve(place, tree, shifted):
    if not shutil.which('borg'):
        return None
    # In the place of ssh: forgets the host, runs the rest here.
    with open(place.path('rsh'), 'w') as file:
        file.write('#!/bin/sh\nshift\nexec "$@"\n')
    os.chmod(place.path('rsh'), 0o755)
    place.env['BORG_RSH'] = place.path('rsh')
    path = place.path('borg-served')
    return Program('network', borg_at(place, 'ssh://here' + path, tree,
                                      shifted), path)


def floor(place, tree, _shifted):
    base = [sys.executable, FLOOR]
    return Program('local', dict(
        first=base + ['read', tree], unchanged=base + ['walk', tree],
        restore=base + ['create', tree, place.path('out')]))


def packing(place, tree, _shifted):
    # The list is made once for all rounds; it takes as long as a backup.
    if not os.path.exists(place.path('different')):
        place.quiet([sys.executable, FLOOR, 'list', tree,
                     place.path('different')])
    return Program('local', dict(
        first=[sys.executable, FLOOR, 'pack', place.path('different')]))


def isal(place, tree, shifted):
    try:
        programs = installed.pip('isal', 'isal == 1.9.1')
    except RuntimeError:            # no PyPI
        return None
    folder = os.path.join(
        os.path.dirname(programs), 'lib',
        'python%d.%d' % sys.version_info[:2], 'site-packages')
    with open(place.path('run-isal.py'), 'w') as file:
        file.write(ISAL % (place.path('lib'), folder))
    place.key('isal-key', place.path('isal'))
    first = ours(place, 'isal', tree, shifted)['first']
    first[1] = place.path('run-isal.py')
    return Program('local', dict(first=first), place.path('isal'))


PROGRAMS = {'embedded': embedded, 'restic': restic, 'borg': borg,
            'isal': isal, 'floor': floor, 'packing': packing, 'tls': tls,
            'restic-rest': restic_rest, 'borg-serve': borg_serve}
OURS = ('embedded', 'isal', 'tls', 'floor', 'packing')

##############################################################################
# Rounds
##############################################################################


class Bench:
    """One tree, the programs and the works."""

    def __init__(self, place, report, args, name, tree, shifted):
        self.place = place
        self.report = report
        self.name = name
        self.tree = tree
        self.shifted = shifted          # the other tree, or None
        self.programs = args.programs
        wanted = set(args.works)
        wanted.update(*(NEEDS.get(work, ()) for work in args.works))
        if not shifted:
            wanted.discard('shifted')
        self.works = [work for work in WORKS if work in wanted]
        place.env.update(
            RESTIC_PASSWORD='x', BORG_PASSPHRASE='x',
            BORG_RELOCATED_REPO_ACCESS_IS_OK='yes',
            RESTIC_CACHE_DIR=place.path('.cache', 'restic'))
        self.files, self.bytes = common.warm(tree)
        print('\n%s: %s, %d files, %d bytes' % (name, tree, self.files,
                                                self.bytes))

    def round(self, number):
        """All works once, by all programs in turn; each begins in turn."""
        names = self.programs[number % len(self.programs):] \
            + self.programs[:number % len(self.programs)]
        self.place.remove('embedded-key', 'isal-key', 'tls-key', 'out',
                          *REPOSITORIES, *CACHES)
        programs = {name: PROGRAMS[name](
            self.place, self.tree, self.shifted or self.tree)
            for name in names}
        for work in self.works:
            for name, program in programs.items():
                if program and work in program.commands:
                    self.measure(work, name, program)
        self.place.stop()
        if not number:
            for name in (name for name in programs if not programs[name]):
                print('%s: not installed, left out' % name)

    def measure(self, work, name, program):
        """One work by one program."""
        self.place.remove('out')
        os.mkdir(self.place.path('out'))
        if work in ('first', 'unchanged'):
            common.warm(self.tree)
        run = self.place.measure(
            program.commands[work], server=program.server,
            cwd=self.place.path('out') if work == 'restore' else None)
        labels = dict(tree=self.name, half=program.half, program=name)
        self.report.add(run, work=work, **labels)
        if work == 'restore':
            found = sum(len(names) for _, _, names
                        in os.walk(self.place.path('out')))
            if found < self.files:
                sys.exit('%s: only %d of %d files were restored' % (
                    name, found, self.files))
        if work in ('first', 'shifted') and program.store:
            self.report.add({'bytes': common.size_of(program.store)},
                            work='stored after ' + work, **labels)

    def ratios(self):
        """Set `ratio` of each figure: to the best peer of its half."""
        for figure in self.report.find(tree=self.name):
            key = 'bytes' if 'bytes' in figure else 'seconds'
            best = min((peer[key]['median'] for peer in self.report.find(
                tree=self.name, half=figure['half'], work=figure['work'])
                if peer['program'] not in OURS), default=0)
            figure['ratio'] = figure[key]['median'] / best if best else None

    def show(self):
        """Both halves as tables."""
        self.ratios()
        for half, title in (('local', 'On this machine'),
                            ('network', 'Over the loopback')):
            rows = [row(figure) for work in WORKS + (
                'stored after first', 'stored after shifted')
                for figure in self.report.find(tree=self.name, half=half,
                                               work=work)]
            if rows:
                print('\n%s, tree %s' % (title, self.name))
                common.table([('work', 'program', 'seconds (least-most)',
                               'CPU s', 'peak MB', 'server CPU s',
                               'server MB', 'ratio')] + rows)


def row(figure):
    """A figure as a row of the table."""
    ratio = '%.2f' % figure['ratio'] if figure['ratio'] else '-'
    name = figure['work'], figure['program']
    if 'bytes' in figure:
        return (*name, '%.1f MB' % (figure['bytes']['median'] / 1e6),
                '', '', '', '', ratio)
    server = ('', '')
    if 'server_cpu' in figure:
        server = ('%.2f' % figure['server_cpu']['median'],
                  common.megabytes(figure['server_peak']))
    return (*name, common.spread(figure['seconds']),
            '%.2f' % figure['cpu']['median'],
            common.megabytes(figure['peak']), *server, ratio)


def tree_find(place, name, size):
    """(tree, its shifted form or None) of a name or a directory."""
    def make():
        return place.path('tree-' + name)
    if name == 'small':
        return trees.small(make), None
    if name == 'large':
        return trees.large(make), None
    if name == 'file':
        for kind, front in (('file', b''), ('shifted', b'!')):
            os.mkdir(place.path('tree-' + kind))
            trees.apart(trees.noise, place.path('tree-' + kind, 'noise'),
                        size, front)
        return place.path('tree-file'), place.path('tree-shifted')
    return os.path.abspath(name), None


def options():
    parser = common.parser(__doc__, 5)
    parser.add_argument(
        '--tree', action='append', dest='trees', metavar='TREE',
        help='small, large, file or a directory; may be repeated (small)')
    for name, choices in (('works', WORKS), ('programs', PROGRAMS)):
        parser.add_argument(
            '--' + name, type=common.words, default=list(choices),
            metavar='A,B', help=', '.join(choices))
    parser.add_argument('--size', type=int, default=10 ** 9, metavar='BYTES',
                        help='of the tree `file` (1000000000)')
    args = parser.parse_args()
    for name, choices in (('works', WORKS), ('programs', PROGRAMS)):
        unknown = set(getattr(args, name)) - set(choices)
        if unknown:
            parser.error('unknown in --%s: %s' % (name, min(unknown)))
    args.trees = args.trees or ['small']
    for tree in args.trees:
        if tree not in ('small', 'large', 'file') and not os.path.isdir(tree):
            parser.error('no such directory: ' + tree)
    return args


def main():
    args = options()
    report = common.Report('compare', args, 'borg', 'restic', 'rclone')
    for name in args.trees:
        with common.Place(args.dir) as place:
            bench = Bench(place, report, args, name,
                          *tree_find(place, name, args.size))
            for number in range(args.runs):
                bench.round(number)
            bench.show()
            report.write()


if __name__ == '__main__':
    main()
