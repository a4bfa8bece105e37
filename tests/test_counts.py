# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What is kept and what is released: counts, statistics, and who may.

A block's count is the number of blocks that name it.  Whatever was created and
deleted in whatever order, the cache's counts and statistics must be those that
a stranger finds who walks all blocks of the store; the server must hold what
the archives reach, and nothing else.
"""

import errno
import os
import random
import shutil
import struct
import unittest
from unittest import mock

import formatreader
import lab
import tarsnap
from lab import D, N, R, W, LabTest, fine, snapshot

SEED = int(os.environ.get('SEED', random.SystemRandom().randrange(10 ** 6)))


def setUpModule():
    print('SEED=%d' % SEED)


class Audit:
    """The store as a reader of the format finds it, recomputed."""

    def __init__(self, the_lab):
        reader = the_lab.host('auditor-%d' % the_lab.copies)
        os.unlink(reader.keyfile)
        with open(the_lab.fresh('key'), 'w+b') as file:
            tarsnap.key_write(os.dup(file.fileno()), the_lab.key)
            file.seek(0)
            self.key = formatreader.key_fields(file.read().decode())
        self.live = the_lab.live()      # name -> (class, stored)
        self.archives = {}              # record name -> Record fields
        self.plain, self.kids = {}, {}
        remote = tarsnap.Remote(the_lab.key, (R,))
        try:
            self.linked = self.records(remote)
            for name, block in self.blocks(remote):
                self.enter(name, self.live[name][0], block)
        finally:
            remote.close()
        self.counts = dict.fromkeys(self.live, 0)
        for record in self.linked:
            self.counts[record] += 1
        for kids in self.kids.values():
            for name in {kid['name'] for kid in kids}:
                self.counts[name] += 1
        self.sums = {}

    def records(self, remote):
        """Record names of the live archives, with their states."""
        out = {}
        for kind, body in remote.ask(tarsnap.LIST, b'\0\0'):
            if kind == tarsnap.ARCHIVES:
                for row in struct.iter_unpack('>32s32s16sBQ', body[2:]):
                    out[row[1]] = row[3]
        return out

    def blocks(self, remote):
        names = sorted(self.live)
        for at in range(0, len(names), 100):
            some = names[at:at + 100]
            for kind, body in remote.ask(
                    tarsnap.GET, b'\3' + struct.pack('>H', len(some)), *some):
                assert kind == tarsnap.BLOCK, kind
                yield body[:32], body[32:]

    def enter(self, name, cls, block):
        parts = formatreader.block_open(self.key, cls, name, block)
        if cls == b'c':
            assert formatreader.name_chunk(self.key, parts[0]) == name
            self.plain[name] = len(parts[0])
        else:
            self.plain[name] = len(parts[0]) + len(parts[1])
            self.kids[name] = (formatreader.record_open if cls == b'a' else
                               formatreader.index_open)(
                                   self.key, name, block)['kids']

    def total(self, name):
        """(plain, stored) with everything below, times counted."""
        if name not in self.sums:
            plain, stored = self.plain[name], self.live[name][1]
            for kid in self.kids.get(name, ()):
                below = self.total(kid['name'])
                plain += kid['times'] * below[0]
                stored += kid['times'] * below[1]
            self.sums[name] = plain, stored
        return self.sums[name]

    def reachable(self):
        seen, stack = set(), list(self.linked)
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack += [kid['name'] for kid in self.kids.get(name, ())]
        return seen

    def statistics(self):
        """All archives, (unique data), number of archives."""
        whole = [self.total(name) for name in self.linked]
        return (sum(row[0] for row in whole), sum(row[1] for row in whole),
                sum(self.plain.values()),
                sum(row[1] for row in self.live.values()), len(self.linked))


def dump(host):
    """All rows of `directory` but `small`; `meta` without the lineage,
    which is that of this host's last run; blocks that no archive needs
    without the sums of what is below them, which nobody asks for.
    """
    with host.database() as db:
        rows = {table: db.execute('SELECT * FROM %s ORDER BY 1'
                                  % table).fetchall()
                for table in ('blocks', 'archives', 'meta')}
    kids = {row[0]: row[7] or b'' for row in rows['blocks']}
    needed, stack = set(), [row[1] for row in rows['archives']]
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            stack += [kid[1] for kid in tarsnap.KID.iter_unpack(kids[name])]
    rows['blocks'] = [row if row[0] in needed else row[:5] + row[7:]
                      for row in rows['blocks']]
    rows['meta'] = [row for row in rows['meta']
                    if row[0] not in ('lineage', 'check')]
    return rows


class CountTest(LabTest):
    def setUp(self):
        super().setUp()
        self.rng = random.Random('%s-%d' % (self.id(), SEED))
        patch = fine()
        patch.__enter__()
        self.addCleanup(patch.__exit__, None, None, None)
        self.serial = 0
        self.models = {}                # archive -> snapshot of the tree
        for _ in range(30):
            self.change()

    def change(self):
        """One change of the tree; contents repeat."""
        rng = self.rng
        self.serial += 1
        name = 'd%d/f%d' % (rng.randrange(4), rng.randrange(40))
        path = os.path.join(self.lab.tree, name)
        if os.path.exists(path) and rng.random() < 0.3:
            os.unlink(path)
            return
        same = random.Random(rng.randrange(15))
        data = same.randbytes(rng.choice((5, 100, 1000, 9000, 40000)))
        self.write(name, data * rng.choice((1, 1, 2)))

    def create(self, host):
        for _ in range(self.rng.randrange(8)):
            self.change()
        name = 'archive-%d' % self.serial
        self.serial += 1
        args = self.rng.choice(((), (), ('d1',), ('d1', 'd1'),
                                ('--exclude=*7',)))
        args = [arg for arg in args if arg.startswith('-') or
                os.path.exists(os.path.join(self.lab.tree, arg))]
        self.models[name] = None if args else snapshot(self.lab.tree)
        host.create(name, *args)
        return name

    def delete(self, host):
        name = self.rng.choice(sorted(self.models))
        del self.models[name]
        host.good('-d', '-f', name)

    def audit(self, host, garbage=False):
        """Compare a host's cache with the store; the Audit."""
        audit = Audit(self.lab)
        with host.database() as db:
            blocks = {row[0]: row[1:] for row in db.execute(
                'SELECT name, count, cls, plain, stored, tplain, tstored '
                'FROM blocks')}
        self.assertEqual(set(blocks), set(audit.live))
        for name, row in blocks.items():
            cls, stored = audit.live[name]
            self.assertEqual(
                row[:4], (audit.counts[name], cls.decode(),
                          row[2] and audit.plain[name], stored),
                name.hex())
            if row[4] is not None:
                self.assertEqual(row[4:], audit.total(name), name.hex())
        if not garbage:
            self.assertEqual(audit.reachable(), set(audit.live))
        totals = host.meta()[2]
        self.assertEqual((*totals[:4], totals[8]), audit.statistics())
        return audit


