# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""A share of `make crash`: kills, power cuts and faults; nothing is lost.

And what the harness stands on: that it sees each call, and forgets what was
not synced.
"""

import os
import random
import re
import subprocess
import sys
import tempfile
import unittest

import faults
from world import seed_choose

HERE = os.path.dirname(os.path.abspath(__file__))


class Share(unittest.TestCase):

    def crash(self, part, count):
        seed = seed_choose(part)
        done = subprocess.run(
            [sys.executable, os.path.join(HERE, 'crash.py'), '--seed',
             str(seed), '--count', str(count), '--seconds', '60', part],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)
        words = re.fullmatch(
            r'(\d+) runs, (\d+) kills, (\d+) power cuts, (\d+) faults, '
            r'0 corrupt, 0 lost committed, \d+ failed',
            done.stdout.splitlines()[-1])
        self.assertTrue(words, done.stdout)
        self.assertGreaterEqual(sum(map(int, words.groups()[1:])), count)

    def test_client_with_a_directory(self):
        self.crash('dir', 8)

    def test_client_and_server(self):
        self.crash('tls', 3)


class Watched(unittest.TestCase):
    """Real processes under faults.c."""

    @classmethod
    def setUpClass(cls):
        base = tempfile.TemporaryDirectory()
        cls.addClassCleanup(base.cleanup)
        cls.library = faults.build(base.name)

    def setUp(self):
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.base = os.path.realpath(base.name)
        self.top = os.path.join(self.base, 'top')
        os.mkdir(self.top)
        self.put('old', b'old content')
        self.faults = faults.Faults(os.path.join(self.base, 'state'))
        self.faults.watch(self.top)
        self.log = faults.Log(os.path.join(self.base, 'log'))
        self.log.mark('begin')
        self.disk = faults.Disk(self.top)

    def put(self, name, data):
        with open(os.path.join(self.top, name), 'wb') as file:
            file.write(data)

    def script(self, text, **how):
        """Run Python code in the directory; its exit status."""
        self.faults.set(**dict({'logging': 1}, **how))
        return subprocess.run(
            [sys.executable, '-c', 'import os, sqlite3\n'
             'def put(name, data, sync=False):\n'
             '    fd = os.open(name, os.O_WRONLY | os.O_CREAT)\n'
             '    os.write(fd, data)\n'
             '    if sync: os.fsync(fd)\n'
             'def sync(name="."):\n'
             '    os.fsync(os.open(name, os.O_RDONLY))\n' + text],
            cwd=self.top, stderr=subprocess.PIPE, env=dict(
                os.environ, LD_PRELOAD=self.library,
                FAULTS_STATE=self.faults.path, FAULTS_LOG=self.log.path)
        ).returncode

    def left(self, dice=None, now=False):
        """{path: content} after a power cut."""
        for op, *rest in self.log.records():
            if op != '!':
                self.disk.apply(op, *rest)
        self.disk.leave(self.top, dice, now)
        self.disk.take(self.top)
        return self.contents()

    def contents(self):
        """{path: content} of what is there."""
        found = {}
        for where, _, names in os.walk(self.top):
            for name in names:
                path = os.path.join(where, name)
                with open(path, 'rb') as file:
                    found[os.path.relpath(path, self.top)] = file.read()
        return found

    OLD = {'old': b'old content'}

    def test_what_is_not_synced_is_gone(self):
        self.assertEqual(self.script(
            'put("a", b"1", True); put("old", b"NEW"); os.mkdir("d")\n'
            'put("d/b", b"2", True); sync("d")\n'), 0)
        self.assertEqual(self.left(), self.OLD)

    def test_what_is_synced_stays(self):
        self.assertEqual(self.script(
            'put("a", b"1", True); put("empty", b"lost"); os.mkdir("d")\n'
            'put("d/b", b"2", True); sync("d"); os.link("a", "d/link")\n'
            'put("old", b"NEW", True); os.rename("d/b", "d/c"); sync()\n'), 0)
        self.assertEqual(self.left(), {
            'a': b'1', 'empty': b'', 'old': b'NEW content', 'd/b': b'2'})

    def test_removal_and_renaming_wait_for_the_directory(self):
        self.assertEqual(self.script('os.rename("old", "new")\n'), 0)
        self.assertEqual(self.left(), self.OLD)
        self.assertEqual(self.script('os.rename("old", "x"); sync()\n'), 0)
        self.assertEqual(self.left(), {'x': b'old content'})
        self.assertEqual(self.script('os.unlink("x"); sync()\n'), 0)
        self.assertEqual(self.left(), {})

    def test_some_of_the_rest_may_have_arrived(self):
        self.assertEqual(self.script(
            'put("old", b"X" * 5000); put("new", b"")\n'), 0)
        for op, *rest in self.log.records():
            if op != '!':
                self.disk.apply(op, *rest)
        dice = random.Random(1)
        file = self.disk.roots[self.top].names['old']
        kinds = {file.left(dice) for _ in range(60)}
        self.assertGreater(len(kinds), 4)
        for one in kinds:
            self.assertRegex(one, rb'\A(old content|X*)\Z')
            self.assertIn(len(one) % faults.SECTOR, (0, 11, 5000 % 512))
        names = {tuple(sorted(self.disk.roots[self.top].left(dice)))
                 for _ in range(60)}
        self.assertEqual(names, {('old',), ('new', 'old')})

    def test_a_database_is_seen(self):
        base = ('db = sqlite3.connect("db", isolation_level=None)\n'
                'db.execute("PRAGMA synchronous=EXTRA")\n')
        self.assertEqual(self.script(
            base + 'db.execute("CREATE TABLE t(x)")\nsync()\n'), 0)
        self.assertEqual(self.script(
            base + 'db.execute("INSERT INTO t VALUES(1)")\n'), 0)
        self.assertEqual(self.script(
            base.replace('EXTRA', 'OFF')
            + 'db.execute("INSERT INTO t VALUES(2)")\n'), 0)
        self.left()
        self.assertEqual(self.script(
            base + 'os._exit(sum(x for x, in '
            'db.execute("SELECT x FROM t")))\n'), 1)

    def test_the_nth_call(self):
        text = 'put("a", b"12", True); put("b", b"34", True)\n'
        for n, what, status, there in (
                (3, faults.KILL, -9, {'a': b'12'}),
                (2, faults.KILL, -9, {'a': b''}),
                (2, faults.TORN, -9, {'a': b'1'}),
                (2, faults.AFTER, -9, {'a': b'12'}),
                (4, faults.FAIL, 1, {'a': b'12'}),
                (5, faults.HALF, 1, {'a': b'12', 'b': b'3'}),
                (5, faults.SHORT, 0, {'a': b'12', 'b': b'3'}),
                (5, faults.LATE, 1, {'a': b'12', 'b': b'34'}),
                (7, faults.KILL, 0, {'a': b'12', 'b': b'34'})):
            with self.subTest(n=n, what=what):
                for name in os.listdir(self.top):
                    os.unlink(os.path.join(self.top, name))
                self.assertEqual(self.script(
                    text, at=n, what=what, error=28, mask=faults.WRITES,
                    logging=0), status)
                self.assertEqual(self.contents(), there)
                self.assertEqual(self.faults.hits, n < 7)

    def test_calls_that_are_named(self):
        text = 'put("a", b"12", True); put("b", b"34", True)\n'
        for only, there in (('w top/b', {'a': b'12', 'b': b''}),
                            ('ow top/b', {'a': b'12'}),
                            ('f top/', {'a': b'12'}),
                            ('l top/', {'a': b'12', 'b': b'34'})):
            with self.subTest(only=only):
                for name in os.listdir(self.top):
                    os.unlink(os.path.join(self.top, name))
                self.assertEqual(self.script(
                    text, at=1, what=faults.KILL, mask=faults.WRITES,
                    only=only), 0 if only[0] == 'l' else -9)
                self.assertEqual(self.contents(), there)

    def test_a_process_that_is_mute(self):
        self.assertEqual(self.script(
            'import ctypes; ctypes.CDLL(None).faults_mute(1)\n'
            'put("a", b"12", True)\n'
            'ctypes.CDLL(None).faults_mute(0)\nput("b", b"12", True)\n',
            at=2, what=faults.KILL, mask=faults.WRITES), -9)
        self.assertEqual({record[1] for record in self.log.records()
                          if record[0] != '!'},
                         {os.path.join(self.top, 'b')})


if __name__ == '__main__':
    unittest.main()
