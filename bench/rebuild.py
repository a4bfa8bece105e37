# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""How fast a server makes its index anew from the log and the tables.

A store is filled with so many entries of the real format, in segments and log
entries as a backup makes them; then `tarsnapd rebuild` makes the index that
was thrown away.

directory   segments have their real size, but the blocks in them are holes
            in files: whoever reads one pays for it
s3          a bucket of moto on the loopback, which is written in Python and
            shares the processors; blocks are small
floor       SQLite alone: rows as many, in as many sorted runs, into the same
            table

Read is what was got of objects; of a segment it should be its table.
"""

import json
import os
import random
import sqlite3
import sys
import time

import common

sys.path.insert(0, os.path.join(common.HERE, 'tests'))

SEGMENT = 400               # entries; 32 MiB of 80 KiB each
COMMIT = 25                 # segments
BODY = {'directory': 80 * 1024, 's3': 100}      # bytes of a block

# Runs the command, and says what it got from the store.
COUNTED = '''\
import json, sys
sys.path.insert(0, %r)
import tarsnapd
got = [0]
for store in (tarsnapd.FileStore, tarsnapd.S3Store):
    def get(self, *args, real=store.get):
        data = real(self, *args)
        got[0] += len(data)
        return data
    store.get = get
status = tarsnapd.main(['rebuild', %r])
with open(%r, 'w') as file:
    json.dump(got[0], file)
sys.exit(status)
'''


class Filler:
    """Fills a server directory with one machine's entries."""

    def __init__(self, path, options, body, seed):
        import tarsnapd
        self.d = tarsnapd
        tarsnapd.server_create(path, options)
        self.server = tarsnapd.Server(path)
        self.random = random.Random(seed)
        self.body = body
        self.scratch = os.path.join(path, 'tmp', 'segment')
        self.machine = self.server.run(tarsnapd.machine_create(
            '', 'bench', self.random.randbytes(128)))
        self.k, self.previous, self.head = 0, bytes(32), bytes(32)
        self.blocks = self.bytes = 0

    def fill(self, entries):
        """So many more entries."""
        while entries > 0:
            segments, tid = [], self.random.randbytes(16)
            record = None
            while entries > 0 and len(segments) < COMMIT:
                count = min(SEGMENT, entries)
                entries -= count
                record = self.segment(tid, len(segments) + 1, count, segments)
            self.commit(tid, segments, record)
        self.server.close()

    def segment(self, tid, number, count, segments):
        """One more, of `count` entries; the name of the last, a record."""
        d, rows, offset = self.d, [], len(self.d.SEGMENT_MAGIC)
        for i in range(count):
            cls = d.RECORD if i == count - 1 else d.CHUNK
            offset += d.ENTRY.size
            rows.append(d.ROW.pack(self.random.randbytes(32), cls, offset,
                                   self.body, self.random.randbytes(32)))
            offset += self.body
        table = b''.join(rows)
        with open(self.scratch, 'wb') as file:
            file.write(d.SEGMENT_MAGIC)
            file.truncate(offset)
            file.seek(offset)
            file.write(table + d.FOOTER.pack(offset, count, d.sha256(table),
                                             d.FOOTER_MAGIC))
        key = d.segment_key(self.machine, tid, number, d.sha256(table))
        size = offset + len(table) + d.FOOTER.size
        self.server.store.put(key, self.scratch)
        os.unlink(self.scratch)
        segments.append((key, size, d.sha256(table), count,
                         bytes((count + 7) // 8)))
        self.blocks += count
        self.bytes += count * self.body
        return rows[-1][:32]

    def commit(self, tid, segments, record):
        d = self.d
        commit = b''.join([
            d.COMMIT_HEAD.pack(d.COMMIT_MAGIC, self.machine, self.k + 1,
                               self.head, d.KIND_WRITE, tid),
            d.U16.pack(1), d.sha256(tid), record, bytes(16),
            bytes([d.COMPLETE]), d.U16.pack(0), bytes(112), d.U16.pack(0),
            bytes(64)])
        self.k += 1
        entry = d.Entry(self.machine, self.k, self.previous, self.k, commit)
        entry.segments, entry.blocks, entry.bytes = (
            segments, self.blocks, self.bytes)
        data = d.log_encode(entry)
        self.previous, self.head = d.sha256(data), d.sha256(commit)
        self.server.store.put(d.log_key(self.machine, self.k), data)


class Bench:

    def __init__(self, place, report, args):
        self.place = place
        self.report = report
        self.args = args
        sys.path.insert(0, common.HERE)

    def store(self, kind, options):
        """Fill one, and rebuild its index."""
        path = self.place.path(kind)
        Filler(path, options, BODY[kind], self.args.seed).fill(
            self.args.entries)
        script, got = self.place.path('counted.py'), self.place.path('got')
        with open(script, 'w') as file:
            file.write(COUNTED % (self.place.path('lib'), path, got))
        for _ in range(self.args.runs):
            for name in os.listdir(os.path.join(path, 'index')):
                os.unlink(os.path.join(path, 'index', name))
            run = self.place.measure([sys.executable, script])
            run['rate'] = self.args.entries / run['seconds']
            with open(got) as file:
                run['read'] = json.load(file)
            self.report.add(run, work='rebuild', store=kind,
                            entries=self.args.entries)

    def directory(self):
        self.store('directory', {})

    def s3(self):
        import s3peers
        import tarsnapd
        with s3peers.OpenMoto() as peer:
            options = {'store': 's3://bench/x', 's3-endpoint': peer.endpoint,
                       's3-region': s3peers.REGION, 's3-access-key': 'any',
                       's3-secret-key': 'any'}
            tarsnapd.Bucket('bench', options).request('create', '', 'PUT')
            self.store('s3', options)

    def floor(self):
        rng, count = random.Random(self.args.seed), self.args.entries
        for _ in range(self.args.runs):
            rows = [(rng.randbytes(32), i // SEGMENT, i, 80000, b'c')
                    for i in range(count)]
            path = self.place.path('floor')
            start, cpu = time.monotonic(), time.process_time()
            db = sqlite3.connect(path, isolation_level=None)
            for pragma in ('synchronous = OFF', 'journal_mode = MEMORY',
                           'cache_size = -65536'):
                db.execute('PRAGMA ' + pragma).fetchall()
            db.execute('CREATE TABLE blocks (name BLOB PRIMARY KEY, seg, '
                       'offset, length, class) WITHOUT ROWID')
            for at in range(0, count, 100000):
                db.execute('BEGIN')
                db.executemany('INSERT INTO blocks VALUES (?, ?, ?, ?, ?)',
                               sorted(rows[at:at + 100000]))
                db.execute('COMMIT')
            db.close()
            run = {'seconds': time.monotonic() - start,
                   'cpu': time.process_time() - cpu}
            os.unlink(path)
            run['rate'] = count / run['seconds']
            self.report.add(run, work='floor', store='-', entries=count)


def show(report):
    rows = [('work', 'store', 'entries', 'seconds (least-most)', 'CPU s',
             'entries/s', 'peak MB', 'read MB')]
    for figure in report.figures:
        rows.append((
            figure['work'], figure['store'], str(figure['entries']),
            common.spread(figure['seconds']),
            '%.2f' % figure['cpu']['median'],
            '%.0f' % figure['rate']['median'],
            common.megabytes(figure['peak']) if 'peak' in figure else '',
            common.megabytes(figure['read']) if 'read' in figure else ''))
    common.table(rows)


def options():
    parser = common.parser(__doc__, 3)
    parser.add_argument('--entries', type=int, default=1000000, metavar='N',
                        help='entries of a store (1000000)')
    parser.add_argument('--seed', type=int, default=1, metavar='N',
                        help='of the names (1)')
    parser.add_argument('--stores', type=common.words, metavar='A,B',
                        default=['directory', 's3', 'floor'],
                        help='directory, s3, floor')
    args = parser.parse_args()
    unknown = set(args.stores) - {'directory', 's3', 'floor'}
    if unknown:
        parser.error('unknown in --stores: ' + min(unknown))
    return args


def main():
    args = options()
    report = common.Report('rebuild', args)
    with common.Place(args.dir) as place:
        bench = Bench(place, report, args)
        print()
        for name in args.stores:
            getattr(bench, name)()
        show(report)
    report.write()


if __name__ == '__main__':
    main()
