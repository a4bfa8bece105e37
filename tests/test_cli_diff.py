# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""--diff: lines, JSON and status; what is the same costs nothing."""

import json
import os
import random
import shutil
import unittest
from unittest import mock

import lab
import readlab
import tarsnap

OLD = readlab.OLD
ROOT = os.geteuid() == 0


def rewrite(path, data, seconds=OLD):
    """Another content for a file, new or not, and nothing else."""
    mode = os.stat(path).st_mode if os.path.exists(path) else 0o644
    if os.path.exists(path):
        os.chmod(path, 0o600)
    with open(path, 'wb') as file:
        file.write(data)
    os.chmod(path, mode & 0o7777)
    os.utime(path, (seconds, seconds))


def change(top):
    """Change the tree of readlab in every way a line can tell."""
    def path(*names):
        return os.path.join(os.fsencode(top), *names)

    rewrite(path(b'docs', b'a'), b'Alpha\n')        # and docs/hard
    os.chmod(path(b'docs', b'b'), 0o640)
    os.unlink(path(b'docs', b'deep', b'c'))
    rewrite(path(b'empty'), b'not', OLD + 1)
    os.unlink(path(b'soft'))
    os.symlink(b'docs/a', path(b'soft'))
    os.unlink(path(b'pipe'))
    os.mkdir(path(b'pipe'))
    rewrite(path(b'pipe', b'new'), b'')
    os.unlink(path(b'names', b'bad\xff'))
    rewrite(path(b'names', b'more\xff\n'), b'')
    for name in ([b'soft'], [b'pipe'], [b'docs', b'deep'], [b'docs'],
                 [b'names'], []):
        readlab.times_set(path(*name))


CHANGED = rb'''M content ./docs/a
M mode ./docs/b
- ./docs/deep/c
M content ./docs/hard
M content,mtime ./empty
- ./names/bad\377
+ ./names/more\377\n
M type ./pipe/
+ ./pipe/new
M target ./soft
'''


def setUpModule():
    global LAB, HOST, PROGRAM
    with mock.patch.object(tarsnap, 'RACY', 0):
        LAB, HOST = readlab.shared('old', 'same')
        PROGRAM = readlab.Program(HOST)
        shutil.copytree(LAB.tree, LAB.path('copy'), symlinks=True,
                        ignore=lambda *_: ['pipe', 'hard'])
        os.rename(LAB.tree, LAB.path('kept'))
        os.mkdir(LAB.tree)
        readlab.tree_make(LAB.tree)
        change(LAB.tree)
        HOST.create('new')
        shutil.rmtree(LAB.tree)
        os.rename(LAB.path('kept'), LAB.tree)


class Archives(unittest.TestCase):

    def diff(self, *args):
        return PROGRAM.run('--diff', *args)

    def test_equal(self):
        self.assertEqual(self.diff('-f', 'old', '-f', 'same'),
                         (0, b'', b''))

    def test_lines_and_status(self):
        self.assertEqual(self.diff('-f', 'old', '-f', 'new'),
                         (1, CHANGED, b''))

    def test_the_other_way_round(self):
        swapped = CHANGED.translate(bytes.maketrans(b'+-', b'-+')).replace(
            b'./pipe/\n', b'./pipe\n')
        self.assertEqual(self.diff('-f', 'new', '-f', 'old'),
                         (1, swapped, b''))

    def test_patterns(self):
        self.assertEqual(
            self.diff('-f', 'old', '-f', 'new', '--exclude', 'deep', 'docs',
                      'soft'),
            (1, b'M content ./docs/a\nM mode ./docs/b\nM content ./docs/hard'
             b'\nM target ./soft\n', b''))
        self.assertEqual(self.diff('-f', 'old', '-f', 'new', 'sticky'),
                         (0, b'', b''))

    def test_null_output(self):
        self.assertEqual(
            self.diff('-f', 'old', '-f', 'new', '--null-output', 'names',
                      'empty')[1],
            b'M\0\0content,mtime\0\0./empty\0-\0\0./names/bad\xff\0'
            b'+\0\0./names/more\xff\n\0')

    def test_json(self):
        status, out, err = self.diff('-f', 'old', '-f', 'new', '--json')
        self.assertEqual((status, err), (1, b''))
        *found, last = [json.loads(line) for line in out.splitlines()]
        self.assertEqual(last, {'type': 'summary', 'added': 2, 'removed': 2,
                                'modified': 6, 'errors': 0})
        self.assertEqual([row['change'] for row in found], [
            {'M': 'modified', '-': 'removed', '+': 'added'}[line[:1]]
            for line in CHANGED.decode().splitlines()])
        row = next(row for row in found if row['path'] == './empty')
        self.assertEqual(row['what'], ['content', 'mtime'])
        self.assertEqual((row['old']['size'], row['new']['size']), (0, 3))
        self.assertEqual([key for row in found for key in ('old', 'new')
                          if key not in row], ['new', 'new', 'old', 'old'])
        self.assertIn('path_b64', found[5]['old'])

    def test_usage(self):
        for args in ((), ('-f', 'old', '-f', 'new', '-f', 'same'),
                     ('-f', 'old', '-f', 'new', '-C', '/'),
                     ('-f', 'old', '-f', 'none')):
            with self.subTest(args):
                status, out, err = self.diff(*args)
                self.assertEqual((status, out), (1, b''))
                self.assertTrue(err.startswith(b'tarsnap: '))


