#!/usr/bin/env python3
# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Bytes flipped and objects lost, everywhere in a store; each is named.

usage: tests/rot.py [--seed N] [--seconds N] [--count N] [--every] [--s3]

Run by `make rot ROT=...`, and for a few cases by `make test`.

A small store with all that a server keeps: archives with chunks, pages and
records, a deletion, segments the cleaner made, extracts, an account.  Each
case harms one object: a byte of one of its parts is flipped, it is cut,
emptied, lost, doubled, or exchanged with another.  Then, with the index that
was there or with none:

    scrub      names the object, and fails; it has seen the store when all
               was well
    -x         of each archive brings back what was stored, or names the file
               that it cannot, goes on with the rest, and fails
    --verify   and --fsck --read-data name the archives and files that -x
               could not restore, and no other

No file comes back wrong in silence, and nothing is lost that is not in what
was harmed.  --every flips every byte of every object, one after the other,
for as long as the seconds last; --s3 does it in a bucket.
"""

import argparse
import collections
import os
import random
import re
import shutil
import sys
import time
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import lab                                      # noqa: E402
import s3peers                                  # noqa: E402
import tarsnap                                  # noqa: E402
import tarsnapd                                 # noqa: E402
from lab import snapshot                        # noqa: E402

# One harm to one object; `byte` is the one that is flipped, `part` says of
# what it is.
Case = collections.namedtuple('Case', 'key harm byte part index')
HARMS = ('cut', 'half', 'empty', 'lost', 'doubled', 'swapped')


class Store:
    """The store as it was, what is in it, and what each block is good for."""

    def __init__(self, test, seed):
        self.test = test
        self.rng = random.Random(seed)
        with mock.patch.object(tarsnap, 'RACY', 0), lab.fine():
            self.lab = lab.Lab(test)
            self.host = self.lab.host()
            self.models = {}
            self.fill()
        self.dropped = set()        # segments that the log has dropped
        self.tend()
        self.lab.save('whole')
        self.keys = self.objects()
        self.needs = {name: self.needed(name) for name in self.models}

    # Making it.

    def fill(self):
        for name, files in (('gone', ('a', 'b', 'c')),
                            ('one', ('a', 'b', 'd1', 'd2', 'large')),
                            ('two', ('a', 'd1', 'd3', 'large', 'more'))):
            shutil.rmtree(self.lab.tree)
            os.mkdir(self.lab.tree)
            for file in files:
                noise = random.Random(file)
                size = 150000 if file in ('large', 'more') else 2500
                path = os.path.join(self.lab.tree, file)
                with open(path, 'wb') as out:
                    out.write(noise.randbytes(size))
                os.utime(path, (10 ** 9, 10 ** 9))
            self.models[name] = snapshot(self.lab.tree)
            self.host.create(name)
        self.host.good('-d', '-f', 'gone')
        del self.models['gone']

    def tend(self):
        """A round of the cleaner, an account, and a whole scrub."""
        policy = tarsnapd.Policy()
        policy.gain, policy.used = 1, 99
        with lab.no_fsync():
            server = tarsnapd.Server(self.lab.store)
            server.run(tarsnapd.clean(self.lab.key.machine, policy,
                                      tarsnapd.Cleaned()))
            with mock.patch.object(tarsnapd, 'SCRYPT', (4, 8, 1)):
                server.run(tarsnapd.account_create('joe', b'pw'))
            self.dropped = {key for key, dropped in server.perform((
                'index', self.lab.key.machine, 'segments_of', 'seg/'))
                if dropped}
            server.close()
        self.test.assertEqual(self.scrub(), {})

    def objects(self):
        """{key: bytes} of all there is."""
        found = {}
        top = os.path.join(self.lab.store, 'store')
        for where, _, names in os.walk(top):
            for name in names:
                path = os.path.join(where, name)
                with open(path, 'rb') as file:
                    found[os.path.relpath(path, top)] = file.read()
        return dict(sorted(found.items()))

    def needed(self, archive):
        """{block name: paths of the files that are lost with it}."""
        remote = tarsnap.Remote(self.lab.key, (lab.R,))
        fetcher = tarsnap.Fetcher(remote)
        needs = collections.defaultdict(set)

        def lists(kids, level, path):
            for kid in kids:
                needs[kid.name].add(path)
                if level:
                    lists(fetcher.get(kid).kids, level - 1, path)

        def pages(kids, level, above):
            for kid in kids:
                block, names = fetcher.get(kid), above + [kid.name]
                if level:
                    pages(block.kids, level - 1, names)
                    continue
                for entry in tarsnap.page_rows(block):
                    path = os.path.normpath(entry.path)
                    for name in names:
                        needs[name].add(path)
                    lists([block.kids[extent[0]] for extent in entry.extents],
                          0, path)
                    lists([block.kids[number] for number in entry.lists],
                          entry.level, path)

        try:
            name = self.record(archive)
            record = fetcher.get(tarsnap.record_kid(name))
            pages(record.kids, record.level, [name])
        finally:
            fetcher.close()
            remote.close()
        return needs

    def record(self, archive):
        with self.host.database() as db:
            return db.execute(
                'SELECT record FROM archives WHERE id = ?',
                (tarsnap.Names(self.lab.key).archive(archive.encode()),)
            ).fetchone()[0]

    # What there is to harm.

    def parts(self, key, data):
        """[(what, first byte, end)] of an object's parts."""
        if key.startswith('seg/'):
            return self.segment_parts(data)
        if key.startswith('log/'):
            return self.log_parts(data)
        if key.startswith('list/'):
            return [('magic', 0, 16), ('count', 16, 20),
                    ('rows', 20, len(data) - 32),
                    ('sum', len(data) - 32, len(data))]
        return [('content', 0, len(data))]

    def segment_parts(self, data):
        start, count, _, _ = tarsnapd.FOOTER.unpack(
            data[-tarsnapd.FOOTER.size:])
        parts = [('magic', 0, len(tarsnapd.SEGMENT_MAGIC))]
        for number, row in enumerate(tarsnapd.ROW.iter_unpack(
                data[start:start + count * tarsnapd.ROW.size])):
            _, cls, offset, length, _ = row
            parts += [('header', offset - tarsnapd.ENTRY.size, offset),
                      ('entry %d %s' % (number, cls.decode()), offset,
                       offset + length)]
        end = len(data) - tarsnapd.FOOTER.size
        return parts + [('table', start, end), ('footer', end, len(data))]

    @staticmethod
    def log_parts(data):
        head = tarsnapd.LOG_HEAD.size
        commit = head + tarsnapd.LOG_HEAD.unpack(data[:head])[-1]
        parts = [('head', 0, head), ('commit', head, commit),
                 ('segments', commit, len(data) - 32),
                 ('sum', len(data) - 32, len(data))]
        return [part for part in parts if part[1] < part[2]]

    def cases(self):
        """One case for each part of each object, and each harm, in an order
        of chance.
        """
        out = []
        for key, data in self.keys.items():
            for what, start, end in self.parts(key, data):
                out.append(Case(key, 'flip', self.rng.randrange(start, end),
                                what, self.rng.random() < 0.5))
            out += [Case(key, harm, 0, harm, self.rng.random() < 0.5)
                    for harm in HARMS]
        self.rng.shuffle(out)
        return out

    def every(self):
        """Every byte of every object."""
        for key, data in self.keys.items():
            for what, start, end in self.parts(key, data):
                for byte in range(start, end):
                    yield Case(key, 'flip', byte, what, byte % 2)

    # Harming and looking.

    def harm(self, case):
        """The store as it was, but for this."""
        self.restore()
        if not case.index:
            shutil.rmtree(os.path.join(self.lab.store, 'index'))
            os.mkdir(os.path.join(self.lab.store, 'index'))
        data = self.keys[case.key]
        flipped = bytearray(data)
        flipped[case.byte] ^= 1 << self.rng.randrange(8)
        bad = {'flip': bytes(flipped), 'cut': data[:-1],
               'half': data[:len(data) // 2], 'empty': b'', 'lost': None,
               'doubled': data + data}.get(case.harm)
        if case.harm == 'swapped':
            other = self.like(case.key)
            bad = self.keys[other]
            self.write(other, data)
        self.write(case.key, bad)

    def restore(self):
        """All as it was."""
        shutil.rmtree(self.lab.store)
        shutil.copytree(self.lab.path('whole'), self.lab.store,
                        symlinks=True)

    def like(self, key):
        """Another object of the same kind, or at least another."""
        kind = key.split('/')[0]
        others = [x for x in self.keys if x != key]
        return ([x for x in others if x.split('/')[0] == kind] or others)[0]

    def write(self, key, data):
        path = os.path.join(self.lab.store, 'store', key)
        os.unlink(path)
        if data is not None:
            with open(path, 'wb') as file:
                file.write(data)

    def scrub(self):
        """{key: Damage}, or an error in words."""
        with lab.no_fsync():
            try:
                server = tarsnapd.Server(self.lab.store)
            except tarsnapd.ServerError as e:
                return str(e)
            run = tarsnapd.ScrubRun(server)
            try:
                with mock.patch.object(tarsnapd.time, 'sleep', int):
                    run.run()
            finally:
                run.close()
                server.close()
            return run.scrub.damage

    def check(self, case):
        """Do one case; how many files it cost."""
        self.harm(case)
        found = self.scrub()
        self.named(case, found)
        where = os.path.join(self.lab.store, 'index')
        shutil.rmtree(where)
        if case.index:
            shutil.copytree(self.lab.path('whole', 'index'), where)
        else:
            os.mkdir(where)
        cost = {name: self.extract(case, name) for name in self.models}
        self.verify(case, cost)
        return sum(map(len, cost.values()))

    def named(self, case, found):
        """Scrub says which object it is."""
        keys = {case.key}
        if case.harm == 'swapped':
            keys.add(self.like(case.key))
        if isinstance(found, str):      # nothing opens such a store
            self.test.assertIn('store-id', keys, (case, found))
            self.test.assertIn('store-id', found, case)
            return
        text = ' '.join(tarsnapd.scrub_line(x) for x in found.values())
        for key in keys:
            if case.harm == 'lost' and (
                    key in self.dropped or key.startswith('address/')
                    or self.objects().get(key) == self.keys[key]):
                # Of no use; may never have been made; an extract, made again.
                continue
            # Of what is missing, what should lead to it tells.
            number = key.split('/')[1][:16] if '/' in key else key
            self.test.assertIn(
                number if case.harm in ('lost', 'swapped') else key, text,
                case)

    def extract(self, case, name, *more):
        """Restore an archive; the paths that did not come back whole."""
        target = self.lab.fresh()
        os.mkdir(target)
        result = self.host.run('-x', '-f', name, '-C', target, *more,
                               cache=False)
        found, model = snapshot(target), dict(self.models[name])
        shutil.rmtree(target)
        if more == () and 'is not the one signed' in result.err:
            return self.extract(case, name, '--accept-rollback')
        assert 'Traceback' not in result.err, (case, result)
        found[b''] = model[b'']
        hit = {path for path in model if found.get(path) != model[path]}
        self.test.assertEqual(set(found) - set(model), set(), (case, result))
        self.test.assertEqual(result.status, 1 if hit else 0, (case, result))
        may = self.may(case, name)
        self.test.assertLessEqual(hit, may, (case, result))
        if hit != set(model) - {b''}:
            self.said(case, hit, result.err)
        return hit

    def said(self, case, paths, text):
        """Each path is named, or the page that had its name is."""
        for path in paths if 'the entries it holds are lost' not in text \
                else ():
            self.test.assertRegex(text, r'\b%s\b' % re.escape(path.decode()),
                                  case)

    def may(self, case, name):
        """Paths that this harm may cost in the archive."""
        everything = set(self.models[name])
        keys = {case.key}
        if case.harm == 'swapped':
            keys.add(self.like(case.key))
        may = set()
        for key in keys:
            if key.startswith(('machine/', 'store-id')):
                may |= everything       # nobody is let in
            elif key.startswith('log/') and not case.index:
                # What it linked is not in the list any more.
                entry = tarsnapd.log_decode(
                    self.lab.key.machine, int(key[-3:]), self.keys[key])
                commit = entry.commit and tarsnapd.commit_decode(entry.commit)
                ids = [link[0] for link in commit.linked] if commit else []
                if tarsnap.Names(self.lab.key).archive(
                        name.encode()) in ids:
                    may |= everything
            elif key.startswith('seg/'):
                data = self.keys[key]
                start, count, _, _ = tarsnapd.FOOTER.unpack(
                    data[-tarsnapd.FOOTER.size:])
                for row in tarsnapd.ROW.iter_unpack(
                        data[start:start + count * tarsnapd.ROW.size]):
                    if case.harm != 'flip' or (
                            row[2] <= case.byte < row[2] + row[3]):
                        may |= self.needs[name].get(row[0], set())
        return may

    def verify(self, case, cost):
        """--verify and --fsck name what -x could not restore."""
        result = self.host.run('--verify', cache=False)
        assert 'Traceback' not in result.err, (case, result)
        if 'is not the one signed' in result.err:
            return
        lost = any(cost.values())
        self.test.assertEqual(result.status, 1 if lost else 0,
                              (case, cost, result))
        if 'Verified' in result.out:
            for name, paths in cost.items():
                if paths == set(self.models[name]) - {b''}:
                    continue        # its record or its only page
                self.said(case, paths, result.out)
        if lost and case.key.startswith('seg/') and case.harm == 'flip':
            self.test.assertIn(case.key, result.out + result.err,
                               (case, result))
        shutil.rmtree(self.host.cache)
        os.mkdir(self.host.cache, 0o700)
        result = self.host.run('--fsck', '--read-data')
        assert 'Traceback' not in result.err, (case, result)
        if 'lists of commit' in result.err or 'is lost' in result.err:
            return
        self.test.assertEqual(result.status, 1 if lost else 0,
                              (case, cost, result))
        if 'Phase 5' in result.out:
            for name, paths in cost.items():
                if paths and self.record(name):
                    self.test.assertRegex(
                        result.err, 'Archive ("%s"|with the id).* is damaged'
                        % name, (case, result))


class BucketStore(Store):
    """The same in a bucket of `peer`; its environment must be there."""

    def __init__(self, test, seed, peer):
        self.harmed = set()             # keys
        real = tarsnapd.server_create
        tarsnapd.Bucket('backup', {}).request('create', '', 'PUT')
        with mock.patch.object(
                tarsnapd, 'server_create',
                lambda path: real(path, {'store': 's3://backup/x'})):
            super().__init__(test, seed)

    def bucket(self):
        return tarsnapd.store_open(self.lab.store,
                                   tarsnapd.conf_read(self.lab.store))

    def objects(self):
        bucket = self.bucket()
        return {key: bucket.get(key) for key in bucket.list('')
                if key != 'probe'}

    def restore(self):
        super().restore()
        for key in self.harmed:
            self.bucket().delete(key)
            self.bucket().put(key, self.keys[key])
        self.harmed.clear()

    def write(self, key, data):
        self.harmed.add(key)
        self.bucket().delete(key)
        if data is not None:
            self.bucket().put(key, data)


class Here:
    """What Lab wants of a test, outside of one."""

    def __init__(self):
        import unittest
        self.test = unittest.TestCase()
        self.undo = []

    def addCleanup(self, *call):
        self.undo.append(call)

    def __getattr__(self, name):
        return getattr(self.test, name)

    def close(self):
        while self.undo:
            function, *args = self.undo.pop()
            function(*args)


def main():
    parser = argparse.ArgumentParser(
        description='Bytes flipped and objects lost, everywhere in a store.')
    parser.add_argument('--seed', type=int, metavar='N',
                        default=random.SystemRandom().getrandbits(32))
    parser.add_argument('--seconds', type=float, default=600, metavar='N',
                        help='at most (default 600)')
    parser.add_argument('--count', type=int, default=10 ** 9, metavar='N',
                        help='of cases, at most')
    parser.add_argument('--every', action='store_true',
                        help='every byte of every object')
    parser.add_argument('--s3', action='store_true', help='in a bucket')
    args = parser.parse_args()
    print('SEED=%d' % args.seed, flush=True)
    end, here = time.monotonic() + args.seconds, Here()
    count = cost = 0
    try:
        if args.s3:
            peer = s3peers.Moto()
            here.addCleanup(peer.close)
            os.environ.update(peer.environment())
        store = BucketStore(here, args.seed, peer) if args.s3 else \
            Store(here, args.seed)
        print('%d objects, %d bytes' % (
            len(store.keys), sum(map(len, store.keys.values()))), flush=True)
        for case in store.every() if args.every else store.cases():
            if time.monotonic() > end or count == args.count:
                break
            cost += store.check(case)
            count += 1
    finally:
        here.close()
    print('%d cases: each named; %d files that could not be restored, all '
          'named' % (count, cost))


if __name__ == '__main__':
    main()
