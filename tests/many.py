# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Many archives of one machine, without running a backup for each.

Real records of archives that hold nothing, each sealed, signed and committed
by itself, as a client would; but by one session, in this process, and without
any fsync.  1 000 of them take some five seconds.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import lab          # noqa: E402
import tarsnap      # noqa: E402


class Many:
    """Makes archives in the store directory `store`, with a key file."""

    def __init__(self, store, keyfile):
        self.key = tarsnap.key_load(keyfile, None)
        self.remote = tarsnap.Remote(
            self.key, (tarsnap.ROLE_READ, tarsnap.ROLE_WRITE), store)
        self.sealer = tarsnap.Sealer(self.key)
        self.names = tarsnap.Names(self.key)
        self.live = {}              # archive id -> (record, lineage, state)
        self.totals = [0] * 9       # as tarsnap.TOTALS

    def make(self, count, stem='many'):
        """Archives `stem`-0 and so on."""
        with lab.no_fsync():
            channel = self.remote.connect()
            self.catch_up()
            base = self.remote.head
            for number in range(count):
                base = self.one(channel, base, b'%s-%d' % (
                    stem.encode(), number))
            self.remote.close()

    def catch_up(self):
        """What the newest commit says: the archives and the statistics."""
        for kind, body in self.remote.ask(tarsnap.LIST, bytes(2)):
            if kind == tarsnap.ARCHIVES:
                for row in tarsnap.rows_unpack(body, tarsnap.ARCHIVE_ROW,
                                               'ARCHIVES'):
                    self.live[row[0]] = row[1:4]
            elif kind == tarsnap.COMMIT_OBJECT:
                commit = tarsnap.commit_unpack(body[8:], self.key)
                self.totals = list(tarsnap.note_open(self.key, commit))

    def one(self, channel, base, title):
        """Commit one archive on `base`, (n, H_n); the base after it."""
        record, lineage = self.record(base, title), os.urandom(16)
        record.lineage = lineage
        parts = tarsnap.record_pack(record, self.key)
        record.name = self.names.record(parts[0])
        sealed = self.sealer.seal(tarsnap.RECORD, record.name, parts)
        self.live[record.archive] = (record.name, lineage, tarsnap.COMPLETE)
        commit = tarsnap.Commit(self.key.machine, base[0] + 1, base[1],
                                tarsnap.KIND_WRITE, record.tid)
        commit.linked = [(record.archive, *self.live[record.archive])]
        commit.puts = tarsnap.counted([record.name])
        commit.live = tarsnap.live_digest(self.live)
        whole = (tarsnap.record_plain(parts), len(sealed))
        self.totals[:4] = [self.totals[i] + whole[i % 2] for i in range(4)]
        self.totals[4:] = (*whole, *whole, len(self.live))
        commit.note = tarsnap.note_seal(self.key, commit.n, self.totals)
        raw = tarsnap.commit_pack(commit, self.key)
        tarsnap.transaction_open(channel, commit.kind, commit.tid, lineage,
                                 base)
        channel.push(tarsnap.PUT, record.name + tarsnap.RECORD + sealed)
        tarsnap.transaction_commit(channel, raw)
        return commit.n, tarsnap.sha256(raw)

    def record(self, base, title):
        """An archive of nothing."""
        record = tarsnap.Record()
        record.machine, record.title = self.key.machine, title
        record.archive = self.names.archive(title)
        record.series = self.names.series(title)
        record.tid, record.base = os.urandom(16), base
        record.created = 1700000000 + base[0]
        record.argv, record.host = [b'tarsnap', b'-c'], b'host'
        return record