class Cost(unittest.TestCase):
    """What is the same below one block is not fetched."""

    def test_equal_subtrees_are_not_read(self):
        with mock.patch.object(tarsnap, 'RACY', 0), lab.fine():
            laboratory, host = readlab.shared()
            seed = 20
            rng = random.Random(seed)
            for number in range(600):
                readlab.file_make(os.fsencode(laboratory.path(
                    'tree', 'many', '%03d' % number)), rng.randbytes(3000),
                    0o644)
            readlab.times_set(laboratory.path('tree', 'many'))
            host.create('a')
            path = laboratory.path('tree', 'many', '300')
            rewrite(path, rng.randbytes(3000))
            rewrite(laboratory.path('tree', 'many', '301'), b'short')
            host.create('b')
            with lab.tapped() as log:
                out = readlab.Program(host).run('--diff', '-f', 'a', '-f',
                                                'b')
        self.assertEqual(out, (1, b'M content,mtime ./many/300\n'
                               b'M content,mtime ./many/301\n', b''))
        names = [body[3:][at:at + 32] for kind, body in log
                 if kind == tarsnap.GET
                 for at in range(0, len(body) - 3, 32)]
        chunks = {name for name, row in laboratory.live().items()
                  if row[0] == tarsnap.CHUNK}
        self.assertLess(len(names), 40, seed)
        # Of two files of one size, the first chunks that differ; no other.
        self.assertLessEqual(len(chunks.intersection(names)), 2, seed)

    def test_same_bytes_in_other_chunks_are_the_same(self):
        laboratory, host = readlab.shared()
        data = random.Random(21).randbytes(900000)
        readlab.file_make(os.fsencode(laboratory.path('tree', 'f')), data,
                          0o644)
        with mock.patch.object(tarsnap, 'RACY', 0):
            host.create('a', 'f')
            host.lose('cache')
            with lab.fine():
                host.create('b', 'f')
            os.utime(laboratory.path('tree', 'f'))
            rewrite(laboratory.path('tree', 'f'), data[:-1] + b'?')
            host.create('c', 'f')
        program = readlab.Program(host)
        self.assertEqual(program.run('--diff', '-f', 'a', '-f', 'b'),
                         (0, b'', b''))
        self.assertRegex(program.run('--diff', '-f', 'b', '-f', 'c')[1],
                         b'^M content')


