#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""How time and memory grow with files, archives, bytes and stored blocks.

Ours only, in a directory.  Prints for each series the slope of a straight line
through the points in logarithms: 1 is proportional, 0 does not grow; and for
memory what each further unit costs.

files      trees of tiny files, a thousand to a directory: a first backup, an
           unchanged one, -t, the deletion of one of two
archives   one tree of the least of those sizes and so many archives of it,
           each with another file changed: an unchanged backup,
           --list-archives, the deletion of one more of that kind
gb         so many GB in files of 64 MB that bench/simulate.py does not read:
           filling the store from one size to the next, with checkpoints as
           often as `checkpoint-bytes 1GB` makes them; then, by the real
           client and server, an unchanged backup, the deletion of an archive
           in which one file differs, --print-stats, --fsck, and a rebuild of
           the server's index
blocks     a store filled with so many small blocks by the client of the
           tests: opening a session and a commit, by a server that knows the
           store, and a rebuild of what it knows

On two processors it takes about a quarter of an hour, of which making
1 000 000 files is a third; --gb 1,10,100,1000 takes an hour more and 6 GB.
"""

import math
import os
import shutil
import sys
import time

import common
import trees

sys.path.insert(0, os.path.join(common.HERE, 'tests'))

SERIES = ('files', 'archives', 'gb', 'blocks')
FOLDER = 1000               # tiny files in a directory, and large ones
FILE = 64000000             # bytes of a file that is not read
CHECKPOINT = 1770000        # 12 200 blocks as bench/simulate.py stores them
RACY = 2.5      # seconds; what is younger is read again by the next run
COMMIT_BLOCKS = 10000       # of each commit that fills a store
KEYS = ('seconds', 'cpu', 'peak')


class Bench:

    def __init__(self, place, report, args):
        self.place = place
        self.report = report
        self.args = args
        self.tree = place.path('tree')

    def client(self, *words):
        return self.place.client('key', 'cache', *words)

    def create(self, name, *options):
        return self.client('-c', '-f', name, *options, '-C', self.tree, '.')

    def measure(self, series, count, work, command):
        self.report.add(self.place.measure(command), series=series,
                        work=work, count=count)

    def fresh(self):
        """No archives, a new key."""
        self.place.remove('key', 'cache', 'store')
        self.place.key('key', self.place.path('store'))

    def files(self):
        tree = self.args.tiny or self.tree
        made = FOLDER * len(os.listdir(tree)) if os.path.isdir(tree) else 0
        for count in self.args.files:
            if made < count:
                trees.apart(trees.tiny, tree, count - made, made)
                made = count
            folders = ['%05d' % number
                       for number in range(-(-count // FOLDER))]
            for folder in folders:
                common.warm(os.path.join(tree, folder))
            self.fresh()
            with open(self.place.path('folders'), 'w') as file:
                file.write('\n'.join(folders))
            time.sleep(RACY)

            def create(name):
                return self.client('-c', '-f', name, '-C', tree, '-T',
                                   self.place.path('folders'))

            self.measure('files', count, 'first', create('a'))
            for _ in range(self.args.runs):
                self.measure('files', count, 'unchanged', create('u'))
                self.measure('files', count, 'list',
                             self.client('-t', '-f', 'a'))
                self.measure('files', count, 'delete',
                             self.client('-d', '-f', 'u'))

    def archives(self):
        least = min(self.args.files)
        shutil.rmtree(self.tree, ignore_errors=True)
        trees.apart(trees.tiny, self.tree, least)
        self.fresh()
        made = changed = 0
        for count in self.args.archives:
            while made < count:
                self.change(changed)
                self.place.quiet(self.create('a%d' % made))
                made, changed = made + 1, changed + 1
            for _ in range(self.args.runs):
                self.change(changed)
                changed += 1
                self.place.quiet(self.create('changed'))
                time.sleep(RACY)
                self.place.quiet(self.create('settled'))
                self.measure('archives', count, 'unchanged',
                             self.create('extra'))
                self.measure('archives', count, 'list-archives',
                             self.client('--list-archives'))
                self.place.quiet(self.client('-d', '-f', 'extra',
                                             '-f', 'settled'))
                self.measure('archives', count, 'delete',
                             self.client('-d', '-f', 'changed'))

    def gb(self):
        """Sizes; what was there is stored once, and the rest filled up."""
        shutil.rmtree(self.tree, ignore_errors=True)
        self.fresh()
        made, simulate = 0, os.path.join(os.path.dirname(
            os.path.abspath(__file__)), 'simulate.py')
        for count in self.args.gb:
            while made * FILE < count * 1e9:
                self.sparse(made)
                made += 1
            time.sleep(RACY)
            fill = self.create('a%g' % count, '--checkpoint-bytes',
                               str(self.args.checkpoint))
            fill[1:2] = [simulate, self.place.path('lib')]
            self.measure('gb', count, 'fill', fill)
            for _ in range(self.args.runs):
                self.measure('gb', count, 'unchanged', self.create('u'))
                self.place.quiet(self.client('-d', '-f', 'u'))
                small = os.path.join(self.tree, 'small')
                with open(small, 'ab') as file:
                    file.write(b'changed\n')
                self.place.quiet(self.create('changed'))
                os.unlink(small)
                self.measure('gb', count, 'delete',
                             self.client('-d', '-f', 'changed'))
                self.measure('gb', count, 'stats',
                             self.client('--print-stats'))
            self.measure('gb', count, 'rebuild', self.place.script(
                'tarsnapd', 'rebuild', self.place.path('store')))
            self.measure('gb', count, 'fsck', self.client('--fsck'))
            self.place.quiet(self.create('known'))      # fsck forgets that
            self.place.quiet(self.client('-d', '-f', 'known'))

    def sparse(self, number):
        """One more file of nothing but a hole."""
        folder = os.path.join(self.tree, '%05d' % (number // FOLDER))
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, 'f%07d' % number), 'wb') as file:
            file.truncate(FILE)

    def change(self, number):
        """Change one file of the tree."""
        names = sorted(os.listdir(self.tree))
        folder = os.path.join(self.tree, names[number % len(names)])
        name = sorted(os.listdir(folder))[number // len(names)]
        with open(os.path.join(folder, name), 'ab') as file:
            file.write(b'changed\n')

    def blocks(self):
        self.place.remove('store')
        fill = Fill(self.place.path('store'))
        made = 0
        for count in self.args.blocks:
            while made < count:
                fill.commit(min(COMMIT_BLOCKS, count - made))
                made += COMMIT_BLOCKS
            for _ in range(self.args.runs):
                for work, function in (('session', fill.session),
                                       ('commit', fill.commit)):
                    start = time.monotonic()
                    function()
                    self.report.add({'seconds': time.monotonic() - start},
                                    series='blocks', work=work, count=count)
            fill.close()
            self.measure('blocks', count, 'rebuild', self.place.script(
                'tarsnapd', 'rebuild', self.place.path('store')))
            fill.session()

    def show(self):
        rows = [('series', 'work', 'count', 'seconds (least-most)', 'CPU s',
                 'peak MB')]
        for figure in self.report.figures:
            rows.append((
                figure['series'], figure['work'], str(figure['count']),
                common.spread(figure['seconds'], 3),
                '%.2f' % figure['cpu']['median'] if 'cpu' in figure else '',
                common.megabytes(figure['peak'])
                if 'peak' in figure else ''))
        common.table(rows)
        self.slopes()

    def slopes(self):
        """Fit and print one line for each work of each series."""
        out = self.report.document['slopes'] = []
        rows = [('series', 'work', 'seconds grow as', 'CPU grows as',
                 'peak grows as', 'seconds a million', 'CPU s a million',
                 'peak bytes each')]
        for series, work in dict.fromkeys(
                (figure['series'], figure['work'])
                for figure in self.report.figures):
            found = self.report.find(series=series, work=work)
            fit = {'series': series, 'work': work}
            for key in KEYS:
                points = [(figure['count'], figure[key]['median'])
                          for figure in found
                          if key in figure and figure[key]['median']]
                if len(points) > 1:
                    fit[key] = {
                        'power': slope([tuple(map(math.log, point))
                                        for point in points]),
                        'each': slope(points)}
            out.append(fit)
            rows.append((series, work, *(
                'n^%.2f' % fit[key]['power'] if key in fit else ''
                for key in KEYS), *(
                '%.*f' % (digits, fit[key]['each'] * scale)
                if key in fit else '' for key, digits, scale in
                (('seconds', 2, 1e6), ('cpu', 2, 1e6), ('peak', 1, 1)))))
        print()
        common.table(rows)


class Fill:
    """A machine of the tests' client in an embedded store."""

    def __init__(self, path):
        import rawclient
        self.raw = rawclient
        self.path = path
        self.client = self.raw.Client(self.raw.Embedded(path, create=True))
        self.host = self.raw.Host(self.client)
        self.client.auth(self.host.machine, self.host.keys, self.raw.R,
                         self.raw.W)
        self.body = b'c' + self.raw.block('c', 'fill', 100)[2]

    def session(self):
        """Open the store and prove who we are, again."""
        self.close()
        self.client = self.raw.Client(self.raw.Embedded(self.path))
        self.client.auth(self.host.machine, self.host.keys, self.raw.R,
                         self.raw.W)

    def commit(self, blocks=10):
        """An archive of so many blocks."""
        raw, tid = self.raw, os.urandom(16)
        self.host.begin(self.client, tid)
        names = [os.urandom(32) for _ in range(blocks)]
        for name in names:
            self.client.send('PUT', name + self.body)
        record = raw.put(self.client, raw.block('a', tid.hex()))
        self.host.commit(self.client, tid, puts=names + [record], linked=[
            (raw.sha(tid), record, bytes(16), raw.COMPLETE)])

    def close(self):
        self.client.close()


