# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What tests run of PyPI and npm is installed once, whoever asks first."""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import installed


class Installed(unittest.TestCase):

    def setUp(self):
        base = tempfile.TemporaryDirectory()
        self.addCleanup(base.cleanup)
        self.root = base.name
        patch = mock.patch.object(installed, 'ROOT', base.name)
        patch.start()
        self.addCleanup(patch.stop)

    def test_once(self):
        with mock.patch.object(installed, 'run') as step:
            with mock.patch.object(shutil, 'which', return_value='npm'):
                first = installed.npm('thing@1.2')
                second = installed.npm('thing@1.2')
        self.assertEqual(first, os.path.join(self.root, '.venv-thing',
                                             'node_modules'))
        self.assertEqual(second, first)
        self.assertEqual(step.call_count, 1)
        self.assertIn('thing@1.2', step.call_args[0])

    def test_again_if_it_failed(self):
        for _ in range(2):
            with self.assertRaisesRegex(RuntimeError, 'no such thing'):
                with installed.folder('thing') as (_, empty):
                    self.assertTrue(empty)
                    installed.run('sh', '-c', 'echo no such thing; exit 3')

    def test_at_home(self):
        with mock.patch.dict(os.environ, HOME='/nonexistent'):
            installed.run('sh', '-c', '[ "$HOME" != /nonexistent ]')

    def test_two_wait_for_each_other(self):
        code = ('import sys, time; sys.path[:0] = [%r]; import installed\n'
                'installed.ROOT = %r\n'
                'with installed.folder("thing") as (path, empty):\n'
                '    print(empty)\n'
                '    time.sleep(0.3 if empty else 0)\n' % (
                    os.path.dirname(installed.__file__), self.root))
        both = [subprocess.Popen([sys.executable, '-c', code], text=True,
                                 stdout=subprocess.PIPE) for _ in range(2)]
        self.assertEqual(sorted(one.communicate()[0] for one in both),
                         ['False\n', 'True\n'])


if __name__ == '__main__':
    unittest.main()
