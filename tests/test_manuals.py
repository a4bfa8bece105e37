# Copyright (c) 2026 The authors. BSD-2-Clause licence; see LICENSE.
"""The manual pages are well formed, and say what the programs do."""

import glob
import os
import re
import shutil
import subprocess
import sys
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import cronwatch                                            # noqa: E402
import keygen                                               # noqa: E402
import tarsnap                                              # noqa: E402
import tarsnapd                                             # noqa: E402

PAGES = sorted(glob.glob(os.path.join(ROOT, 'man', '*.[1-9]')))


def page(name):
    with open(os.path.join(ROOT, 'man', name)) as file:
        return file.read()


def long_options(text):
    """The long options a page names, without dashes."""
    found = set()
    for line in text.splitlines():
        if re.match(r'\.(It )?Fl ', line):
            found.update(re.findall(r'(?:Fl |[,|] )-([a-z][a-z-]+)', line))
    return found


def letters(text):
    """The short options that have an entry of their own."""
    found = set()
    for line in text.splitlines():
        if line.startswith('.It Fl '):
            found.update(re.findall(r'Fl ([A-Za-z])(?: |$)', line))
    return found


class Pages(unittest.TestCase):

    def test_lint(self):
        if not shutil.which('mandoc'):
            self.skipTest('no mandoc')
        done = subprocess.run(['mandoc', '-T', 'lint', '-W', 'warning']
                              + PAGES, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        self.assertEqual((done.returncode, done.stdout), (0, ''))

    def test_two_dashes_and_no_more(self):
        # Fl puts one before each of its words.
        for path in PAGES:
            with open(path) as file:
                for line in file:
                    if re.match(r'\.(It )?Fl ', line):
                        self.assertNotRegex(line, ' --', path)

    def test_references(self):
        # A page is about something we have, and refers to what there is.
        ours = {os.path.basename(path) for path in PAGES}
        for path in PAGES:
            with open(path) as file:
                text = file.read()
            self.assertIn('BSD-2-Clause licence; see LICENSE',
                          text.split('\n', 1)[0], path)
            for name, section in re.findall(r'^\.Xr (\S+) (\d)', text, re.M):
                if name.startswith('tarsnap'):
                    self.assertIn('%s.%s' % (name, section), ours, path)

    def test_nothing_of_where_it_was_written(self):
        places = [ROOT + os.sep, os.path.expanduser('~') + '/.']
        for path in PAGES + [os.path.join(ROOT, 'README.md'),
                             os.path.join(ROOT, 'THREATS.md')]:
            with open(path) as file:
                text = file.read()
            for place in places:
                self.assertNotIn(place, text, path)


class Tarsnap(unittest.TestCase):
    """tarsnap(1) and tarsnap.conf(5) against the option table."""

    def test_long_options(self):
        text = page('tarsnap.1')
        self.assertEqual(long_options(text),
                         set(tarsnap.Parser([]).longs))

    def test_letters(self):
        self.assertEqual(letters(page('tarsnap.1')),
                         set(tarsnap.Parser([]).letters))

    def test_modes_of_options(self):
        names = {'a': '--list-archives', 's': '--print-stats',
                 'e': '--expire', 'f': '--fsck', 'p': '--fsck-prune',
                 'i': '--initialize-cachedir', 'D': '--diff',
                 'V': '--verify', 'u': '--undelete', 'U': '--usage',
                 'A': '--last-backup-age'}
        said = {}
        for found in re.finditer(
                r'^\.It Fl -([a-z-]+).*\n\.Pq Modes? (.*)$',
                page('tarsnap.1').replace('\\\n', ''), re.M):
            said[found[1]] = {word.strip().replace('\\-', '-')
                              for word in found[2].split(',')}
        for option in tarsnap.OPTIONS:
            modes = {names.get(letter, letter) for letter in option.modes}
            with self.subTest(option.name):
                if modes and option.name != 'print-stats':  # also a mode
                    self.assertEqual(said.get(option.name), modes)

    def test_directives(self):
        found = set()
        for line in re.findall(r'^\.It Cm (.*)$', page('tarsnap.conf.5'),
                               re.M):
            found.update(word.replace('Cm ', '').strip() for word in
                         re.sub(' Ar [^,]*', '', line).split(','))
        self.assertEqual(found, set(tarsnap.Parser([]).directives))

    def test_default_checkpoint(self):
        self.assertEqual(tarsnap.size_parse('10G'), tarsnap.CHECKPOINT_BYTES)
        self.assertIn('and 10G if not given', page('tarsnap.1'))


class OtherPrograms(unittest.TestCase):

    def test_cronwatch(self):
        text = page('cronwatch.1')
        options = {word for line in re.findall(r'(?m)^\.It Ic (.*)$', text)
                   for word in re.findall(r'[a-z]+(?:-[a-z]+)+|^person', line)}
        missing = set().union(*cronwatch.OPTIONS) - options
        self.assertEqual(missing - {'forward', 'pass'},
                         {'mail-sendmail'})     # named with mail-smtp
        for name in cronwatch.DELIVERY_OPTIONS:
            self.assertIn('.It Ic %s ' % name, text)
        for name, sub in cronwatch.parser_make()._actions[-1].choices.items():
            self.assertRegex(text, r'\.(It )?Cm (\w+ \| )?%s\b' % name)
            for option in sub._option_string_actions:
                if option not in ('-h', '--help'):
                    self.assertRegex(text, '(Fl|[|]) ' + option[1:])

    def test_key_tools(self):
        for name, table in (
                ('tarsnap-keygen.1', keygen.KEYGEN_OPTIONS),
                ('tarsnap-keyregen.1', keygen.KEYREGEN_OPTIONS),
                ('tarsnap-keymgmt.1', keygen.KEYMGMT_OPTIONS),
                ('tarsnap-recrypt.1', keygen.RECRYPT_OPTIONS)):
            with self.subTest(name):
                text = page(name)
                items = re.findall(r'(?m)^\.It (.*Fl .*)',
                                   text[text.index('.Sh DESCRIPTION'):])
                self.assertEqual({'-' + option for option in re.findall(
                    r'Fl (-?[a-z][a-z-]*)', ' '.join(items))}, set(table))

    def test_server_commands(self):
        text = page('tarsnapd.8')
        for command in tarsnapd.COMMANDS:
            with self.subTest(command):
                self.assertRegex(text, r'(?m)^\.(It )?.*Cm.* %s\b' % command)


if __name__ == '__main__':
    unittest.main()