def slope(points):
    """Of the straight line that is nearest to the points."""
    n = len(points)
    x = sum(point[0] for point in points) / n
    y = sum(point[1] for point in points) / n
    over = sum((point[0] - x) ** 2 for point in points)
    return sum((a - x) * (b - y) for a, b in points) / over if over else 0.0


def options():
    parser = common.parser(__doc__, 3)
    for name, usual in (('files', [10000, 100000, 1000000]),
                        ('archives', [1, 10, 100]),
                        ('gb', [1, 10, 100]),
                        ('blocks', [10000, 100000])):
        parser.add_argument(
            '--' + name, type=common.numbers, default=usual, metavar='N,N',
            help='rising numbers of them (%s)' % ','.join(map(str, usual)))
    parser.add_argument('--checkpoint', type=int, default=CHECKPOINT,
                        metavar='BYTES', help='that the simulated client '
                        'sends between two checkpoints, 0: none (%d, as many '
                        'blocks as are in 1 GB)' % CHECKPOINT)
    parser.add_argument('--tiny', metavar='DIR',
                        help='the tiny files are here, or are made and kept')
    parser.add_argument('--series', type=common.words, default=list(SERIES),
                        metavar='A,B', help=', '.join(SERIES))
    args = common.parse(parser, files=[10, 30], archives=[1, 2], gb=[1, 2],
                        blocks=[20, 40])
    unknown = set(args.series) - set(SERIES)
    if unknown:
        parser.error('unknown in --series: ' + min(unknown))
    return args


def main():
    args = options()
    report = common.Report('growth', args)
    with common.Place(args.dir) as place:
        bench = Bench(place, report, args)
        print()
        for series in args.series:
            getattr(bench, series)()
        bench.show()
    report.write()


if __name__ == '__main__':
    main()
