# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""Operands @@NAME and @FILE of -c: entries of stored archives and tar files.

What scripts make of @@NAME are monthly copies of daily archives, and new names
for old ones; so a copy must cost nothing, and either archive must outlive the
other, to the last count.  What is in a tar file must be stored as if its files
had been; what is wrong with it must be said, and lose nothing before it.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import random
import shutil
import subprocess
import tarfile
import unittest
from unittest import mock

import lab
import tarsnap
from lab import D, R, W, LabTest, difference, snapshot
from test_counts import SEED, CountTest


class Archives(CountTest):
    """CLI 5.7 @@ARCHIVE."""

    def setUp(self):
        super().setUp()
        self.write('d1/large', self.rng.randbytes(60000))   # lists of lists
        self.write('d2/linked', self.rng.randbytes(3000))
        os.link(os.path.join(self.lab.tree, 'd2/linked'),
                os.path.join(self.lab.tree, 'also'))
        os.symlink('d1/large', os.path.join(self.lab.tree, 'e'))
        self.model = snapshot(self.lab.tree)
        self.host.create('daily')

    def merge(self, name, *args, **options):
        """-c of `name`; (Result, stored lengths of blocks sent by class)."""
        with lab.tapped() as log:
            result = self.host.good('-c', '-f', name, *args, **options)
        return result, {cls: [row[2] for row in log.puts(cls)]
                        for cls in (b'a', b'i', b'c')}

    def listed(self, name, *args):
        return self.host.good('-t', '-f', name, *args, cache=False
                              ).out.splitlines()

    def test_a_copy_sends_its_record_only(self):
        result, sent = self.merge('monthly', '--print-stats', '@@daily')
        self.assertEqual((len(sent[b'a']), sent[b'i'], sent[b'c']),
                         (1, [], []))
        self.assertLess(sent[b'a'][0], 4096)
        self.assertIn('New data', result.err)
        self.host.check('monthly', self.model)
        self.assertEqual(self.listed('monthly'), self.listed('daily'))
        self.audit(self.host)

    def test_acts_passes_its_options_on(self):
        result, sent = self.merge(
            'host-monthly-2026-11-23_04:00:00', '--one-file-system',
            '--humanize-numbers', '--exclude', 'no such', '-C', '/',
            '@@daily')
        self.assertEqual(((len(sent[b'a']), sent[b'i'], sent[b'c']),
                          result.err), ((1, [], []), ''))
        self.host.check('host-monthly-2026-11-23_04:00:00', self.model)
        self.audit(self.host)

    def test_c4rlo_copies_then_deletes_the_old(self):
        self.merge('new', '@@daily')
        self.host.good('-d', '-f', 'daily')
        self.audit(self.host)
        self.host.check('new', self.model)
        self.merge('back', '@@new')
        self.host.good('-d', '-f', 'back')
        self.audit(self.host)
        self.host.check('new', self.model)
        self.host.good('-d', '-f', 'new')
        self.assertEqual(self.lab.live(), {})

    def test_filters_apply(self):
        all_names = self.listed('daily')
        for number, (args, want) in enumerate((
                (('--exclude', 'd1'), lambda n: not n.startswith('./d1/')),
                (('--include', './d2'), lambda n: n.startswith('./d2/')),
                (('--exclude', 'large'), lambda n: n != './d1/large'),
                (('--exclude', 'd*'), lambda n: '/d' not in n),
        )):
            with self.subTest(args=args):
                name = 'chosen-%d' % number
                _, sent = self.merge(name, *args, '@@daily')
                self.assertEqual(sent[b'c'], [])
                self.assertEqual(self.listed(name),
                                 [n for n in all_names if want(n)])
                self.audit(self.host)
        self.host.good('-d', '-f', 'daily')
        self.audit(self.host)
        self.assertEqual(
            snapshot(self.host.extract('chosen-2'))[b'd2/linked']['content'],
            self.model[b'd2/linked']['content'])

    def test_several_and_paths(self):
        self.write('f', b'of today')
        self.host.create('other', 'd2', 'f')
        args = ('-C', self.lab.tree, 'd1', '@@daily', 'f', '@@other',
                '@@daily')
        result, sent = self.merge('mixed', '-v', *args)
        parts = [self.walked('d1'), self.listed('daily'), ['f'],
                 self.listed('other'), self.listed('daily')]
        names = [name for part in parts for name in part]
        self.assertEqual(self.listed('mixed'), names)
        # -v says each of them, as for a path.
        self.assertEqual(result.err.splitlines(), [
            'a ' + name.rstrip('/') for name in names])
        self.merge('quiet', *args)
        self.assertEqual(self.listed('quiet'), names)
        self.audit(self.host)
        for name in ('d1/large', 'f', './d2/linked', 'd2/linked'):
            self.assertEqual({found.replace('./', '') for found in
                              self.listed('quiet', name)},
                             {name.replace('./', '')})
        for name in ('daily', 'mixed', 'other'):
            self.host.good('-d', '-f', name)
            self.audit(self.host)
        self.host.check('quiet', snapshot(self.lab.tree))

    def walked(self, top):
        self.host.create('alone', top)
        return self.listed('alone')

    def test_order_is_known(self):
        """A lookup by path trusts the record's flag that names rise."""
        self.host.create('low', 'd1')
        self.host.create('high', 'd2')
        for name, args, rising in (
                ('up', ('@@low', '@@high'), True),
                ('down', ('@@high', '@@low'), False),
                ('twice', ('@@low', '@@low'), False),
                ('after', ('@@high', '-C', self.lab.tree, 'd1'), False)):
            with self.subTest(name):
                records, real = [], tarsnap.Writer.record

                def record(*args):
                    records.append(real(*args))
                    return records[-1]

                with mock.patch.object(tarsnap.Writer, 'record', record):
                    self.merge(name, *args)
                self.assertEqual(records[-1].sorted, rising)

    def test_next_run_of_a_mix_reuses_its_pages(self):
        args = ('-C', self.lab.tree, 'd1', '@@daily', 'd2')
        self.merge('one', *args)
        _, sent = self.merge('two', *args)
        self.assertEqual((sent[b'i'], sent[b'c']), ([], []))
        self.assertEqual(self.listed('two'), self.listed('one'))

    def test_checkpoints_between(self):
        self.write('big', self.rng.randbytes(3000000))
        self.merge('one', '--checkpoint-bytes=1000000', '-C',
                   self.lab.tree, 'big', '@@daily', 'd1')
        self.audit(self.host, garbage=True)
        self.host.good('-d', '-f', 'daily')
        self.audit(self.host)
        self.assertEqual(
            snapshot(self.host.extract('one'))[b'd1/large']['content'],
            self.model[b'd1/large']['content'])

    def test_dry_run(self):
        real = self.merge('real', '--print-stats', '@@daily')[0]
        before = self.host.seq()
        for cache in (True, False):
            result, sent = self.merge('no', '--dry-run', '--print-stats',
                                      '@@daily', cache=cache)
            self.assertEqual(sum(map(len, sent.values())), 0)
            # Without a cache directory only lengths are known.
            size, wanted = (int(text.split('This archive')[1].split()[0])
                            for text in (result.err, real.err))
            self.assertAlmostEqual(size, wanted, delta=wanted // 4)
        self.assertEqual(self.host.seq(), before)


class Refusals(CountTest):
    """What an operand @@NAME cannot be."""

    def refused(self, host, *args):
        before = self.lab.live()
        result = host.run('-c', '-f', 'copy', *args)
        self.assertEqual(result.status, 1, result)
        self.assertEqual(self.lab.live(), before)
        return result.err

    def test_one_that_does_not_exist(self):
        self.host.create('one')
        self.assertTrue(self.refused(
            self.host, '@@one', '-C', self.lab.tree, 'd1', '@@two'
        ).startswith('tarsnap: Archive does not exist: two\n'))

    def test_without_read_authority(self):
        self.host.create('one')
        for roles in ((W,), (W, D)):
            key = self.lab.key.subset(set(roles))
            host = self.lab.host('w%d' % len(roles), key=key, roles=roles)
            host.good('--fsck')
            self.assertIn('read', self.refused(host, '@@one'))
        self.assertIn('write', self.refused(
            self.lab.host('r', (R,)), '@@one'))

    def test_one_deleted_meanwhile(self):
        """By another host, between its being found and the commit."""
        self.host.create('one')
        other = self.lab.host('b')
        other.good('--fsck')
        real = tarsnap.Transaction.commit_object

        def commit_object(txn, *args):
            self.lab.crash(other, mock.patch.object(
                tarsnap.Transaction, 'commit_object', real),
                '-d', '-f', 'one')
            return real(txn, *args)

        with mock.patch.object(tarsnap.Transaction, 'commit_object',
                               commit_object):
            result = self.host.run('-c', '-f', 'copy', '@@one')
        self.assertEqual(result.status, 1, result)
        self.assertIn('deleted meanwhile', result.err)
        self.assertEqual(self.lab.live(), {})

    def test_only_in_mode_c(self):
        self.write('@@one', b'a file of that name')
        self.host.create('one', './@@one')
        self.assertEqual(self.host.good('-t', '-f', 'one', '@@one').out,
                         './@@one\n')


@contextlib.contextmanager
def stdin(path, pipe=False):
    """Standard input from a file, or from a pipe with what is in it."""
    copy = os.dup(0)
    feeder = pipe and subprocess.Popen(['cat', path], stdout=subprocess.PIPE)
    file = feeder.stdout if pipe else open(path, 'rb')
    try:
        os.dup2(file.fileno(), 0)
        file.close()
        yield
    finally:
        os.dup2(copy, 0)
        os.close(copy)
        if feeder:
            feeder.wait()


class TarTest(LabTest):
    def setUp(self):
        super().setUp()
        self.write('a/small', b'small')
        self.write('a/medium', os.urandom(90000))
        self.write('a/large', os.urandom(700000))
        self.write(os.fsdecode(b'caf\xe9'), b'not UTF-8')
        self.write('n' * 130 + '/' + 'm' * 120, b'long')
        tree = self.lab.tree
        os.link(os.path.join(tree, 'a/small'), os.path.join(tree, 'also'))
        os.link(os.path.join(tree, 'a/large'), os.path.join(tree, 'last'))
        os.symlink('a/small', os.path.join(tree, 'sym'))
        os.mkfifo(os.path.join(tree, 'fifo'))
        os.chmod(os.path.join(tree, 'a/medium'), 0o4711)
        for top, folders, files in os.walk(tree, topdown=False):
            for path in [top] + [os.path.join(top, name) for name in files]:
                # A half, which tarfile's floating point numbers can say.
                os.utime(path, ns=(1500000000500000000,) * 2,
                         follow_symlinks=False)
        self.model = snapshot(tree)

    def tar(self, name='t.tar', opener=open, **options):
        """A tar file of the tree; its path."""
        path = self.lab.path(name)
        with opener(path, 'wb') as file, tarfile.open(
                fileobj=file, mode='w', errors='surrogateescape',
                **options) as tar:
            tar.add(self.lab.tree, '.')
        return path

    def check(self, name, model=None):
        found = snapshot(self.host.extract(name))
        wanted = dict(model or self.model)
        self.assertEqual(difference(wanted, found), [])


class TarFiles(TarTest):
    """CLI 5.7 @FILE, @-."""

    def test_formats_and_compressions(self):
        for number, (opener, form) in enumerate((
                (open, tarfile.PAX_FORMAT), (gzip.open, tarfile.PAX_FORMAT),
                (bz2.open, tarfile.PAX_FORMAT),
                (lzma.open, tarfile.PAX_FORMAT),
                (open, tarfile.GNU_FORMAT))):
            with self.subTest(opener=opener, form=form):
                path = self.tar('t%d' % number, opener, format=form)
                model = {name: dict(row, mtime=row['mtime'] // 10 ** 9
                                    * 10 ** 9)
                         for name, row in self.model.items()} \
                    if form == tarfile.GNU_FORMAT else self.model
                for kind, pipe in (('file', None), ('stdin', False),
                                   ('pipe', True)):
                    name = '%d-%s' % (number, kind)
                    if pipe is None:
                        self.host.good('-c', '-f', name, '@' + path)
                    else:
                        with stdin(path, pipe):
                            self.host.good('-c', '-f', name, '@-')
                    self.check(name, model)

    def test_a_directory_is_none(self):
        # A file named @... that was meant as such, mostly.
        for words in (['@' + self.lab.tree], ['-C', self.lab.root, '@tree']):
            result = self.host.run('-c', '-f', words[-1], *words)
            self.assertEqual(result.status, 2)
            self.assertIn('tree: Cannot open: Is a directory\n', result.err)
        # As of `tarsnap -c -f x *`.
        with open(self.lab.path('@at'), 'w'):
            pass
        result = self.host.run('-c', '-f', 'at', '-C', self.lab.root, '@at')
        self.assertIn('tarsnap: at: Cannot open: No such file or directory '
                      '(what is named @at itself is given as ./@at)\n',
                      result.err)

    def test_same_content_is_not_sent_again(self):
        self.host.create('tree')
        with lab.tapped() as log:
            self.host.good('-c', '-f', 'tar', '@' + self.tar())
        self.assertLess(sum(row[2] for row in log.puts(b'c')), 2000)

    def test_what_r_writes(self):
        os.setxattr(os.path.join(self.lab.tree, 'a/small'), 'user.x',
                    b'\xff=\0%\n')
        os.setxattr(os.path.join(self.lab.tree, 'a/small'), 'user.%=',
                    b'')
        with open(os.path.join(self.lab.tree, 'sparse'), 'wb') as file:
            file.truncate(3000000)
            file.seek(1000000)
            file.write(b'between')
        self.host.create('one')
        path = self.lab.path('r.tar')
        with open(path, 'wb') as file:
            file.write(self.host.good('-r', '-f', 'one').out.encode(
                'utf-8', 'surrogateescape'))
        for name, pipe in (('file', False), ('pipe', True)):
            with stdin(path, pipe):
                self.host.good('-c', '-f', name, '@-')
            self.check(name, snapshot(self.lab.tree))

    def test_gnu_tar(self):
        """Attributes, ACLs, holes, nanoseconds, many hard links apart."""
        if not shutil.which('tar') or not shutil.which('setfacl'):
            self.skipTest('GNU tar or setfacl is missing')
        tree = self.lab.tree
        os.setxattr(os.path.join(tree, 'a/small'), 'user.x',
                    b'\xff=\0%\n')
        subprocess.check_call(['setfacl', '-m', 'u:1234:rw,g:0:r',
                               os.path.join(tree, 'a/medium')])
        subprocess.check_call(['setfacl', '-d', '-m', 'u:1234:rwx',
                               os.path.join(tree, 'a')])
        with open(os.path.join(tree, 'sparse'), 'wb') as file:
            file.truncate(3000000)
            file.seek(1000000)
            file.write(b'between')
        os.utime(os.path.join(tree, 'also'), ns=(1, 1234567890123456789))
        self.model = snapshot(tree)
        for number, args in enumerate((
                (), ('--sparse',), ('--sparse', '--sparse-version=0.1'),
                ('-z',))):
            path = self.lab.path('gnu%d' % number)
            subprocess.check_call(
                ['tar', '--format=pax', '--xattrs', '--acls', *args, '-cf',
                 path, '-C', tree, '.'])
            name = 'gnu%d' % number
            self.host.good('-c', '-f', name, '@' + path)
            self.check(name)
        with stdin(path, True):
            self.host.good('-c', '-f', 'piped', '@-')
        self.check('piped')
        # Said once for all names of a file; and one may be empty.
        os.setxattr(os.path.join(tree, 'a/small'), 'user.empty', b'')
        os.link(os.path.join(tree, 'a/small'), os.path.join(tree, 'second'))
        path = self.lab.path('linked')
        subprocess.check_call(
            ['tar', '--format=pax', '--xattrs', '-cf', path, '-C', tree,
             'a/small', 'second'])
        for name, pipe in (('linked', False), ('linked pipe', True)):
            with stdin(path, pipe):
                self.host.good('-c', '-f', name, '@-')
            out = os.path.join(self.host.extract(name, 'second'), 'second')
            self.assertEqual(
                {key: os.getxattr(out, key) for key in os.listxattr(out)},
                {'user.x': b'\xff=\0%\n', 'user.empty': b''})
        self.host.good('-r', '-f', 'piped')
        out = os.stat(os.path.join(self.host.extract('gnu1'), 'sparse'))
        self.assertLess(out.st_blocks, 1000)

    def test_filters_names_and_places(self):
        path = self.lab.path('t.tar')
        with tarfile.open(path, 'w') as tar:
            for name in ('/abs/one', 'two/x', 'two/y', './three'):
                info = tarfile.TarInfo(name)
                info.size = 3
                tar.addfile(info, io.BytesIO(b'abc'))
        for args, wanted, said in (
                ((), ['abs/one', 'two/x', 'two/y', './three'], 1),
                (('-P',), ['/abs/one', 'two/x', 'two/y', './three'], 0),
                (('--exclude', 'two'), ['abs/one', './three'], 1),
                (('--include', 'two', '--exclude', 'y'), ['two/x'], 1),
                (('-s', '/two/2/', '--exclude', 'one'),
                 ['2/x', '2/y', './three'], 1)):
            with self.subTest(args=args):
                result = self.host.good(
                    '-c', '-f', 'n%s' % hash(args), *args, '-C',
                    self.lab.root, '@t.tar')
                said += 'created for' in result.err
                self.assertLessEqual(result.err.count('\n'), said)
                self.assertEqual(self.host.good(
                    '-t', '-f', 'n%s' % hash(args)).out.splitlines(), wanted)

    def test_checkpoint_between_the_names_of_a_file(self):
        """Each of them has all of it, whatever is deleted afterwards."""
        with lab.fine(), stdin(self.tar(), True):
            self.host.good('-c', '-f', 'one', '--checkpoint-bytes=1MB', '@-')
        for path in (self.write('b', os.urandom(1500000)), self.lab.tree):
            os.utime(path, ns=(1500000000500000000,) * 2)
        self.model = snapshot(self.lab.tree)
        with lab.fine(), lab.tapped() as log:
            self.host.good('-c', '-f', 'two', '--checkpoint-bytes=1MB',
                           '@' + self.tar())
        self.assertIn(tarsnap.CHECKPOINT, log.kinds())
        self.host.good('-d', '-f', 'one')
        self.check('two')

    def test_progress(self):
        self.host.good('--initialize-cachedir')
        lines = self.host.good('-c', '-f', 'one', '--progress-bytes', '1k',
                               '@' + self.tar()).err.splitlines()
        self.assertIn('copying ./a/medium (0 / 90000 bytes)', lines)
        self.assertTrue(lines[-1].startswith('Processed 12 entries, '))

    def test_a_pipe_cannot_be_read_twice(self):
        self.host.create('base')
        real = tarsnap.Transaction.commit_object

        def commit_object(txn, *args):
            raise tarsnap.Restart

        with stdin(self.tar(), True), mock.patch.object(
                tarsnap.Transaction, 'commit_object', commit_object):
            result = self.host.run('-c', '-f', 'one', '@-')
        self.assertEqual(result.status, 1)
        self.assertIn('standard input cannot be read again', result.err)
        self.assertTrue(real)


class TarDamage(TarTest):
    """One clear line; what came before is stored; exit 2."""

    def damaged(self, name, data, entries=None):
        path = self.lab.path('damaged')
        with open(path, 'wb') as file:
            file.write(data)
        with self.subTest(name):
            result = self.host.run('-c', '-f', name, '@' + path)
            self.assertEqual(result.status, 2, result)
            lines = [line for line in result.err.splitlines()
                     if line.startswith('tarsnap: ' + path)]
            self.assertEqual(len(lines), 1, result)
            found = self.host.good('-t', '-f', name).out.splitlines()
            if entries is not None:
                self.assertEqual(len(found), entries, lines)
            return lines[0]

    def test_table(self):
        path = self.tar(format=tarfile.PAX_FORMAT)
        with open(path, 'rb') as file:
            good = file.read()
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        at = [member.name for member in members].index('./a/large')
        data = members[at].offset_data
        self.assertIn('unexpected end', self.damaged(
            'cut in content', good[:data + 100000], at))
        self.assertIn('damaged header', self.damaged(
            'cut in a header', good[:members[at].offset + 100], at))
        flipped = bytearray(good)
        flipped[members[at].offset + 5] ^= 1
        self.assertIn('damaged header', self.damaged(
            'a header with a bit flipped', bytes(flipped), at))
        end = members[-1].offset_data + (members[-1].size + 511) // 512 * 512
        self.assertIn('end mark', self.damaged(
            'no end mark', good[:end], len(members)))
        self.assertIn('not a tar file', self.damaged(
            'no tar file', b'hello' * 1000, 0))
        self.assertIn('not a tar file', self.damaged('empty', b'', 0))
        for name, pack in (('gz', gzip.compress), ('bz2', bz2.compress),
                           ('xz', lzma.compress)):
            packed = pack(good)
            self.damaged('cut ' + name, packed[:len(packed) // 2])
            torn = bytearray(packed)
            torn[len(torn) // 2] ^= 255
            self.damaged('torn ' + name, bytes(torn))

    def test_entries_that_cannot_be(self):
        def made(name, **fields):
            info = tarfile.TarInfo(name)
            for field, value in fields.items():
                setattr(info, field, value)
            return info.tobuf(tarfile.GNU_FORMAT)

        good = made('good')
        for name, buf, words in (
                ('unknown', made('odd', type=b'Z'), 'unknown type'),
                ('hard link', made('odd', type=tarfile.LNKTYPE,
                                   linkname='nothing'), 'hard link to'),
                ('number', made('odd', uid=1 << 40), 'out of range')):
            self.assertIn(words, self.damaged(
                name, good + buf + good + bytes(1024), 2))

    def test_noise_in_headers(self):
        """Any damage is a line, or is not seen; never a crash."""
        path = self.tar(format=tarfile.PAX_FORMAT)
        with open(path, 'rb') as file:
            good = file.read()
        with tarfile.open(path) as tar:
            heads = [member.offset for member in tar.getmembers()]
        rng = random.Random(SEED)
        for _ in range(25):
            data = bytearray(good)
            for _ in range(3):
                # Also in what describes an entry before its header.
                at = rng.choice(heads) - rng.choice((0, 0, 1024)) \
                    + rng.randrange(512)
                data[at % len(data)] = rng.randrange(256)
            with open(path, 'wb') as file:
                file.write(data)
            result = lab.run(['--no-default-config', '-c', '--dry-run',
                              '@' + path])
            self.assertIn(result.status, (0, 1))
            self.assertNotIn('Traceback', result.err)


if __name__ == '__main__':
    unittest.main()