class Sequences(CountTest):
    def test_create_and_delete(self):
        for turn in range(24):
            if self.models and self.rng.random() < 0.4:
                self.delete(self.host)
            else:
                self.create(self.host)
            if turn % 4 == 3:
                self.audit(self.host)
        for name, model in self.models.items():
            if model:
                self.host.check(name, model)
        self.all_go()

    def all_go(self):
        """Deleting everything leaves nothing."""
        while self.models:
            self.delete(self.host)
        self.assertEqual(self.lab.live(), {})
        self.assertEqual(self.host.meta()[2][:4], (0, 0, 0, 0))
        self.assertEqual(self.host.meta()[2][8], 0)
        with self.host.database() as db:
            self.assertEqual(db.execute('SELECT count(*) FROM blocks'
                                        ).fetchone()[0], 0)

    def test_statistics_of_a_run(self):
        """This archive, New data and Deleted data, printed and in the
        commit's note, are what the store says.
        """
        for turn in range(6):
            before = self.lab.live()
            name = self.create(self.host)
            audit = self.audit(self.host)
            new = [row for block, row in audit.live.items()
                   if block not in before]
            totals = self.host.meta()[2]
            record = next(name for name in audit.linked
                          if name not in before)
            self.assertEqual(totals[4:6], audit.total(record))
            self.assertEqual(totals[7], sum(row[1] for row in new))
            self.assertEqual(totals[6], sum(
                audit.plain[block] for block in audit.live
                if block not in before))
            self.assertEqual(self.stats(name), audit.total(record))
        before = Audit(self.lab)
        out = self.host.good('-d', '--print-stats', '-f', name).err
        after = Audit(self.lab)
        gone = [block for block in before.live if block not in after.live]
        self.assertEqual(
            [int(word) for word in out.splitlines()[-1].split()[2:]],
            [sum(before.plain[block] for block in gone),
             sum(before.live[block][1] for block in gone)], out)
        self.audit(self.host)

    def stats(self, name):
        lines = self.host.good('--print-stats', '-f', name).out.splitlines()
        return tuple(int(word) for word in lines[3].split()[-2:])

    def test_unique_data_is_what_deleting_frees(self):
        names = [self.create(self.host) for _ in range(5)]
        self.rng.shuffle(names)
        for name in names:
            lines = self.host.good('--print-stats', '-f', name
                                   ).out.splitlines()
            unique = [int(word) for word in lines[4].split()[-2:]]
            before = self.host.meta()[2]
            self.host.good('-d', '-f', name)
            after = self.host.meta()[2]
            self.assertEqual([before[2] - after[2], before[3] - after[3]],
                             unique)

    def test_fsck_gives_the_same(self):
        for turn in range(12):
            if len(self.models) > 2 and self.rng.random() < 0.5:
                self.delete(self.host)
            else:
                self.create(self.host)
        before, head = dump(self.host), self.host.seq()
        self.host.good('--fsck')
        self.assertEqual(dump(self.host), before)
        self.assertEqual(self.host.seq(), head)
        self.host.lose('directory', 'cache', 'cseq')
        self.host.good('--fsck')
        self.assertEqual(dump(self.host), before)
        self.assertEqual(self.host.seq(), head)
        self.create(self.host)
        self.audit(self.host)

    def test_wrong_count_shows(self):
        """The comparison is worth something: one count less is seen."""
        self.create(self.host)
        with self.host.database() as db:
            db.execute("UPDATE blocks SET count = count - 1 WHERE name = "
                       "(SELECT max(name) FROM blocks)")
            db.commit()
        with self.assertRaises(AssertionError):
            self.audit(self.host)

    def test_a_count_too_low_would_lose(self):
        """Why all this matters: release() believes the counts; deleting
        looks at all references once more.
        """
        self.write('d1/shared', random.Random(1).randbytes(9000))
        self.host.create('one')
        self.write('d1/third', b'x')
        self.host.create('two')
        real = tarsnap.Cache.find

        def find(cache, name):
            row = real(cache, name)
            return row and (row[0], 1) + row[2:]

        with mock.patch.object(tarsnap.Cache, 'find', find):
            result = self.host.run('-d', '-f', 'one')
        self.assertEqual(result.status, 1)
        self.assertIn('Run --fsck', result.err)
        self.host.extract('two')
        # Without the last look at all references it is gone.
        with mock.patch.object(tarsnap.Cache, 'find', find), \
                mock.patch.object(tarsnap, 'release_check',
                                  lambda cache, dead: None):
            self.host.good('-d', '-f', 'one')
        target = self.lab.fresh()
        os.mkdir(target)
        result = self.host.run('-x', '-f', 'two', '-C', target, cache=False)
        self.assertEqual(result.status, 1)
        self.assertIn('missing', result.err)


