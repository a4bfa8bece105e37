# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""--json: an object to a line, every name exact, nothing else on stdout."""

import base64
import json
import os
import unittest

import readlab
import tarsnap


def setUpModule():
    global LAB, HOST, PROGRAM
    LAB, HOST = readlab.shared('one', 'two \udcfe')
    PROGRAM = readlab.Program(HOST)


def rows(text):
    """The objects of a stream that holds nothing but lines of JSON."""
    return [json.loads(line) for line in text.splitlines()]


def exact(row, key):
    """A name as bytes, whatever bytes it has."""
    if key + '_b64' in row:
        return base64.b64decode(row[key + '_b64'])
    return row[key].encode()


class Json(unittest.TestCase):

    def good(self, *args):
        """The rows on stdout of a run that says nothing else."""
        status, out, err = PROGRAM.run(*args, '--json')
        self.assertEqual((status, err), (0, b''))
        self.assertTrue(out.isascii())
        return rows(out)

    def test_list_archives(self):
        first, second = self.good('--list-archives')
        self.assertEqual(first['type'], 'archive')
        self.assertEqual(first['name'], 'one')
        self.assertEqual(first['created'], '2019-08-26T18:30:46.000000000Z')
        self.assertIs(first['complete'], True)
        self.assertGreater(first['entries'], 10)
        self.assertEqual(first['command'][0], 'tarsnap')
        self.assertIn('one', first['command'])
        self.assertEqual(len(first['id']), 64)
        self.assertNotIn('name_b64', first)
        self.assertEqual(second['name'], 'two \ufffd')
        self.assertEqual(exact(second, 'name'), b'two \xfe')
        words = [base64.b64decode(word) for word in second['command_b64']]
        self.assertIn(b'two \xfe', words)

    def test_list_archives_of_hashes(self):
        first = self.good('--list-archives')[0]
        self.assertEqual(
            self.good('--list-archives', '--hashes', '-f', first['id']),
            [first])

    def test_list_archives_with_a_pruning_key(self):
        pruner = LAB.host('pruner', roles=(3,))
        status, out, err = readlab.Program(pruner).run('--list-archives',
                                                       '--json')
        self.assertEqual((status, err), (0, b''))
        for row in rows(out):
            self.assertIn('name', row)
            self.assertNotIn('command', row)
            self.assertNotIn('host', row)

    def test_contents(self):
        found = {exact(row, 'path'): row for row in self.good('-t', '-f',
                                                              'one')}
        top = os.fsencode(LAB.tree)
        paths = {b'.'}
        for above, below, files in os.walk(top):
            for name in below + files:
                path = os.path.join(above, name)
                paths.add(b'./' + os.path.relpath(path, top))
        self.assertEqual(set(found), paths)
        for path, row in found.items():
            status = os.lstat(os.path.join(top, path))
            with self.subTest(path):
                self.assertEqual(row['type'], 'entry')
                self.assertEqual(int(row['mode'], 8), status.st_mode & 0o7777)
                self.assertEqual((row['uid'], row['gid']),
                                 (status.st_uid, status.st_gid))
                self.assertEqual(row['mtime'],
                                 '2019-08-26T18:30:46.000000000Z')
        self.assertEqual(found[b'./docs/b']['size'], 26628)
        self.assertEqual(found[b'./docs/hard']['link'], './docs/a')
        self.assertEqual(found[b'./soft']['target'], 'docs/b')
        self.assertEqual([found[path]['kind'] for path in (
            b'.', b'./empty', b'./soft', b'./pipe')],
            ['directory', 'file', 'symlink', 'fifo'])

    def test_verbosity_changes_nothing(self):
        self.assertEqual(self.good('-tvv', '-f', 'one'),
                         self.good('-t', '-f', 'one'))

    def test_diagnostics_are_objects_too(self):
        status, out, err = PROGRAM.run('-t', '--json', '-f', 'one', 'nothing',
                                       b'\xff', './docs')
        self.assertEqual(status, 1)
        self.assertEqual(len(rows(out)), 6)
        found = rows(err)
        self.assertEqual({row['type'] for row in found}, {'message'})
        self.assertEqual([exact(row, 'message') for row in found], [
            b'nothing: Not found in archive', b'\xff: Not found in archive',
            b'Error exit delayed from previous errors.'])

    def test_no_such_archive(self):
        status, out, err = PROGRAM.run('-t', '--json', '-f', 'three')
        self.assertEqual((status, out), (1, b''))
        self.assertEqual(rows(err)[0]['message'],
                         'Archive does not exist: three')

    def test_not_with_null_output(self):
        status, out, err = PROGRAM.run('-t', '--json', '--null-output', '-f',
                                       'one')
        self.assertEqual((status, out), (1, b''))
        self.assertIn('--null-output', rows(err)[0]['message'])

    def test_progress(self):
        target = LAB.fresh()
        os.mkdir(target)
        status, out, err = PROGRAM.run('-x', '--json', '-f', 'one', '-C',
                                       target, '--progress-bytes', '1k')
        self.assertEqual(status, 0)
        *found, last = rows(err)
        self.assertTrue(found)
        for row in found:
            self.assertEqual(set(row) - {'path_b64'},
                             {'type', 'entries', 'bytes', 'path', 'done',
                              'size'})
        self.assertEqual(set(last), {'type', 'entries', 'bytes'})
        summary, = rows(out)
        self.assertEqual(last['entries'], summary['extracted'])

    def test_questions_cannot_be_asked(self):
        status, out, err = PROGRAM.run('-xw', '--json', '-f', 'one')
        self.assertEqual((status, out), (1, b''))
        self.assertIn('exclude', rows(err)[0]['message'])

    def test_locale_changes_nothing(self):
        env = {'LC_ALL': 'C', 'LANG': 'C', 'PYTHONUTF8': '0',
               'PYTHONCOERCECLOCALE': '0'}
        plain = PROGRAM.run('-t', '--json', '-f', 'one', 'none')
        self.assertEqual(PROGRAM.real('-t', '--json', '-f', 'one', 'none',
                                      env=env), plain)


class Line(unittest.TestCase):

    def test_times(self):
        for nanos, text in (
                (0, '1970-01-01T00:00:00.000000000Z'),
                (-1, '1969-12-31T23:59:59.999999999Z'),
                (1566844246123456789, '2019-08-26T18:30:46.123456789Z'),
                (2 ** 62 * 10 ** 9 + 5, '@4611686018427387904.000000005'),
                (-2 ** 62 * 10 ** 9, '@-4611686018427387904.000000000')):
            with self.subTest(nanos):
                self.assertEqual(tarsnap.json_time(nanos), text)

    def test_any_name_comes_back(self):
        for name in (b'', b'a', b'\xc3\xa9', b'\xff\n', bytes(range(256)),
                     '\ufffd'.encode()):
            with self.subTest(name):
                line = tarsnap.json_line({'n': name, 'l': [b'x', name]})
                self.assertTrue(line.isascii() and b'\n' not in line)
                row = json.loads(line)
                self.assertEqual(exact(row, 'n'), name)
                self.assertEqual(
                    [base64.b64decode(word) for word in row['l_b64']]
                    if 'l_b64' in row else
                    [word.encode() for word in row['l']], [b'x', name])


if __name__ == '__main__':
    unittest.main()
