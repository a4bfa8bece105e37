# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The runner of the tests counts what every interpreter said, and reports it.
"""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import run

MODULE = '''
import os, unittest

class T(unittest.TestCase):

    def test_it(self):
        self.assertEqual(os.environ.get('OTHER', ''), %r)
'''
VERSION = sys.version.split()[0]


class Runner(unittest.TestCase):
    """A copy of it, with modules of its own and another interpreter."""

    def setUp(self):
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.tests = os.path.join(base.name, 'tests')
        os.mkdir(self.tests)
        shutil.copy(run.__file__, self.tests)
        self.other = os.path.join(base.name, 'python')
        with open(self.other, 'w') as file:
            file.write('#!/bin/sh\nOTHER=yes exec %s "$@"\n' % sys.executable)
        os.chmod(self.other, stat.S_IRWXU)

    def module(self, name, other):
        """A module that passes where OTHER is `other` in the environment."""
        with open(os.path.join(self.tests, name + '.py'), 'w') as file:
            file.write(MODULE % other)

    def run_it(self, *words, ci=''):
        """(exit status, the lines it printed)."""
        done = subprocess.run(
            [sys.executable, os.path.join(self.tests, 'run.py'), *words],
            env=dict(os.environ, CI=ci, TALLY=''), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout.splitlines()

    def test_all_of_one_and_some_of_another(self):
        self.module('test_here', '')
        self.module('test_there', '')
        code, lines = self.run_it('--also', self.other, 'test_t*.py')
        self.assertEqual((code, lines[-1]),
                         (1, '2 passed, 1 failed, 0 skipped'), lines)
        self.assertEqual(
            sorted(line.partition(' s ')[0].rsplit(None, 1)[0]
                   for line in lines if ' cpu ' in line),
            ['test_here', 'test_there', 'test_there ' + VERSION])
        self.assertEqual(sum(line.startswith('slow: ') for line in lines), 3)
        self.module('test_there', 'yes')
        code, lines = self.run_it('test_here', '--also', self.other,
                                  'test_t*.py')
        self.assertEqual((code, lines[-1]),
                         (0, '2 passed, 0 failed, 0 skipped'), lines)

    def test_some_of_the_tests_of_a_module(self):
        with open(os.path.join(self.tests, 'test_many.py'), 'w') as file:
            file.write('import unittest\n\nclass T(unittest.TestCase):\n')
            for number in range(7):
                file.write('    def test_%d(self): pass\n' % number)
        said = set()
        for _ in range(20):
            code, lines = self.run_it('-v', '-p', 'none', '--also',
                                      self.other, 'test_m*.py/3')
            self.assertEqual((code, lines[-1]),
                             (0, '3 passed, 0 failed, 0 skipped'), lines)
            said |= {line.partition(' ')[0] for line in lines
                     if line.startswith('test_') and line.endswith('ok')}
            if len(said) == 7:
                break
        self.assertEqual(len(said), 7)

    def test_what_failed_is_run_again_where_it_failed(self):
        self.module('test_there', '')
        code, lines = self.run_it('--also', self.other, 'test_t*.py', ci='1')
        self.assertIn('failed again: test_there.T.test_it ' + VERSION, lines)
        self.assertEqual((code, lines[-1]),
                         (1, '1 passed, 1 failed, 0 skipped'), lines)


class Places(unittest.TestCase):
    """Where temporary files are."""

    def place(self, name, python=sys.executable, memory=True, **environ):
        environ = dict({'PYTHONDONTWRITEBYTECODE': '1'}, **environ)
        with mock.patch.dict(os.environ, environ, clear=True), \
                mock.patch.object(run, 'in_memory', return_value=memory):
            names = run.environment(run.Job(python, VERSION, name, 1))
        self.assertNotIn('PYTHONDONTWRITEBYTECODE', names)
        return names.get('TMPDIR')

    def test_in_memory_if_there_is_room(self):
        self.assertEqual(self.place('test_cut'), run.MEMORY)
        self.assertIsNone(self.place('test_cut', memory=False))

    def test_where_the_user_says(self):
        self.assertEqual(self.place('test_cut', TMPDIR='/elsewhere'),
                         '/elsewhere')

    def test_on_a_disk_on_one_interpreter(self):
        self.assertIsNone(self.place('test_e2e_hosts'))
        self.assertEqual(self.place('test_e2e_hosts', 'another'), run.MEMORY)

    def test_room_is_asked_for(self):
        with mock.patch.object(run, 'ROOM', 1 << 62):
            self.assertFalse(run.in_memory())
        with mock.patch.object(run, 'MEMORY', '/no such'):
            self.assertFalse(run.in_memory())


if __name__ == '__main__':
    unittest.main()