class Unreadable(CountTest):
    def test_nothing_stays_of_a_file_that_cannot_be_read_to_its_end(self):
        # Its chunks, and lists of them, are put before that is known.
        # Nothing names them, so --fsck could not tell how long they are.
        data = self.rng.randbytes(150000)
        for n in range(1, 20, 6):
            path = self.write('large', data[n:])
            name = 'failing-%d' % n
            with mock.patch.object(tarsnap, 'pread_exactly',
                                   self.failing(n)):
                self.host.create(name, status=2)
            self.audit(self.host)
            os.unlink(path)
            self.host.check(name, snapshot(self.lab.tree))
        before = dump(self.host)
        self.host.good('--fsck')
        self.assertEqual(dump(self.host), before)

    def test_nothing_stays_that_only_another_failed_file_shares(self):
        self.host.create('before')
        for number in range(8):
            self.write('d1/s%d' % number, self.rng.randbytes(1500))
        with mock.patch.object(tarsnap.Writer, 'attributes',
                               side_effect=OSError(errno.EIO, 'EIO')):
            self.host.create('failing', status=2)
        self.audit(self.host)

    @staticmethod
    def failing(n):
        """pread_exactly() whose n-th call of a file fails."""
        real, count = tarsnap.pread_exactly, [0]

        def pread(fd, size, pos):
            count[0] = count[0] + 1 if pos else 1
            if count[0] == n and os.fstat(fd).st_size > 140000:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, size, pos)
        return pread


