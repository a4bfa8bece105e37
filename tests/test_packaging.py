# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""What is installed is what there is, under one version."""

import configparser
import glob
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


class Packaging(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.conf = configparser.ConfigParser()
        cls.conf.read(os.path.join(ROOT, 'setup.cfg'))

    def words(self, section, option):
        return self.conf.get(section, option).split('\n')[1:]

    def test_one_version(self):
        version = self.conf.get('metadata', 'version')
        for module in ('tarsnap', 'tarsnapd', 'cronwatch'):
            self.assertEqual(importlib.import_module(module).VERSION, version)

    def test_version_option(self):
        version = self.conf.get('metadata', 'version')
        for words, says in ((['tarsnap.py'], 'tarsnap'),
                            (['tarsnapd.py'], 'tarsnapd'),
                            (['cronwatch.py'], 'cronwatch'),
                            (['keygen.py', 'keygen'], 'tarsnap-keygen'),
                            (['keygen.py', 'keyregen'], 'tarsnap-keyregen'),
                            (['keygen.py', 'keymgmt'], 'tarsnap-keymgmt'),
                            (['keygen.py', 'recrypt'], 'tarsnap-recrypt')):
            done = subprocess.run(
                [sys.executable, os.path.join(ROOT, words[0]), *words[1:],
                 '--version'], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True)
            self.assertEqual((done.returncode, done.stdout),
                             (0, '%s %s\n' % (says, version)))

    @unittest.skipUnless(shutil.which('make'), 'make is missing')
    def test_make_demo_takes_a_directory_of_any_name(self):
        done = subprocess.run(
            ['make', '-C', ROOT, 'demo', 'PYTHON=' + sys.executable,
             "DIR=/none/such a \"b' dir"], capture_output=True, text=True)
        self.assertIn("demo: /none/such a \"b' dir: no such directory",
                      done.stderr)

    def test_what_is_wrong_with_the_demo_goes_to_standard_error(self):
        demo = os.path.join(ROOT, 'contrib', 'demo.py')
        for words in ['/none/such'], ['--help', '/'], ['--s4'], ['/', '/']:
            with self.subTest(words):
                done = subprocess.run([sys.executable, demo, *words],
                                      capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stdout), (1, ''))
                self.assertRegex(done.stderr, r'\Ademo: [^\n]+\n\Z')

    def test_entry_points_take_no_arguments(self):
        # pip's wrappers call them with none.
        for line in self.words('options.entry_points', 'console_scripts'):
            name, _, target = line.partition(' = ')
            module, _, function = target.partition(':')
            with self.subTest(name):
                found = getattr(importlib.import_module(module), function)
                for parameter in inspect.signature(found).parameters.values():
                    self.assertIsNot(parameter.default, parameter.empty)

    def test_all_manual_pages_are_installed(self):
        listed = set()
        for option in self.conf.options('options.data_files'):
            section = option[-1]
            for page in self.words('options.data_files', option):
                self.assertTrue(page.endswith('.' + section), page)
                listed.add(page)
        there = {os.path.relpath(path, ROOT)
                 for path in glob.glob(os.path.join(ROOT, 'man', '*.[1-9]'))}
        self.assertEqual(listed, there)

    def test_modules_and_licence(self):
        for module in self.words('options', 'py_modules'):
            path = os.path.join(ROOT, module + '.py')
            with open(path) as file:
                head = [file.readline() for _ in range(2)]
            self.assertEqual(head[0], '#!/usr/bin/env python3\n')
            self.assertRegex(head[1], 'BSD-2-Clause licence; see LICENSE')
            self.assertTrue(os.access(path, os.X_OK), path)

    def test_needs_nothing_else(self):
        # The standard library and cryptography; nothing else, ever.
        known = {'cryptography', 'tarsnap', 'tarsnapd', 'keygen'}
        names = getattr(sys, 'stdlib_module_names', None)
        if names is None:       # Python 3.9; the newer ones check it
            return
        for module in self.words('options', 'py_modules'):
            with open(os.path.join(ROOT, module + '.py')) as file:
                text = file.read()
            for name in re.findall(
                    r'^ *(?:import|from) ([a-z_0-9]+)(?:\.[\w.]+)?'
                    r'(?: import .*| as \w+)?$', text, re.M):
                self.assertIn(name, names | known, module)


if __name__ == '__main__':
    unittest.main()