class Disk(unittest.TestCase):

    def setUp(self):
        self.target = HOST.extract('old', '-p')

    def diff(self, *args):
        return PROGRAM.run('--diff', '-f', 'old', '-C', self.target, *args)

    def path(self, *names):
        return os.path.join(self.target, *names)

    def test_what_was_extracted_is_equal(self):
        with lab.tapped() as log:
            self.assertEqual(self.diff(), (0, b'', b''))
        # The record and one page: no content.
        self.assertEqual(log.kinds().count(tarsnap.GET), 2)

    def test_lines_and_status(self):
        os.unlink(self.path('docs', 'hard'))
        os.link(self.path('docs', 'a'), self.path('docs', 'hard'))
        change(self.target)
        self.assertEqual(self.diff(), (1, CHANGED, b''))

    def test_patterns_and_norecurse(self):
        change(self.target)
        self.assertEqual(self.diff('docs/deep', 'names', 'none'), (
            1, b'- ./docs/deep/c\n- ./names/bad\\377\n'
            b'+ ./names/more\\377\\n\n',
            b'tarsnap: none: Not found in archive\n'
            b'tarsnap: Error exit delayed from previous errors.\n'))
        self.assertEqual(self.diff('-n', 'names')[1],
                         b'- ./names/bad\\377\n')
        self.assertEqual(self.diff('--exclude', 'more*', 'names')[1],
                         b'- ./names/bad\\377\n')

    def test_json(self):
        os.unlink(self.path('empty'))
        os.utime(self.path('set'), (5, 5))
        readlab.times_set(self.target)
        rows = [json.loads(line) for line in
                self.diff('--json')[1].splitlines()]
        self.assertEqual([row['type'] for row in rows],
                         ['difference', 'difference', 'summary'])
        self.assertEqual(rows[1]['what'], ['mtime'])
        self.assertEqual(rows[1]['new']['mtime'],
                         '1970-01-01T00:00:05.000000000Z')

    def test_every_size_and_kind_of_content(self):
        laboratory, host = readlab.shared()
        seed = 22
        rng = random.Random(seed)
        names = []
        for number, size in enumerate((0, 1, 32767, 32768, 262144, 262145,
                                       3000000)):
            names.append('f%d' % number)
            readlab.file_make(os.fsencode(laboratory.path('tree', names[-1])),
                              rng.randbytes(size), 0o644)
        with open(laboratory.path('tree', 'holes'), 'wb') as file:
            file.seek(5000000)
            file.write(b'x')
            file.truncate(9000000)
        names.append('holes')
        host.create('a', *names)
        program = readlab.Program(host)
        run = ('--diff', '-f', 'a', '-C', laboratory.tree)
        self.assertEqual(program.run(*run), (0, b'', b''))
        for name in names[1:]:
            path = laboratory.path('tree', name)
            status = os.stat(path)
            with open(path, 'r+b') as file:
                at = rng.randrange(status.st_size)
                file.seek(at)
                old = file.read(1)
                file.seek(at)
                file.write(bytes([old[0] ^ 1]))
            os.utime(path, ns=(status.st_mtime_ns,) * 2)
            with self.subTest(name, seed=seed):
                self.assertEqual(
                    program.run(*run),
                    (1, b'M content %b\n' % name.encode(), b''))
            with open(path, 'r+b') as file:
                file.seek(at)
                file.write(old)
            os.utime(path, ns=(status.st_mtime_ns,) * 2)

    @unittest.skipUnless(ROOT, 'not root')
    def test_owner(self):
        os.chown(self.path('empty'), 4711, 4712)
        self.assertEqual(self.diff(), (1, b'M owner ./empty\n', b''))

    @unittest.skipUnless(hasattr(os, 'setxattr'), 'no extended attributes')
    def test_xattrs(self):
        try:
            os.setxattr(self.path('empty'), b'user.x', b'1')
        except OSError as e:
            self.skipTest('no extended attributes here: %s' % e)
        self.assertEqual(self.diff(), (1, b'M xattrs ./empty\n', b''))

    def test_nothing_there(self):
        shutil.rmtree(self.target)
        os.mkdir(self.target)
        status, out, err = self.diff('docs')
        self.assertEqual((status, err), (1, b''))
        self.assertEqual(out, b''.join(
            b'- %b\n' % line for line in PROGRAM.run(
                '-tf', 'old', 'docs')[1].splitlines()))

    def test_the_real_program(self):
        self.assertEqual(PROGRAM.real('--diff', '-f', 'old', '-C',
                                      self.target), (0, b'', b''))

    def test_disk_is_not_changed_nor_links_followed(self):
        shutil.rmtree(self.path('docs'))
        os.symlink('/', self.path('docs'))
        before = lab.snapshot(self.target)
        self.assertEqual(self.diff('docs')[1].splitlines()[0],
                         b'M type ./docs')
        self.assertEqual(lab.difference(before, lab.snapshot(self.target)),
                         [])


if __name__ == '__main__':
    unittest.main()