class Checkpoints(CountTest):
    def test_checkpoints_leave_no_count_behind(self):
        """What only checkpoints had goes with the next deletion."""
        for number in range(6):
            self.write('big/f%d' % number, self.rng.randbytes(700000))
        with lab.tapped() as log:
            self.host.create('one', '--checkpoint-bytes=1000000')
        self.assertGreater(log.kinds().count(tarsnap.CHECKPOINT), 1)
        self.audit(self.host, garbage=True)
        before = dump(self.host)
        self.host.good('--fsck')
        self.assertEqual(dump(self.host), before)
        shutil.rmtree(os.path.join(self.lab.tree, 'big'))
        self.host.create('two')
        self.host.good('-d', '-f', 'one')
        self.audit(self.host)
        self.host.check('two', snapshot(self.lab.tree))

    def test_part_of_a_dead_run(self):
        for number in range(6):
            self.write('big/f%d' % number, self.rng.randbytes(700000))
        real = tarsnap.Create.checkpoint

        def once(run, writer, series):
            real(run, writer, series)
            if run.txn.changed:
                os._exit(7)

        status = self.lab.crash(
            self.host, mock.patch.object(tarsnap.Create, 'checkpoint', once),
            '-c', '-f', 'one', '--checkpoint-bytes=1000000', '-C',
            self.lab.tree, '.')
        self.assertEqual(status, 7)
        self.host.good('--recover')
        self.audit(self.host)
        out = self.host.good('--list-archives', cache=False).out
        self.assertEqual(out, 'one.part\n')
        self.assertEqual(self.host.run(
            '-c', '-f', 'one', '-C', self.lab.tree, '.').status, 1)
        self.host.good('-d', '-f', 'one.part')
        self.assertEqual(self.lab.live(), {})
        self.host.create('one')
        self.audit(self.host)


class TwoHosts(CountTest):
    def test_alternating(self):
        other = self.lab.host('b')
        hosts = [self.host, other]
        self.create(self.host)
        other.good('--fsck')
        for turn in range(16):
            host = self.rng.choice(hosts)
            if len(self.models) > 2 and self.rng.random() < 0.45:
                self.delete(host)
            else:
                self.create(host)
            if turn % 3 == 2:
                self.audit(host)
        for host in hosts:
            host.create('last-%s' % os.path.basename(host.cache))
        self.host.good('-d', '-f', 'last-b.cache')
        self.audit(self.host)
        other.good('-d', '-f', 'last-a.cache')
        self.audit(other)
        # Both say the same as soon as both have seen the same.
        self.host.create('same')
        other.good('--recover')
        mine, theirs = dump(self.host), dump(other)
        self.assertEqual(mine['archives'], theirs['archives'])
        self.assertEqual([row[:4] for row in mine['blocks']],
                         [row[:4] for row in theirs['blocks']])
        self.assertEqual(self.host.meta(), other.meta())

    def test_write_only_host_is_partial(self):
        """It adds and dedupes, and releases nothing; a key that reads
        references makes its cache whole.
        """
        writer = self.lab.host('w', (W,))
        nearly = self.lab.host('wd', (W,))
        self.host.create('base')
        writer.good('--fsck')
        with writer.database() as db:
            self.assertEqual(db.execute(
                "SELECT value FROM meta WHERE key = 'partial'"
                ).fetchone()[0], b'1')
        with lab.tapped() as log:
            writer.create('by-writer')
        self.assertEqual(log.puts(b'c'), [], 'not deduped by name')
        self.assertEqual(writer.meta()[2][8], 2)
        # Statistics are exact also here: from the notes.
        self.assertEqual(writer.meta()[2][:4], Audit(self.lab).statistics(
            )[:4])
        # The same cache with the delete role but without references.
        key = self.lab.key.subset({W, D})
        key.refs_priv = b''
        nearly.cache = writer.cache
        os.unlink(nearly.keyfile)
        tarsnap.key_write(tarsnap.key_create(nearly.keyfile), key)
        result = nearly.run('-d', '-f', 'by-writer')
        self.assertEqual(result.status, 1, result)
        # Now with them: whole, and right.
        whole = self.lab.host('whole')
        whole.cache = writer.cache
        whole.good('--recover')
        with writer.database() as db:
            self.assertEqual(db.execute(
                "SELECT value FROM meta WHERE key = 'partial'"
                ).fetchone()[0], b'')
        self.audit(whole)
        whole.good('-d', '-f', 'by-writer')
        self.audit(whole)

    def test_partial_cache_releases_nothing(self):
        """The rule itself, also for a key that has all roles."""
        self.create(self.host)
        writer = self.lab.host('w', (W,))
        writer.good('--fsck')
        writer.create('mine')
        whole = self.lab.host('whole')
        whole.cache = writer.cache
        with mock.patch.object(tarsnap, 'read_missing',
                               lambda remote, cache: None):
            result = whole.run('-d', '-f', 'mine')
        self.assertEqual(result.status, 1)
        self.assertIn('--fsck', result.err)

    def test_conflicts_in_the_middle(self):
        """Another host commits while this one is about to."""
        other = self.lab.host('b')
        self.create(self.host)
        other.good('--fsck')
        real, done = tarsnap.Transaction.commit_object, []

        def late(txn, record, state):
            raw = real(txn, record, state)
            if len(done) < 1:
                done.append(1)
                other.create('by-b')
                if len(old) > 1:
                    other.good('-d', '-f', old[-1])
                    del self.models[old[-1]]
            return raw

        for turn in range(4):
            done.clear()
            old = sorted(self.models)
            for _ in range(5):
                self.change()
            with mock.patch.object(tarsnap.Transaction, 'commit_object',
                                   late):
                name = self.create(self.host)
            if self.models.get(name):
                self.host.check(name, self.models[name])
            self.host.good('--recover')     # reads what `other` put
            self.audit(self.host)
            other.good('-d', '-f', 'by-b')
            self.audit(other, garbage=True)

    def test_pruned_while_creating(self):
        """What this run borrowed is deleted before it commits: it reads it
        again.
        """
        other = self.lab.host('b')
        model = snapshot(self.lab.tree)
        self.host.create('one')
        other.good('--fsck')
        real, done = tarsnap.Transaction.commit_object, []

        def late(txn, record, state):
            raw = real(txn, record, state)
            if not done:
                done.append(1)
                other.good('-d', '-f', 'one')
            return raw

        with mock.patch.object(tarsnap.Transaction, 'commit_object', late):
            self.host.create('two')
        self.host.check('two', model)
        self.audit(self.host)

    def test_without_the_restart_it_would_be_lost(self):
        other = self.lab.host('b')
        self.host.create('one')
        other.good('--fsck')
        real, done = tarsnap.Transaction.commit_object, []

        def late(txn, record, state):
            raw = real(txn, record, state)
            if not done:
                done.append(1)
                other.good('-d', '-f', 'one')
            return raw

        with mock.patch.object(tarsnap.Transaction, 'commit_object', late), \
                mock.patch.object(tarsnap.Pending, 'borrowed',
                                  lambda pending, names: False):
            result = self.host.run('-c', '-f', 'two', '-C', self.lab.tree,
                                   '.')
        if result.status == 0:
            target = self.lab.fresh()
            os.mkdir(target)
            self.assertEqual(self.host.run(
                '-x', '-f', 'two', '-C', target, cache=False).status, 1)


class PruneKey(CountTest):
    """The delete role alone: names, times, references; no path, no byte."""

    def test_deletes_and_never_reads(self):
        names = [self.create(self.host) for _ in range(4)]
        prune = self.lab.host('prune', (D,))
        prune.good('--fsck')
        prune.good('-d', '-f', names[1])
        self.host.create('meanwhile')
        with lab.tapped() as log:
            prune.good('-d', '-f', names[2])
            prune.good('-d', '-f', names[0])
            prune.lose('directory')
            prune.good('--fsck')
        live = self.lab.live()
        asked = [body for kind, body in log if kind == tarsnap.GET]
        self.assertTrue(asked)
        for body in asked:
            self.assertEqual(body[0], 1, 'asked for more than references')
            for at in range(3, len(body), 32):
                cls = live.get(body[at:at + 32])
                self.assertTrue(cls is None or cls[0] in b'ia')
        self.audit(prune)
        self.host.check('meanwhile', snapshot(self.lab.tree))

    def test_lists_archives(self):
        names = [self.create(self.host) for _ in range(2)]
        prune = self.lab.host('prune', (D,))
        out = prune.good('--list-archives', cache=False).out
        self.assertEqual(sorted(out.split()), sorted(names))

    def test_cannot_open_rows(self):
        self.create(self.host)
        audit = Audit(self.lab)
        remote = tarsnap.Remote(self.lab.key, (R,))
        try:
            blocks = dict(audit.blocks(remote))
        finally:
            remote.close()
        opener = tarsnap.Opener(self.lab.key.subset({D}))
        seen = set()
        for name, block in blocks.items():
            cls = audit.live[name][0]
            seen.add(cls)
            with self.assertRaises(tarsnap.UserError):
                opener.open(cls, name, block)
            if cls != b'c':
                self.assertEqual(len(opener.open(cls, name, block, True)),
                                 1 if cls == b'i' else 2)
        self.assertEqual(seen, {b'a', b'c', b'i'})

    def test_server_refuses_it_the_rest(self):
        self.create(self.host)
        name = min(self.lab.live())
        remote = tarsnap.Remote(self.lab.key.subset({D}), (D,))
        try:
            with self.assertRaises(tarsnap.Refused):
                remote.ask(tarsnap.GET, b'\3\0\1', name)
        finally:
            remote.close()

    def test_other_keys_cannot_delete(self):
        name = self.create(self.host)
        for number, roles in enumerate(({R}, {W}, {R, W}, {N}, {R, W, N})):
            other = self.lab.host('no-%d' % number, roles)
            shutil.copytree(self.host.cache, other.cache, symlinks=True)
            result = other.run('-d', '-f', name)
            self.assertEqual(result.status, 1)
            self.assertIn('delete authorization', result.err)


if __name__ == '__main__':
    unittest.main()
